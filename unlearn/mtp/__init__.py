"""Mask-token multi-token prediction: a frozen model drafts its own next tokens, and checks them.

``k`` mask tokens are put after a text; a LoRA that acts on them alone lets their hidden states
foretell the tokens to come, and a small sampler head chains them (Samragh et al. 2025,
arXiv:2507.11851). Ordinary positions never see the LoRA, so what the base says is unchanged, and a
draft is kept only where it is what the base says: the text that is written is the base's own.

This is not ``generate(use_mtp=True)`` of transformers, which is for models that ship layers of
their own for it.
"""

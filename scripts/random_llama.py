"""A Llama with random weights, for benchmarks whose models only have to be of a certain size."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(
    width: int, layers: int, vocabulary: int, *, inner: float = 2.75, positions: int = 2048
) -> LlamaForCausalLM:
    """Build one, always alike, with heads of 64 and feed-forward blocks ``inner`` times as wide."""
    torch.manual_seed(0)
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=int(inner * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()

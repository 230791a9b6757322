"""Sparse dictionaries of what leaves a layer: seven kinds, public files read, trained from a text.

A dictionary writes an activation as a sum of a few of many directions: x is about
``sum_f a_f W_dec[f] + b_dec``, where only few a_f are not 0. The kinds differ in how they choose
those: ReLU with an L1 penalty, the k largest of a token (TopK: Gao et al. 2024, arXiv:2406.04093)
or of a batch (BatchTopK: Bussmann et al. 2024, arXiv:2412.06410), a threshold per latent (JumpReLU:
Rajamanoharan et al. 2024, arXiv:2407.14435), a gate (Gated: Rajamanoharan et al. 2024,
arXiv:2404.16014), and Mutual Choice and Feature Choice (Ayonrinde 2024, arXiv:2411.02124).
"""

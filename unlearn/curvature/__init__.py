"""How a model's outputs bend with its weights: Kronecker-factored curvature and steps that use it.

The second-order term of KL(p_θ || p_θ+δ) on a set of rows is ½ δᵀHδ, where H is the Gauss–Newton
matrix of the cross-entropy, the Fisher information with labels drawn from the model itself. Here H
is approximated layer by layer by Kronecker products (K-FAC: Martens & Grosse 2015,
arXiv:1503.05671; EK-FAC: George et al. 2018, arXiv:1806.03884; for language models: Grosse et al.
2023, arXiv:2308.03296), damped, inverted and multiplied by gradients.

Everything is per loss token: H is the mean over labelled tokens, so a scale, a damping or a KL
means the same for every kind of curvature and every length of rows.
"""

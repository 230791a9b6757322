"""A small assistant beside an unchanged model: ULD, offset unlearning, WHP's logit difference."""

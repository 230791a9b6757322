"""TOFU: the benchmark, its data, its figures, and evaluations that others have logged."""

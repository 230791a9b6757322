"""Post-training: what watches it, weights of rows by their losses, and which rows are left out.

Its objectives stand with the others in :mod:`unlearn.objectives`.
"""

"""Weights & Biases, as a mirror of the results on disk."""

"""Examples, and the batches that they become."""

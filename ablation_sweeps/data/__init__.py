"""Examples, and how they become batches."""

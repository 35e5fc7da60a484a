"""W&B, as a mirror of the files."""

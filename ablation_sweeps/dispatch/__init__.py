"""From many jobs to processes, here or on a cluster, and back."""

"""What a run leaves on disk, and what is computed from it: metrics, curves, studies, comparisons."""

"""Files, hashes, errors and the terminal: what knows nothing of models or data."""

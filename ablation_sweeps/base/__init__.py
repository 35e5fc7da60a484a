"""Files, hashes, errors and the terminal: code that does not depend on models or data."""

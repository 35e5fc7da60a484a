"""One job: its options, and the experiment itself (`run.py`)."""

"""Where the neurons are, what they do, and which of them are ablated."""

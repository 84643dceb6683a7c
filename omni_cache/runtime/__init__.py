"""The runtime: where a call lies, what is kept for it, and which part runs."""

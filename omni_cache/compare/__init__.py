"""Comparison: strategies, live peers and fewer steps, on one pipeline's prompts, in one table."""

"""The capture: from a module to graphs, or to an extractor's account of it."""

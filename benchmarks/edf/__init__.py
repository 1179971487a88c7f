"""Exponentially decaying flows against first-order methods, after the paper's experiments."""

"""Algorithms that small transformers learn: which one, how well, and at what cost."""

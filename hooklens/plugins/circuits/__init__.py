"""Circuits: which edges between heads, MLPs, embedding and logits carry a behaviour, and how well they do so alone."""

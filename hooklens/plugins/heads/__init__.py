"""Attention heads: what each looks at, what it writes, what it does, and the labels that evidence allows."""

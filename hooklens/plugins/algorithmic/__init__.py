"""Algorithms found inside trained models: grokking and its Fourier circuit, in-context learning as gradient descent."""

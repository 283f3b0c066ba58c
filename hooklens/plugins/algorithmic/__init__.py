"""Models trained on algorithmic tasks: the Fourier circuit of modular addition, grokking, in-context regression."""

from hooklens.plugins.algorithmic import fourier, grokking, icl

__all__ = ["fourier", "grokking", "icl"]

"""Models trained on algorithmic tasks: the Fourier circuit of modular addition, in-context regression."""

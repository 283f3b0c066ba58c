"""Weights read as they are: spectra, what singular directions and neurons read and write, who reads whom."""

"""hooklens: every activation of a transformer by name, and the experiments that stand on it."""

__version__ = "0.1.0"

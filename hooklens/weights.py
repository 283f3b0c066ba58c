"""The names of `hl.weights`, for `from hooklens.weights import ...`."""

from hooklens.plugins.weights import *  # noqa: F403
from hooklens.plugins.weights import __all__ as __all__

"""The names of `hl.circuits`, for `from hooklens.circuits import ...`."""

from hooklens.plugins.circuits import *  # noqa: F403
from hooklens.plugins.circuits import __all__ as __all__

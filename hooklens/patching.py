"""The names of `hl.patching`, for `from hooklens.patching import ...`."""

from hooklens.plugins.patching import *  # noqa: F403
from hooklens.plugins.patching import __all__ as __all__

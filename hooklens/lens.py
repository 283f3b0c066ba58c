"""The names of `hl.lens`, for `from hooklens.lens import ...`."""

from hooklens.plugins.lens import *  # noqa: F403
from hooklens.plugins.lens import __all__ as __all__

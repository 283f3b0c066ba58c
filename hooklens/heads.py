"""The names of `hl.heads`, for `from hooklens.heads import ...`."""

from hooklens.plugins.heads import *  # noqa: F403
from hooklens.plugins.heads import __all__ as __all__

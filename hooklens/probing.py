"""The names of `hl.probing`, for `from hooklens.probing import ...`."""

from hooklens.plugins.probing import *  # noqa: F403
from hooklens.plugins.probing import __all__ as __all__

"""The names of `hl.steering`, for `from hooklens.steering import ...`."""

from hooklens.plugins.steering import *  # noqa: F403
from hooklens.plugins.steering import __all__ as __all__

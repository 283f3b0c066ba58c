"""The family `hl.weights`, for `from hooklens.weights import ...`; it is loaded from `hooklens.plugins.weights`."""

import sys

from hooklens.plugins import weights
from hooklens.plugins.weights import *  # noqa: F403

sys.modules[__name__] = weights

"""The family `hl.heads`, for `from hooklens.heads import ...`; it is loaded from `hooklens.plugins.heads`."""

import sys

from hooklens.plugins import heads
from hooklens.plugins.heads import *  # noqa: F403

sys.modules[__name__] = heads

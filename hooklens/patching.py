"""The family `hl.patching`, for `from hooklens.patching import ...`; it is loaded from `hooklens.plugins.patching`."""

import sys

from hooklens.plugins import patching
from hooklens.plugins.patching import *  # noqa: F403

sys.modules[__name__] = patching

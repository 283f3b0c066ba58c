"""The family `hl.probing`, for `from hooklens.probing import ...`; it is loaded from `hooklens.plugins.probing`."""

import sys

from hooklens.plugins import probing
from hooklens.plugins.probing import *  # noqa: F403

sys.modules[__name__] = probing

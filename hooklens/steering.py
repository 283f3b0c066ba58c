"""The family `hl.steering`, for `from hooklens.steering import ...`; it is loaded from `hooklens.plugins.steering`."""

import sys

from hooklens.plugins import steering
from hooklens.plugins.steering import *  # noqa: F403

sys.modules[__name__] = steering

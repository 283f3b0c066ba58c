"""The family `hl.lens`, for `from hooklens.lens import ...`; it is loaded from `hooklens.plugins.lens`."""

import sys

from hooklens.plugins import lens
from hooklens.plugins.lens import *  # noqa: F403

sys.modules[__name__] = lens

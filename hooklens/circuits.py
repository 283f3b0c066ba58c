"""The family `hl.circuits`, for `from hooklens.circuits import ...`; it is loaded from `hooklens.plugins.circuits`."""

import sys

from hooklens.plugins import circuits
from hooklens.plugins.circuits import *  # noqa: F403

sys.modules[__name__] = circuits

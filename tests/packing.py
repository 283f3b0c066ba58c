"""Where packed products can be tested: a torch whose private oneDNN operators exist and compute correctly."""

import os

import pytest

from hooklens.model.linear import ENV, packing_works

os.environ.pop(ENV, None)  # tests choose the product themselves; the user's setting would skip half of them

needs_packing = pytest.mark.skipif(
    not packing_works(),
    reason="torch.ops.mkldnn._linear_pointwise is missing or wrong here: this torch was built without oneDNN (macOS, "
    "some ARM builds), so that hooklens packs nothing on this machine",
)

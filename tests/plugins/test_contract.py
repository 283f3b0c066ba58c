"""Every registered plugin, ours and others', keeps the contract."""

import pytest

from hooklens.plugins import PluginInfo, available
from hooklens.testing import check_plugin

_LONG = {"evaluate_circuit", "transfer_circuit", "measure_direction_ablation", "train_probe"}  # seconds each
PLUGINS = available()


def test_ours_are_registered():
    assert "patch" in {info.name for info in PLUGINS if info.package == "hooklens"}


@pytest.mark.parametrize(
    "info",
    [pytest.param(info, id=info.name, marks=[pytest.mark.slow] * (info.name in _LONG)) for info in PLUGINS],
)
def test_a_registered_plugin_keeps_the_contract(info: PluginInfo):
    assert info.error is None
    check_plugin(info.name)

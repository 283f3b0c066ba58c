"""Every registered plugin, ours and others', keeps the contract."""

import pytest

from hooklens.plugins import PluginInfo, available
from hooklens.testing import check_plugin, tiny_model

_LONG = {"evaluate_circuit", "transfer_circuit", "measure_direction_ablation", "train_probe"}  # seconds each
_LONG |= {"check_probe_use", "transfer_probe", "find_direction", "prune_edges", "sweep_coefficients", "study_circuit"}
PLUGINS = available()


def test_ours_are_registered():
    assert "patch" in {info.name for info in PLUGINS if info.package == "hooklens"}


@pytest.mark.slow
@pytest.mark.parametrize("info", PLUGINS, ids=lambda info: info.name)
def test_a_registered_plugin_keeps_the_contract(info: PluginInfo):
    check_plugin(info.name)


@pytest.mark.parametrize("info", [info for info in PLUGINS if info.name not in _LONG], ids=lambda info: info.name)
def test_a_registered_plugin_keeps_the_contract_on_the_smallest_model(info: PluginInfo):
    assert info.error is None
    check_plugin(info.name, models={"one layer": tiny_model(n_layers=1, n_heads=1, d_model=2, d_vocab=5, n_ctx=4)})

"""Every registered plugin, ours and others', keeps the contract."""

import pytest

from hooklens.plugins import PluginInfo, available
from hooklens.testing import check_plugin

PLUGINS = available()


def test_ours_are_registered():
    assert "patch" in {info.name for info in PLUGINS if info.package == "hooklens"}


@pytest.mark.parametrize("info", PLUGINS, ids=lambda info: info.name)
def test_a_registered_plugin_keeps_the_contract(info: PluginInfo):
    assert info.error is None
    check_plugin(info.name)

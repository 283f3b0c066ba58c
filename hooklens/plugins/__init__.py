"""The methods, and the registry of all plugins, ours and those of other packages: entry points "hooklens.plugins"."""

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

from hooklens.core.errors import InputError, NameNotFound, Unavailable, did_you_mean
from hooklens.results import GROUP

__all__ = ["PluginInfo", "available", "find"]


@dataclass(frozen=True)
class PluginInfo:
    """One registered plugin: its name, its module and package, and the reason if it cannot be used."""

    name: str
    module: str
    package: str
    summary: str
    error: str | None = None

    def load(self) -> ModuleType:
        """Import the plugin's module; raises Unavailable with the cause if that fails."""
        try:
            return importlib.import_module(self.module)
        except (Exception, SystemExit) as error:  # another package's module may raise anything
            raise Unavailable(
                f"the plugin {self.name!r} was asked for, but importing {self.module!r} raised "
                f"{type(error).__name__}: {error}; repair or uninstall the package {self.package!r}"
            ) from error

    def demo(self) -> Callable[[Any], Any]:
        """The plugin's `demo(model) -> Result`."""
        demo = getattr(self.load(), "demo", None)
        if not callable(demo):
            raise InputError(
                f"the plugin {self.name!r} has no demo(model) in {self.module}; add one that returns a Result"
            )
        return demo


def available() -> list[PluginInfo]:
    """Every registered plugin, by name; one that does not import is listed with its error.

    >>> "patch" in [info.name for info in available() if info.package == "hooklens"]
    True
    """
    entries = importlib.metadata.entry_points(group=GROUP)
    return sorted(map(_info, entries), key=lambda info: (info.name, info.package))


def find(name: str) -> PluginInfo:
    """The plugin with this name; the error for an unknown name lists the closest ones.

    >>> find("patch").module
    'hooklens.plugins.patching.activation'
    """
    entries = importlib.metadata.entry_points(group=GROUP)
    plugins = [_info(entry) for entry in entries if entry.name == name]
    if not plugins:
        unknown = did_you_mean("plugin", name, sorted({entry.name for entry in entries}))
        raise NameNotFound(f"{unknown}; `hooklens plugins` lists all")
    if len(plugins) > 1:
        packages = ", ".join(plugin.package for plugin in plugins)
        raise InputError(
            f"the plugin {name!r} is declared by {len(plugins)} packages ({packages}); uninstall all but one"
        )
    return plugins[0]


def _info(entry: EntryPoint) -> PluginInfo:
    package = entry.dist.name if entry.dist else entry.module.partition(".")[0]
    info = PluginInfo(entry.name, entry.module, package, summary="")
    if entry.attr:
        return replace(info, error=f"its entry point {entry.value!r} names an object; it must name a module")
    try:
        lines = (inspect.getdoc(info.load()) or "").splitlines()
    except Unavailable as error:
        cause = error.__cause__
        return replace(info, error=f"{type(cause).__name__}: {cause}")
    return replace(info, summary=lines[0] if lines else "")

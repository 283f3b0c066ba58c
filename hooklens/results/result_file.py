"""Results on disk: one safetensors file with its structure as JSON metadata; classes are looked up among plugins."""

import contextlib
import importlib.metadata
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor

from hooklens.core.envelope import Schema, read_envelope, write_envelope
from hooklens.core.errors import FileRefused, InputError, Unavailable, WrongType
from hooklens.core.files import reading
from hooklens.results import GROUP

_SCHEMA = Schema("hooklens.result", 1, "a result", "Result.save")


@dataclass(frozen=True, eq=False)
class Kept:
    """An object that a file stores as a whole: a dataclass that is found again by module and name, such as `Result`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _CLASSES[cls.__module__, cls.__qualname__] = cls


_CLASSES: dict[tuple[str, str], type[Kept]] = {}


def known_classes() -> Mapping[tuple[str, str], type[Kept]]:
    """All such classes defined so far, by module and qualified name, for matching with a file."""
    return _CLASSES


def write_result(result: Kept, path: str | os.PathLike) -> None:
    """Write `result` to `path`; see `Result.save`."""
    packed = _Packer()
    write_envelope(path, _SCHEMA, packed.node(result, type(result).__name__), packed.tensors)


def read_result(path: str | os.PathLike) -> Kept:
    """Read what `write_result` wrote; see `Result.load`."""
    file = read_envelope(path, _SCHEMA)
    tensors, used = dict(file.tensors()), set[str]()
    with reading(path, _SCHEMA.what):
        result = _unpack(file.content, tensors, used)
    if not isinstance(result, Kept) or used != set(tensors):
        raise FileRefused(
            f"cannot load a result from {str(path)!r}: its tensors do not match its structure; save it again with "
            "Result.save"
        )
    return result


@dataclass
class _Packer:
    """Converts a value to JSON and collects its tensors under the names "0", "1", ..."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # id of a tensor -> its name: stored once if seen twice
    kept: list[Tensor] = field(default_factory=list)  # keeps those ids from being reused
    plugins: dict[type[Kept], tuple[str, str]] = field(default_factory=dict)  # found once for each class

    def node(self, value: Any, where: str) -> Any:
        match value:
            case None | bool():
                return value
            case str():
                return str(value)
            case int():
                return int(value)
            case float():
                return float(value) if math.isfinite(value) else {"float": _spelled(float(value))}
            case Tensor():
                return self._tensor(value, where)
            case Kept():
                return self._result(value, where)
            case list():
                return self._items(value, where)
            case tuple():
                return {"tuple": self._items(value, where)}
            case dict():
                return {"dict": [self._items(pair, f"{where}[{pair[0]!r}]") for pair in value.items()]}
        if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a NumPy number
            return self.node(value.item(), where)
        raise WrongType(
            f"{where} is a {type(value).__name__}, which a result file cannot store; use tensors, numbers, strings, "
            "booleans, None, results, metrics of hooklens, or lists, tuples and dicts of these"
        )

    def _items(self, value: list | tuple, where: str) -> list:
        return [self.node(item, f"{where}[{index}]") for index, item in enumerate(value)]

    def _result(self, value: Kept, where: str) -> dict:
        cls = type(value)
        if cls not in self.plugins:
            self.plugins[cls] = _plugin_of(cls)
        plugin, package = self.plugins[cls]
        stored = {f.name: self.node(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value) if f.init}
        names = {"plugin": plugin, "package": package, "module": cls.__module__}
        return {"result": names | {"class": cls.__qualname__, "fields": stored}}

    def _tensor(self, value: Tensor, where: str) -> dict:
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise WrongType(f"{where} is a {value.layout} tensor on {value.device}; store a dense copy of it")
        if id(value) not in self.names:
            self.names[id(value)] = str(len(self.tensors))
            self.kept.append(value)
            dense = value.detach().resolve_conj().resolve_neg()
            dense = torch.view_as_real(dense) if dense.is_complex() else dense
            # a copy: two views of one memory cannot both be stored, and a view may have gaps
            self.tensors[self.names[id(value)]] = dense.to("cpu", copy=True).contiguous()
        return {"complex" if value.is_complex() else "tensor": self.names[id(value)]}


def _unpack(node: Any, tensors: dict[str, Tensor], used: set[str]) -> Any:
    """Rebuild the value given to `_Packer.node`. A malformed node raises any error; the caller reports it."""
    if isinstance(node, list):
        return [_unpack(item, tensors, used) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, held),) = node.items()
    if kind in ("tensor", "complex"):
        used.add(held)
        return torch.view_as_complex(tensors[held]) if kind == "complex" else tensors[held]
    if kind == "float":
        return float(held)
    if kind == "tuple":
        return tuple(_unpack(held, tensors, used))
    if kind == "dict":
        return dict(_unpack(held, tensors, used))
    if kind == "result":
        cls = _class_named(*(str(held[key]) for key in ("plugin", "module", "class", "package")))
        return _build(cls, {name: _unpack(item, tensors, used) for name, item in held["fields"].items()})
    raise ValueError(f"unknown kind {kind!r}")


def _build(cls: type[Kept], values: dict[str, Any]) -> Kept:
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls) if f.init}
    missing = [name for name, required in known.items() if required and name not in values]
    extra = sorted(set(values) - set(known))
    if missing or extra:
        raise FileRefused(
            f"cannot load a {cls.__name__}: the file lacks the fields {missing} and has {extra}, which this "
            "version does not know; load it with the version that saved it"
        )
    try:
        return cls(**values)
    except Exception as error:  # its own checks (shapes, ranges) may raise anything
        raise FileRefused(
            f"cannot load a {cls.__name__}: its values were not accepted ({error}); save it again"
        ) from error


def _plugin_of(cls: type[Kept]) -> tuple[str, str]:
    """The registered plugin in which `cls` will be found again, and the package that provides it.

    hooklens's own modules outside plugins/ count as a plugin named "hooklens", which needs no entry point.
    """
    entries = _entries()
    exports = [entry for entry in entries if getattr(sys.modules.get(entry.module), cls.__name__, None) is cls]
    around = [entry for entry in entries if _within(cls.__module__, _package(entry))]
    for entry in exports + sorted(around, key=lambda entry: -len(_package(entry))):
        with contextlib.suppress(Unavailable):  # a broken other plugin must not prevent saving
            if _lookup(entry, cls.__module__, cls.__qualname__) is cls:
                return entry.name, entry.dist.name if entry.dist else entry.module.partition(".")[0]
    if _within(cls.__module__, "hooklens") and _known("hooklens", cls.__module__, cls.__qualname__) is cls:
        return "hooklens", "hooklens"
    raise InputError(
        f"a {cls.__qualname__} cannot be saved: its module {cls.__module__!r} is not part of a registered plugin, so "
        f"nothing could load it; declare the module as an entry point of the group {GROUP!r} in its package's "
        "metadata and install that, or use to_json()"
    )


def _class_named(plugin: str, module: str, name: str, package: str) -> type[Kept]:
    """The Result subclass `name` of a registered plugin; only the plugin's own declared module is imported."""
    entries = [entry for entry in _entries() if entry.name == plugin]
    if plugin == "hooklens" and (ours := _known("hooklens", module, name)) is not None:
        return ours
    for entry in entries:
        if (cls := _lookup(entry, module, name)) is not None:
            return cls
    # The package's name comes from the file and becomes part of a command that people copy.
    package = package if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", package) else "(unreadable name)"
    if entries or plugin == "hooklens":
        raise Unavailable(
            f"the file contains a {name!r} of the plugin {plugin!r}, which is installed but has no such result; "
            f"install the version of {package} that saved the file"
        )
    known = sorted({entry.name for entry in _entries()})
    raise Unavailable(
        f"the file contains a {name!r} of the plugin {plugin!r}, which is not installed (installed: "
        f"{', '.join(known) or 'none'}); the file says that it comes with the package {package}: if you trust that, "
        f"pip install {package}"
    )


def _lookup(entry: EntryPoint, module_name: str, name: str) -> type[Kept] | None:
    """The class among the exports of the plugin's module, or among the classes that its package defined."""
    try:
        module = entry.load()
    except Exception as error:
        raise Unavailable(
            f"cannot load the plugin {entry.name!r}: importing {entry.value!r} raised "
            f"{type(error).__name__}: {error}; repair or uninstall that package"
        ) from error
    exported = vars(module).get(name)
    if isinstance(exported, type) and issubclass(exported, Kept):
        return exported
    return _known(_package(entry), module_name, name)


def _known(package: str, module: str, name: str) -> type[Kept] | None:
    """An already defined Result subclass inside `package`; the module only distinguishes classes of one name."""
    classes = {at: cls for (at, known), cls in _CLASSES.items() if known == name and _within(at, package)}
    return classes.get(module) or (next(iter(classes.values())) if len(classes) == 1 else None)


def _entries() -> list[EntryPoint]:
    return [entry for entry in importlib.metadata.entry_points(group=GROUP) if not entry.attr]


def _package(entry: EntryPoint) -> str:
    """The package of a plugin's classes: the folder of its module, or the module itself if it has no folder."""
    if hasattr(sys.modules.get(entry.module), "__path__"):
        return entry.module
    return entry.module.rpartition(".")[0] or entry.module


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _spelled(value: float) -> str:
    """An infinity or NaN in words that float() reads back, including the sign of a NaN, which str() drops."""
    return ("-" if math.copysign(1, value) < 0 else "") + str(abs(value))

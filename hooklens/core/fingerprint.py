"""A hash of a value and of everything that it refers to: is this value the same as in an earlier run?

A function is hashed by its code, defaults, closure and the globals that it reaches, a class by its attributes, and an
object by its whole state. Installed code (the standard library, site-packages, hooklens) is hashed by name and version.
A value that cannot be read raises an error: a hash that omits something could be the same for two different values.
"""

import builtins
import copyreg
import dis
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hooklens.core.errors import InputError

Part = tuple[str, Any]
_ATOMS = (type(None), bool, int, float, complex, str, type(...), type(NotImplemented), range, torch.dtype)
_RAW = (bytes, bytearray, memoryview)
_NAMED = (
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
#: Functions that read names which their caller does not mention, or data outside the program.
_UNSEEN = ("eval", "exec", "globals", "__import__", "open", "input")
#: Attributes of classes that say nothing about what its objects do.
_ASIDE = {
    *("__doc__", "__module__", "__qualname__", "__dict__", "__weakref__", "__slots__", "__firstlineno__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__orig_bases__", "__parameters__"),
    *("__abstractmethods__", "_abc_impl"),
}
#: Attributes of code that decide what it does, unlike its file and line numbers.
_CODE = (
    *("co_code", "co_exceptiontable", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags"),
)
_HEAP, _IMMUTABLE = 1 << 9, 1 << 8  # CPython's flags of classes
_POINTER = 8


def identity(value: Any, name: str = "the value") -> str:
    """Hash a value and everything that it refers to; the hash is the same in every process.

    >>> def scaled(by: float):
    ...     return lambda x: x * by
    >>> identity(scaled(2.0)) == identity(scaled(2.0)), identity(scaled(2.0)) == identity(scaled(3.0))
    (True, False)

    A value that refers to something unreadable (a file, a lock, a generator) raises an error that names it.
    """
    try:
        return _Walk().digest(value, name).hex()
    except RecursionError as error:
        raise InputError(f"{name} is nested too deeply to be compared between runs") from error


class _Walk:
    """Hashes each value once; a value that contains itself is hashed there by its depth."""

    def __init__(self) -> None:
        self.known: dict[int, bytes] = {}
        self.under_way: dict[int, int] = {}
        self.kept: list[Any] = []  # hashed values stay alive, so that no other value gets the id of one

    def digest(self, value: Any, where: str) -> bytes:
        if isinstance(value, _RAW):
            return _hashed(type(value).__name__.encode(), value)
        if type(value) in _ATOMS:
            return _hashed(type(value).__name__.encode(), repr(value).encode("utf-8", "surrogatepass"))
        if id(value) in self.known:
            return self.known[id(value)]
        if id(value) in self.under_way:
            return _hashed(b"itself", str(self.under_way[id(value)]).encode())
        self.under_way[id(value)] = len(self.under_way)
        total = hashlib.blake2b(_kind_of(value).encode(), digest_size=16)
        for label, part in _parts(value, where):
            total.update(_hashed(label.encode("utf-8", "surrogatepass"), self.digest(part, f"{where}.{label}")))
        del self.under_way[id(value)]
        self.kept.append(value)
        self.known[id(value)] = total.digest()
        return total.digest()


def _hashed(kind: bytes, content: bytes | bytearray | memoryview) -> bytes:
    total = hashlib.blake2b(len(kind).to_bytes(8, "little") + kind, digest_size=16)
    total.update(content)
    return total.digest()


def _kind_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _parts(value: Any, where: str) -> Iterable[Part]:
    """The named parts that distinguish a value from others of its class."""
    for kinds, parts in _KINDS.items():
        if isinstance(value, kinds):
            return parts(value, where)
    return _object(value, where)


def _attributes(*names: str) -> Callable[[Any, str], Iterable[Part]]:
    """The parts of a value that some of its attributes describe completely."""
    return lambda value, where: [(name, getattr(value, name)) for name in names]


def _refused(where: str, what: str) -> InputError:
    return InputError(f"{where} is {what}, which cannot be compared between runs")


# -- data


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a dense tensor, in the order of its values.

    A tensor of one value is contiguous with any stride, such as that of the column it is a view of, and `view` refuses
    all strides but 1.
    """
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def _tensor(value: Tensor, where: str) -> Iterator[Part]:
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise _refused(where, f"a {value.layout} tensor on {value.device}")
    yield "dtype", value.dtype
    yield "shape", tuple(value.shape)
    yield "data", raw_bytes(value)
    if vars(value):
        yield "attributes", vars(value)


def _array(value: Any, where: str) -> Iterator[Part]:
    yield "dtype", repr(value.dtype.descr)
    yield "shape", tuple(value.shape)
    yield "data", value.tolist() if value.dtype.hasobject else value.tobytes()
    yield from _state(value)


def _set(value: Any, where: str) -> Iterator[Part]:
    # Each element is hashed alone: the order of a set differs between processes.
    yield "elements", sorted(_Walk().digest(element, where) for element in value)
    yield from _own(value)


def _dict(value: Mapping, where: str) -> Iterator[Part]:
    for number, (key, item) in enumerate(value.items()):
        yield f"key {number}", key
        yield f"[{key!r:.40}]", item
    yield from _own(value)


def _list(value: Iterable, where: str) -> Iterator[Part]:
    for number, item in enumerate(value):
        yield f"[{number}]", item
    yield from _own(value)


def _own(value: Any) -> Iterator[Part]:
    """The class and state of a container whose class is not built in."""
    if type(value).__module__ not in ("builtins", "collections"):
        yield "class", type(value)
        yield from _state(value)


def _module(value: types.ModuleType, where: str) -> Iterator[Part]:
    """Name and version of an installed module; everything in any other module."""
    if _is_installed(value.__name__):
        return iter([("installed", _version(value.__name__))])
    return ((name, item) for name, item in sorted(vars(value).items()) if not name.startswith("__"))


def _torch_module(value: nn.Module, where: str) -> Iterator[Part]:
    """Parameters, buffers, submodules and attributes; torch's hooks without their ids, which vary by process."""
    yield "class", type(value)
    for name, item in _state(value):
        if name.startswith(("_forward", "_backward", "_state_dict", "_load_state", "_is_full", "_non_persistent")):
            item = list(item.values()) if name in ("_forward_hooks", "_forward_pre_hooks") else None
        yield name, item


def _object(value: Any, where: str) -> Iterator[Part]:
    """Any other object: its class, attributes and slots, and the additional state of classes written in C."""
    yield "class", type(value)
    for base in (str, int, float, complex):
        if isinstance(value, base):
            yield "content", base.__repr__(value)
            break
    else:
        if _hides_state(type(value)):
            yield "content", _reduced(value, where)
    yield from _state(value)


def _state(value: Any) -> Iterator[Part]:
    """Attributes and slots by name, without those that an installed class leaves out of copies."""
    cls = type(value)
    held: dict[str, Any] = {}
    for base in cls.__mro__:
        for name, slot in vars(base).items():
            # Names with double underscores hold addresses.
            if isinstance(slot, types.MemberDescriptorType) and not name.startswith("__") and hasattr(value, name):
                held[f"{base.__qualname__}.{name}"] = slot.__get__(value)
    attributes = getattr(value, "__dict__", {})
    giver = next((base for base in cls.__mro__ if "__getstate__" in vars(base) and base is not object), None)
    if giver is not None and _is_installed(giver.__module__):
        given = value.__getstate__()
        attributes = given if isinstance(given, dict) else {"state": given}
    for name, item in attributes.items():
        if not isinstance(_static(cls, name), functools.cached_property):  # derived from the rest
            held[str(name)] = item
    return iter(sorted(held.items()))


def _static(cls: type, name: Any) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _hides_state(cls: type) -> bool:
    """Whether its objects hold more than attributes and slots, as those of classes written in C do."""
    for base in cls.__mro__[:-1]:
        if not base.__flags__ & _HEAP or base.__flags__ & _IMMUTABLE:
            return True
    slots = sum(isinstance(item, types.MemberDescriptorType) for base in cls.__mro__ for item in vars(base).values())
    return cls.__basicsize__ > object.__basicsize__ + _POINTER * (slots + 2)  # and a dict, and weak references


def _reduced(value: Any, where: str) -> Any:
    """The parts from which pickling would make a copy."""
    reducer = copyreg.dispatch_table.get(type(value))
    getattr(value, "__dict__", None)  # the first access creates an empty one, which pickling distinguishes from none
    try:
        reduced = value.__reduce_ex__(2) if reducer is None else reducer(value)
    except Exception as error:
        raise _refused(where, f"a {_kind_of(value)}") from error
    if isinstance(reduced, str):
        return (getattr(value, "__module__", ""), reduced)
    parts = [list(part) if isinstance(part, Iterator) else part for part in reduced]
    return tuple(parts)


# -- code


def _function(value: types.FunctionType, where: str) -> Iterator[Part]:
    # The module of its globals: functools.wraps gives a function the __module__ of the function that it wraps.
    installed = _is_installed(str(value.__globals__.get("__name__")))
    if installed and _named(value):
        yield "installed", (value.__module__, value.__qualname__, _version(value.__module__))
        return
    yield "code", value.__code__
    yield "defaults", (value.__defaults__, value.__kwdefaults__)
    yield from zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    yield "attributes", {name: item for name, item in vars(value).items() if name != "__wrapped__"}
    if not installed:
        yield from _reached(value, where)


def _cell(value: types.CellType, where: str) -> Iterator[Part]:
    try:
        yield "content", value.cell_contents
    except ValueError:  # still empty
        yield "empty", None


def _by_name(value: Any, where: str) -> Iterator[Part]:
    """Functions and descriptors written in C: their name and owner."""
    yield "name", value.__qualname__
    owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
    yield "owner", owner if owner is not None else getattr(value, "__module__", None)


def _class(value: type, where: str) -> Iterator[Part]:
    if _is_installed(value.__module__) and _named(value):
        yield "installed", (value.__module__, value.__qualname__, _version(value.__module__))
        return
    yield "name", value.__qualname__
    yield "bases", value.__bases__
    yield "metaclass", type(value)
    for name, item in sorted(vars(value).items()):
        if name not in _ASIDE:
            yield name, item


def _reached(function: types.FunctionType, where: str) -> Iterator[Part]:
    """The globals that a function's code mentions; for a module, only the attributes that the code takes from it."""
    for path in sorted(set(_mentioned(function.__code__, function.__globals__))):
        name, *attributes = path
        if name in function.__globals__:
            value = function.__globals__[name]
        elif name.startswith("import "):
            value = _imported(name.removeprefix("import "))
        elif hasattr(builtins, name):
            if name in _UNSEEN:
                raise InputError(f"{where} calls {name}(), whose result cannot be compared between runs")
            continue
        else:
            continue
        taken = [name]
        while attributes and isinstance(value, types.ModuleType) and hasattr(value, attributes[0]):
            owner, value = value, getattr(value, attributes[0])
            taken.append(attributes.pop(0))
            plain = not isinstance(value, types.ModuleType | types.FunctionType | type)
            if plain and callable(value) and _is_installed(owner.__name__):
                value = (owner.__name__, taken[-1], _version(owner.__name__))
        yield ".".join(taken), value


def _mentioned(code: types.CodeType, scope: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every global name in the code and in nested functions, each with the attributes taken from it."""
    path: list[str] = []
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    for number, step in enumerate(steps):
        if path and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path.append(step.argval)
            continue
        if path:
            yield tuple(path)
        path = [step.argval] if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else []
        if step.opname == "IMPORT_NAME":
            level = steps[number - 2].argval or 0
            yield ("import " + importlib.util.resolve_name("." * level + step.argval, scope.get("__package__")),)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _mentioned(constant, scope)


def _imported(name: str) -> Any:
    """A module that a function imports when it is called."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# -- installed code


def _named(value: Any) -> bool:
    """Whether its module has this object under its name, so that the name identifies it."""
    held: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        held = getattr(held, name, None)
    return held is value


@functools.cache
def _is_installed(module: str) -> bool:
    """Whether the module belongs to Python, site-packages or hooklens."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module) or sys.modules.get(top), "__file__", None)
    if top == "hooklens":
        return True
    if file is None:
        return top in sys.stdlib_module_names or top in sys.builtin_module_names
    place = Path(file).resolve()
    return bool({"site-packages", "dist-packages"} & set(place.parts)) or place.is_relative_to(_STANDARD)


@functools.cache
def _version(module: str) -> str:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return ".".join(map(str, sys.version_info[:3]))
    try:
        return str(getattr(sys.modules.get(top), "__version__", None) or metadata.version(top))
    except metadata.PackageNotFoundError:
        return ""


_STANDARD = Path(os.__file__).resolve().parent
_KINDS: dict[Any, Any] = {
    Tensor: _tensor,
    (np.ndarray, np.generic): _array,
    (set, frozenset): _set,
    (dict, types.MappingProxyType): _dict,
    (list, tuple, deque): _list,
    types.ModuleType: _module,
    nn.Module: _torch_module,
    types.FunctionType: _function,
    types.CodeType: _attributes(*_CODE),
    types.CellType: _cell,
    types.MethodType: _attributes("__func__", "__self__"),
    _NAMED: _by_name,
    property: _attributes("fget", "fset", "fdel"),
    (staticmethod, classmethod, functools._lru_cache_wrapper): _attributes("__wrapped__"),
    functools.cached_property: _attributes("func"),
    logging.Logger: _attributes("name"),
    type: _class,
}

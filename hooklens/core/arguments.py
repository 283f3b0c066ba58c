"""Checks of arguments that many methods share: numbers, seeds, paths."""

import inspect
import math
import os
import random
from collections.abc import Iterable, Mapping
from functools import partial
from hashlib import blake2b
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from hooklens.core.errors import ArgumentError, InputError, WrongType

_SEEDS = range(-(2**63), 2**64)  # the range of torch's generator


def whole(name: str, value: Any, least: int = 0) -> int:
    """Return a whole number of at least `least`; True and 1.0 are refused.

    >>> whole("k", 1.5)
    Traceback (most recent call last):
    ...
    hooklens.core.errors.ArgumentError: k is a whole number of at least 0, got 1.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ArgumentError("{" + name + "} is a whole number of at least {0}, got {1}", least, f"{value!r:.80}")
    return int(value)


def real(name: str, value: Any, least: float = -math.inf) -> float:
    """Return a finite number of at least `least`.

    >>> real("alpha", 2)
    2.0
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < least:
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ArgumentError("{" + name + "} is a finite number{0}, got {1}", bound, f"{value!r:.80}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return True or False; what merely counts as one of them is refused.

    >>> flag("mean", 1)
    Traceback (most recent call last):
    ...
    hooklens.core.errors.ArgumentError: mean is True or False, got 1
    """
    if not isinstance(value, bool):
        raise ArgumentError("{" + name + "} is True or False, got {0}", f"{value!r:.60}")
    return value


def several(name: str, values: Any) -> list[Any]:
    """Return the values of an argument that takes several: one alone is a list of one, and none are refused.

    >>> several("sizes", 5), several("sizes", range(2)), several("sizes", torch.tensor(3))
    ([5], [0, 1], [3])
    """
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    if isinstance(values, str | Real):
        return [values]
    listed = list(values) if isinstance(values, Iterable) and not isinstance(values, Mapping) else []
    if not listed:
        raise ArgumentError("{" + name + "} takes a list of at least one value, got {0}", f"{values!r:.80}")
    return listed


def zero_or_more(name: str, values: Any) -> list[Any]:
    """Return the values of an argument that may be left empty.

    >>> zero_or_more("dims", ()), zero_or_more("dims", 3)
    ([], [3])
    """
    return [] if isinstance(values, list | tuple) and not values else several(name, values)


def layer_number(name: str, value: Any) -> int | None:
    """Return a layer number or None; the caller checks whether the layer exists."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise WrongType(f"{name} is the number of a layer, or None; got {value!r:.80}")
    return None if value is None else int(value)


def seed_number(seed: Any) -> int:
    """Return a seed for torch's generator.

    >>> seed_number(2**70)
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: seed is a whole number from -2**63 to 2**64 - 1, got 1180591620717411303424
    """
    good = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not good or int(seed) not in _SEEDS:
        kind = InputError if good else WrongType
        raise kind(f"seed is a whole number from -2**63 to 2**64 - 1, got {seed!r:.80}")
    return int(seed)


def seeded(seed: int, nth: int = 0, *, stride: int = 1) -> torch.Generator:
    """Return a new generator. `nth` and `stride` derive several from one seed: seed * stride + nth.

    >>> torch.rand(1, generator=seeded(0)) == torch.rand(1, generator=torch.Generator().manual_seed(0))
    tensor([True])

    Numbers from 0 to 2**32 - 1 are torch's seeds. Others are hashed into this range, because torch's generator on the
    CPU reads only the last 32 bits: 0 and 2**32 would draw the same.
    """
    number = seed_number(seed) * stride + nth
    if not 0 <= number < 2**32:
        number = int.from_bytes(blake2b(str(number).encode(), digest_size=4).digest(), "big")
    return torch.Generator().manual_seed(number)


def python_draws(seed: int) -> random.Random:
    """Return a new generator of Python's. `random.Random` alone gives a seed and its negative the same numbers.

    >>> python_draws(3).random() == random.Random(3).random(), python_draws(-3).random() == random.Random(3).random()
    (True, False)
    """
    number = seed_number(seed)
    return random.Random(number if number >= 0 else str(number))


def path_of(value: Any, name: str = "path") -> Path:
    """Return the path of a string or path object.

    >>> path_of(3, "resume")
    Traceback (most recent call last):
    ...
    hooklens.core.errors.WrongType: resume is the path of a file or folder, a text or a pathlib.Path; got 3
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise WrongType(f"{name} is the path of a file or folder, a text or a pathlib.Path; got {value!r:.80}")
    if value == "":
        raise InputError(f"{name} is empty, so it names no file; give a path, '.' for the current folder")
    return Path(value)


def check_call(name: str, function: Any, *arguments: str) -> None:
    """Raise unless a function can be called with arguments of these names, in this order."""
    if not callable(function):
        raise ArgumentError("{" + name + "} is a function of ({0}), got {1}", ", ".join(arguments), f"{function!r:.80}")
    bound = inspect.isroutine(function) or isinstance(function, partial)
    forward = getattr(function, "forward", None) if isinstance(function, torch.nn.Module) else None
    # an object's method itself: inspect takes the first argument of one that is static for self
    called = function if bound else forward or function.__call__
    try:
        signature = inspect.signature(called, follow_wrapped=False)  # what is called, not what it wraps
    except (TypeError, ValueError):  # some built-in functions do not say what they take
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        names, shown = ", ".join(arguments), getattr(function, "__name__", type(function).__name__)
        raise ArgumentError(
            "{" + name + "} is called as f({0}), and {1}{2} was given: {3}; give a function of ({0}), such as one that "
            "functools.partial makes",
            *(names, shown, signature, error),
        ) from error


def check_target(device: Any, dtype: Any) -> None:
    """Raise unless captured activations can be moved to this device and dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise WrongType(f"dtype is a floating-point torch.dtype of 16 bits or more, got {dtype!r:.80}")
    if device is None:
        return
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"device={device!r:.80} cannot be used here ({str(error).splitlines()[0]}); try 'cpu'"
        ) from error

"""Checks of curves that a caller gives, as tensors, arrays or lists: numbers at ascending steps."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Real
from numpy.typing import NDArray
from torch import Tensor

from hooklens.core.errors import ArgumentError

#: What a curve may be given as.
Numbers = Real[Tensor, "_point"] | NDArray | Sequence[float | int]


def given_steps(name: str, steps: Any) -> Int[Tensor, "point"]:
    """The steps of a curve: whole numbers, each larger than the one before.

    >>> given_steps("steps", [0, 10, 20])
    tensor([ 0, 10, 20])
    """
    given = _along(name, steps)
    numbers = given.long()
    if bool((given != numbers).any()) or bool((numbers.diff() <= 0).any()) or bool((numbers < 0).any()):
        raise ArgumentError("{" + name + "} holds whole numbers from 0 on in ascending order, got {0}", _shown(given))
    return numbers


def given_values(
    name: str, values: Any, steps: Int[Tensor, "point"], *, least: float = -torch.inf, most: float = torch.inf
) -> Float[Tensor, "point"]:
    """The values of a curve, a copy: one finite number for each step, from `least` to `most`.

    >>> given_values("accuracy", [0, 1], torch.tensor([0, 10]), least=0.0, most=1.0)
    tensor([0., 1.], dtype=torch.float64)
    """
    numbers = _along(name, values)
    if len(numbers) != len(steps):
        raise ArgumentError(
            "{" + name + "} has a number for each of its {0} steps, got {1}; are the arguments in order?",
            *(len(steps), len(numbers)),
        )
    wide = numbers if numbers.is_floating_point() and numbers.dtype.itemsize > 2 else numbers.double()
    if not bool((wide.isfinite() & (wide >= least) & (wide <= most + 1e-6)).all()):  # shares may exceed 1 by rounding
        bounds = "" if least == -torch.inf else f" of at least {least:g}"
        bounds += "" if most == torch.inf else f" and at most {most:g}"
        raise ArgumentError("{" + name + "} holds finite numbers{0}, got {1}", bounds, _shown(wide))
    return wide


def _along(name: str, values: Any) -> Tensor:
    """A copy of numbers along one axis."""
    try:
        numbers = torch.as_tensor(values).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            "{" + name + "} is a tensor, an array or a list of numbers, got {0}", f"{values!r:.60}"
        ) from error
    if numbers.ndim != 1 or numbers.is_complex() or numbers.dtype == torch.bool:
        raise ArgumentError(
            "{" + name + "} is a tensor, an array or a list of numbers along one axis, got {0} {1}",
            *(numbers.dtype, list(numbers.shape)),
        )
    return numbers


def _shown(numbers: Tensor) -> str:
    return f"{numbers.tolist()!r:.60}"

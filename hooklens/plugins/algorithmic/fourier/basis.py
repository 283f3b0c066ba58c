"""The Fourier basis on the numbers modulo p: transforms in one and two dimensions, and functions of the sum a + b."""

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.arguments import several, whole
from hooklens.core.errors import ArgumentError, InputError
from hooklens.core.precision import widened

Values = Float[Tensor, "p *rest"]
Table = Float[Tensor, "a b *rest"]
Frequencies = Iterable[int] | int | Shaped[Tensor, "*chosen"]


def fourier_basis(p: int, *, dtype: torch.dtype = torch.float64) -> Float[Tensor, "component p"]:
    """The constant, then cos(2 pi k n / p) and sin(2 pi k n / p) for k = 1, 2, ...: p orthonormal rows.

    Frequencies reach from 1 to p // 2. For even p the last one, p / 2, alternates between +1 and -1 and has no sine.

    >>> basis = fourier_basis(7)
    >>> bool(torch.allclose(basis @ basis.T, torch.eye(7, dtype=torch.float64), atol=1e-12))
    True

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 4.
    """
    whole("p", p, 2)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"waves need numbers with a point, such as torch.float64; got {dtype}")
    n, k = torch.arange(p), torch.arange(1, p // 2 + 1)
    angles = 2 * math.pi / p * (k[:, None] * n % p).double()  # k n is reduced first, so that large products stay exact
    waves = torch.stack([angles.cos(), angles.sin()], 1).flatten(0, 1)[: p - 1]
    rows = torch.cat([torch.ones(1, p, dtype=torch.float64), waves])
    return (rows / rows.norm(dim=1, keepdim=True)).to(dtype)


def component_names(p: int) -> list[str]:
    """The rows of `fourier_basis` in words.

    >>> component_names(5)
    ['constant', 'cos 1', 'sin 1', 'cos 2', 'sin 2']
    """
    return ["constant", *(f"{wave} {k}" for k in range(1, p // 2 + 1) for wave in ("cos", "sin"))][:p]


def component_frequencies(p: int) -> Int[Tensor, "component"]:
    """The frequency of each row of `fourier_basis`: 0, 1, 1, 2, 2, ..."""
    return (torch.arange(p) + 1) // 2


def transform(values: Values) -> Float[Tensor, "component *rest"]:
    """The coefficients of functions of n in the Fourier basis; sums of squares stay what they are.

    >>> transform(torch.ones(4, 1, dtype=torch.float64)).abs().flatten().round(decimals=3).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    if not isinstance(values, Tensor) or not values.ndim or not values.is_floating_point():
        seen = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"values are a tensor [p ...] of real numbers with a point, got {seen}")
    values = widened(values)
    return torch.tensordot(_basis_for(values, 0), values, dims=1)


def transform_2d(values: Table) -> Float[Tensor, "component_a component_b *rest"]:
    """The coefficients of functions of (a, b) in the products of two rows of the Fourier basis.

    >>> table = torch.ones(5, 5, dtype=torch.float64)
    >>> transform_2d(table)[0, 0].item(), transform_2d(table).abs().sum().item()
    (5.0..., 5.0...)
    """
    need_pairs("values", values, "[a b ...]")
    by_a = transform(values)
    return torch.tensordot(_basis_for(by_a, 1), by_a, dims=([1], [1])).movedim(0, 1)


def inverse_2d(coefficients: Float[Tensor, "component_a component_b *rest"]) -> Table:
    """The function of (a, b) that has these coefficients."""
    need_pairs("coefficients", coefficients, "[component_a component_b ...]")
    coefficients = widened(coefficients)
    basis = _basis_for(coefficients, 0).T
    by_a = torch.tensordot(basis, coefficients, dims=1)
    return torch.tensordot(basis, by_a, dims=([1], [1])).movedim(0, 1)


def frequency_power(values: Values) -> Float[Tensor, "frequency *rest"]:
    """The sum of squares in the cosine and the sine of each frequency 1, 2, ..., p // 2."""
    squares, p = transform(values).square(), len(values)
    power = squares.new_zeros((p // 2 + 1, *squares.shape[1:]))
    return power.index_add(0, component_frequencies(p).to(power.device), squares)[1:]


def frequency_power_2d(values: Table) -> Float[Tensor, "frequency *rest"]:
    """The sum of squares in the terms that have one frequency only: linear ones in a or b, and products of both.

    The eight terms of frequency k are cos k a, sin k a, cos k b, sin k b and the four products of these of a and b.
    """
    squares, p = transform_2d(values).square(), len(values)
    of = component_frequencies(p).to(squares.device)
    same = of[:, None] == of
    linear_or_product = same | (of[:, None] == 0) | (of == 0)
    frequency = torch.maximum(of[:, None], of)
    power = squares.new_zeros((p // 2 + 1, *squares.shape[2:]))
    return power.index_add(0, frequency[linear_or_product], squares[linear_or_product])[1:]


def keep_single_frequencies(values: Table, frequencies: Frequencies) -> Table:
    """The part of a function of (a, b) in the eight terms of each of these frequencies; see `frequency_power_2d`.

    >>> wave = torch.cos(2 * torch.pi / 7 * 3 * sums(7).double())
    >>> bool(torch.allclose(keep_single_frequencies(1 + wave, [3]), wave))
    True
    """
    need_pairs("values", values, "[a b ...]")
    values = widened(values)
    basis, kept = _basis_for(values, 0), torch.zeros_like(values)
    for k in _some(frequencies, len(values)):
        rows = torch.cat([basis[:1], basis[2 * k - 1 : 2 * k + 1]])
        by_a = torch.tensordot(rows, values, dims=1)
        terms = torch.tensordot(rows, by_a, dims=([1], [1])).movedim(0, 1)
        terms[0, 0] = 0.0
        by_a = torch.tensordot(rows.T, terms, dims=1)
        kept += torch.tensordot(rows.T, by_a, dims=([1], [1])).movedim(0, 1)
    return kept


def sums(p: int) -> Int[Tensor, "a b"]:
    """(a + b) mod p for every pair.

    >>> sums(3).tolist()
    [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    """
    n = torch.arange(p)
    return (n[:, None] + n) % p


def mean_by_sum(values: Table) -> Float[Tensor, "s *rest"]:
    """The mean over the p pairs that have each sum: the part of a function of (a, b) that depends on a + b only.

    >>> mean_by_sum(sums(5).double()).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    p = need_pairs("values", values, "[a b ...]")
    values = widened(values)
    means = values.new_zeros((p, *values.shape[2:]))
    return means.index_add(0, sums(p).flatten().to(values.device), values.flatten(0, 1)) / p


def need_pairs(name: str, values: Any, axes: str) -> int:
    """Return p of values over all pairs; refused unless they are real numbers, p times p, with these axes.

    >>> need_pairs("post", torch.ones(5, 4, 3), "[a b neuron]")
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: post is a tensor [a b neuron] of real numbers for all p x p pairs, got [5, 4, 3]
    """
    seen = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
    wanted = axes.strip("[]").split()
    good = isinstance(values, Tensor) and values.ndim >= 2 and values.shape[0] == values.shape[1] >= 2
    if not good or (wanted[-1] != "..." and values.ndim != len(wanted)):
        raise InputError(f"{name} is a tensor {axes} of real numbers for all p x p pairs, got {seen}")
    if not values.is_floating_point():
        raise InputError(f"{name} is a tensor {axes} of real numbers with a point, got {values.dtype}")
    return len(values)


def need_finite(name: str, values: Tensor) -> None:
    """Raise for NaN and infinity."""
    if not bool(values.isfinite().all()):
        raise InputError(f"some {name} are not finite; use a checkpoint from before training diverged")


def keep_frequencies(values: Values, frequencies: Frequencies) -> Values:
    """The part of functions of n in the cosine and sine of these frequencies, without the constant.

    >>> wave = torch.cos(2 * torch.pi / 7 * 3 * torch.arange(7).double())
    >>> bool(torch.allclose(keep_frequencies(1 + wave, [3]), wave))
    True
    """
    coefficients, p = transform(values), len(values)
    chosen = torch.isin(component_frequencies(p), torch.tensor(_some(frequencies, p), dtype=torch.long))
    chosen = chosen.to(coefficients.device)
    return torch.tensordot(_basis_for(coefficients, 0)[chosen].T, coefficients[chosen], dims=1)


def distinguished(p: int, frequencies: Iterable[int]) -> int:
    """How many of the p answers functions of these frequencies tell apart: p divided by the common divisor.

    For prime p every frequency tells all answers apart. For composite p one that shares a factor with p does not.

    >>> distinguished(113, [14]), distinguished(12, [4]), distinguished(12, [4, 3]), distinguished(12, [])
    (113, 3, 12, 1)
    """
    return p // math.gcd(p, *frequencies)


def checked_frequencies(frequencies: Any, p: int) -> list[int]:
    """The frequencies in order, each once; refused unless they are whole numbers from 1 to p // 2.

    >>> checked_frequencies([9, 2, 2], 7)
    Traceback (most recent call last):
    ...
    hooklens.core.errors.ArgumentError: frequencies are whole numbers from 1 to p // 2 = 3 for p = 7, got [9, 2, 2]
    """
    given = [f.item() if isinstance(f, Tensor) and f.ndim == 0 else f for f in several("frequencies", frequencies)]
    whole_numbers = all(isinstance(f, Integral) and not isinstance(f, bool) for f in given)
    if not whole_numbers or not all(1 <= f <= p // 2 for f in given):
        raise ArgumentError(
            "{frequencies} are whole numbers from 1 to p // 2 = {0} for p = {1}, got {2}", p // 2, p, f"{given!r:.80}"
        )
    return sorted({int(f) for f in given})


def _some(frequencies: Frequencies, p: int) -> list[int]:
    """The frequencies, which may be none."""
    given = frequencies.tolist() if isinstance(frequencies, Tensor) else frequencies
    if isinstance(given, Iterable) and not isinstance(given, str):
        given = list(given)
    return [] if given == [] else checked_frequencies(given, p)


def _basis_for(values: Tensor, dim: int) -> Float[Tensor, "component p"]:
    return fourier_basis(values.shape[dim], dtype=values.dtype).to(values.device)

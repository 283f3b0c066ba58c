"""Moments of the inputs of a regression, from which the errors of one step of gradient descent follow exactly."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import real, seeded, whole
from hooklens.core.errors import ArgumentError, InputError, WrongType
from hooklens.data.regression import InContextRegression

Matrix = Float[Tensor, "d d"]
_ROUNDING = 1e-6  # of the largest entry: moments may come from float32


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Sigma = E x x^T and K = E |x|^2 x x^T of inputs with mean 0.

    They are all that a single step depends on: S = X^T X / k of k points has E S = Sigma and
    E S^2 = (K + (k - 1) Sigma^2) / k, because pairs of different points are independent.
    """

    covariance: Matrix
    fourth: Matrix

    def __post_init__(self) -> None:
        for name in ("covariance", "fourth"):
            object.__setattr__(self, name, _symmetric(name, getattr(self, name)))
        if self.covariance.shape != self.fourth.shape:
            sizes = len(self.covariance), len(self.fourth)
            raise InputError(f"covariance and fourth are of the same coordinates, got {sizes[0]} and {sizes[1]}")
        if not float(self.covariance.trace()) > 0:
            raise InputError("the inputs have a variance of 0, so that no step learns from them; give another variance")
        if _least(self.covariance) < -_ROUNDING:
            raise InputError("a covariance has no negative eigenvalue, and this matrix has one")
        if _least(self.fourth - self.covariance @ self.covariance) < -_ROUNDING:
            raise InputError(
                "fourth is E |x|^2 x x^T, which is at least the square of the covariance; no inputs have these moments"
            )

    @property
    def d(self) -> int:
        """The number of coordinates."""
        return len(self.covariance)

    def mean_square(self, k: int) -> Matrix:
        """E S^2 for k points.

        >>> moments = uniform_moments(10)
        >>> float(moments.covariance.trace() / moments.mean_square(10).trace())     # the best step
        6.0606...
        """
        return (self.fourth + (whole("k", k, 1) - 1) * self.covariance @ self.covariance) / k


def independent_moments(d: int, variance: float, fourth: float) -> InputMoments:
    """Moments of independent coordinates with this variance and fourth moment.

    E |x|^2 x_i^2 = mu_4 + (d - 1) s^4, and E |x|^2 x_i x_j = 0 for i not j. A fourth moment is at least the square of
    the variance.
    """
    if real("fourth", fourth) < real("variance", variance, 0.0) ** 2 * (1 - _ROUNDING):
        raise ArgumentError(
            "{fourth} moments are at least the square of the {variance}, {0:g}; got {1:g}", variance**2, fourth
        )
    eye = torch.eye(whole("d", d, 1), dtype=torch.float64)
    return InputMoments(variance * eye, (fourth + (d - 1) * variance**2) * eye)


def uniform_moments(d: int) -> InputMoments:
    """Coordinates uniform on (-1/2, 1/2): variance 1/12, fourth moment 1/80."""
    return independent_moments(d, 1 / 12, 1 / 80)


def normal_moments(covariance: Matrix) -> InputMoments:
    """Normal inputs: E |x|^2 x x^T = 2 Sigma^2 + tr(Sigma) Sigma (Isserlis).

    >>> normal_moments(torch.eye(3, dtype=torch.float64)).fourth[0, 0]
    tensor(5., dtype=torch.float64)
    """
    wide = _symmetric("covariance", covariance)
    if _least(wide) < -_ROUNDING:
        raise InputError("a covariance has no negative eigenvalue, and this matrix has one")
    return InputMoments(wide, 2 * wide @ wide + wide.trace() * wide)


def _symmetric(name: str, matrix: Any) -> Matrix:
    """The matrix in float64, refused unless it is a symmetric one of finite real numbers."""
    square = isinstance(matrix, Tensor) and matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or matrix.is_complex():
        seen = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, Tensor) else f"{matrix!r:.60}"
        raise InputError(f"{name} is a symmetric matrix [d d] of real numbers, got {seen}")
    wide = matrix.detach().to(torch.float64, copy=True)  # the caller may go on changing theirs
    if not bool(wide.isfinite().all()) or float((wide - wide.mT).abs().max()) > _ROUNDING * float(wide.abs().max()):
        raise InputError(f"{name} is a symmetric matrix of finite numbers, and this one is not")
    return wide


def _least(matrix: Matrix) -> float:
    """The smallest eigenvalue over the largest entry."""
    return float(torch.linalg.eigvalsh(matrix)[0] / matrix.abs().max().clamp_min(1e-300))


def need_task(data: Any) -> None:
    """Raise for anything except generated regression.

    >>> need_task(7)
    Traceback (most recent call last):
    hooklens.core.errors.WrongType: data is hl.data.in_context_regression(...), got 7
    """
    if not isinstance(data, InContextRegression):
        raise WrongType(f"data is hl.data.in_context_regression(...), got {data!r:.80}")


def moments_of(data: InContextRegression) -> InputMoments:
    """The moments of a task's inputs."""
    need_task(data)
    if data.inputs == "uniform":
        return uniform_moments(data.d)
    return normal_moments(torch.eye(data.d, dtype=torch.float64))


def draw_spectra(data: InContextRegression, k: int, *, draws: int = 2000, seed: int = 0) -> Float[Tensor, "draw d"]:
    """Eigenvalues of S = X^T X / k for random prompts of k points, ascending, in float64."""
    need_task(data)
    generator = seeded(seed)
    shape = (whole("draws", draws, 2), whole("k", k, 1), data.d)
    if data.inputs == "uniform":
        x = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    else:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.linalg.eigvalsh(x.mT @ x / k).clamp_min(0)

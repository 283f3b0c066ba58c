"""Expected squared errors of learners: in closed form where there is one, else averaged over drawn data sets."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import several, whole
from hooklens.core.errors import InputError
from hooklens.data.regression import InContextRegression
from hooklens.plugins.algorithmic.icl.best_steps import (
    best_constant_steps,
    best_gd_plus_plus,
    best_step_schedules,
    spectral_errors,
    with_larger,
)
from hooklens.plugins.algorithmic.icl.input_moments import draw_spectra, moments_of
from hooklens.plugins.algorithmic.icl.learners import (
    Averaging,
    GradientDescent,
    Learner,
    LeastSquares,
    PreconditionedStep,
    Ridge,
    Zero,
    need_learner,
)
from hooklens.plugins.algorithmic.icl.regression_prompts import asked_length
from hooklens.results.result import Result, Table

_ERROR_DRAWS = 20_000  # data sets, each with a decomposition of a d x d matrix: a second in all


@dataclass(frozen=True, eq=False)
class ExpectedError(Result):
    """An expected squared error; `standard_error` is 0 where the value is exact."""

    learner: str
    n_points: int
    value: float
    standard_error: float
    exact: bool


def expected_error(
    learner: Learner,
    data: InContextRegression,
    *,
    n_points: int | None = None,
    draws: int = _ERROR_DRAWS,
    seed: int = 0,
) -> ExpectedError:
    """What is a learner's expected squared error on a task, with the noise of the answer at the query included?

    Exact: zero, averaging, one step, one preconditioned step; least squares without noise, and with noise for normal
    inputs. With noise it is infinite for d - 1, d and d + 1 examples of any inputs with a density. Of the others the
    error is exact given the points, and averaged over `draws` of them; within 3 of d, noisy least squares has no
    variance, so that its standard error says little.

    >>> import hooklens as hl
    >>> data = hl.data.in_context_regression(d=10, n_points=4, inputs="normal")
    >>> expected_error(LeastSquares(), data).value, expected_error(Averaging(), data).value     # d - k; d (d + 1) / k
    (6.0, 27.5)

    Reference: Hastie et al. (2022), "Surprises in high-dimensional ridgeless least squares interpolation", section 3
    (least squares, here at finite n: inverse Wishart means).
    """
    need_learner(learner)
    k = asked_length(data, n_points)
    exact = _exact(learner, data, k)
    if exact is not None:
        return ExpectedError(learner.title, k, exact, 0.0, True)
    spectra = draw_spectra(data, k, draws=draws, seed=seed)
    errors = spectral_errors(learner.gain(spectra, k), spectra, data, k)
    return ExpectedError(learner.title, k, float(errors.mean()), float(errors.std()) / math.sqrt(len(errors)), False)


def _exact(learner: Learner, data: InContextRegression, k: int) -> float | None:
    """The closed form, None where there is none."""
    moments, noise = moments_of(data), data.noise**2
    variance, d = float(moments.covariance[0, 0]), data.d
    if isinstance(learner, LeastSquares):
        return _least_squares(data, k, variance)
    single = _single_step(learner, k, d)
    if single is None:
        return None
    square = moments.mean_square(k) + noise / k * moments.covariance
    missed = moments.covariance - 2 * single @ moments.covariance @ moments.covariance
    return float(missed.trace() + (moments.covariance @ single @ square @ single.mT).trace()) + noise


def _single_step(learner: Learner, k: int, d: int) -> Float[Tensor, "d d"] | None:
    """The matrix P of learners of the form w = P X^T y / k."""
    eye = torch.eye(d, dtype=torch.float64)
    if isinstance(learner, Zero):
        return 0 * eye
    if isinstance(learner, Averaging):
        return eye / learner.variance
    if isinstance(learner, PreconditionedStep):
        learner.need_coordinates(d)
        return learner.matrix.double() * (1 if learner.mean else k)
    if isinstance(learner, GradientDescent) and len(learner.rates) == 1:
        return learner.rates[0] * (1 if learner.mean else k) * eye
    return None


def _least_squares(data: InContextRegression, k: int, variance: float) -> float | None:
    """Bias: the d - k directions that k points do not span. With noise, the mean trace of an inverse Wishart matrix."""
    bias, noise = variance * max(data.d - k, 0), data.noise**2
    if noise == 0:
        return bias
    if abs(k - data.d) <= 1:  # the density of the smallest eigenvalue at 0 is too large for a mean of its inverse
        return math.inf
    if data.inputs != "normal":
        return None
    return bias + noise * min(k, data.d) / (abs(k - data.d) - 1) + noise


@dataclass(frozen=True, eq=False)
class DepthGap(Result):
    """Errors of the best learner of each depth, and those of least squares, ridge and zero.

    `constant`: gradient descent with one rate; `schedule`: a rate for each step; `plus_plus`: GD++. A layer of linear
    attention can do one step of each. `standard_errors` are those of the three means over drawn data sets.
    """

    baselines = ("least_squares", "zero")

    depths: Int[Tensor, "depth"]
    constant: Float[Tensor, "depth"]
    schedule: Float[Tensor, "depth"]
    plus_plus: Float[Tensor, "depth"]
    standard_errors: Float[Tensor, "kind depth"]
    least_squares: float
    ridge: float | None  # without noise, least squares is the best
    zero: float
    n_points: int

    @property
    def sentence(self) -> str:
        """What the depths reach, in words."""
        deepest = int(self.depths[-1])
        parts = [f"{name} {float(values[-1]):.3g}" for name, values in self._columns().items()]
        floor = f"least squares {self.least_squares:.3g}"
        if self.ridge is not None:
            floor += f", ridge {self.ridge:.3g}"
        return (
            f"On {self.n_points} examples the error after {deepest} layer{'s' * (deepest > 1)} is {', '.join(parts)}; "
            f"{floor}; the answer 0 has {self.zero:.3g}"
        )

    def _columns(self) -> dict[str, Float[Tensor, "depth"]]:
        return {"gradient descent, one rate": self.constant, "a rate a step": self.schedule, "GD++": self.plus_plus}

    def table(self, n: int | None = None) -> Table:
        """One row a depth."""
        columns = ("depth", *self._columns(), "least squares", "zero")
        parts = (self.depths, *self._columns().values())
        rows = zip(*(part.tolist() for part in parts), strict=True)
        return Table(columns, [(*row, self.least_squares, self.zero) for row in rows]).head(n)

    def figure(self) -> Any:
        """Errors against depth, with least squares as a line."""
        from hooklens.viz.curves import lines

        marks = {"least squares": self.least_squares, "zero": self.zero}
        return lines(self._columns(), x=self.depths, x_title="depth", y_title="squared error", marks=marks, log="y")


def measure_depth_gap(
    data: InContextRegression,
    depths: int | Sequence[int] = (1, 2, 3, 4, 5, 6),
    *,
    n_points: int | None = None,
    draws: int = _ERROR_DRAWS,
    seed: int = 0,
) -> DepthGap:
    """How far are the best 1, 2, ... steps of gradient descent and GD++ from least squares?

    Rates are searched on `draws` data sets, the number of steps up to the depth is chosen on others, and the errors are
    those on a third set. A search with few draws fits the largest eigenvalue that it saw (of those, a few are enlarged
    in the search and the choice): many steps diverge above it, and fewer are then chosen, since a layer may also do
    nothing. So the errors are upper bounds of the best ones, but for sampling.

    >>> import hooklens as hl
    >>> gap = measure_depth_gap(hl.data.in_context_regression(d=3, n_points=6), (1, 2), draws=200)
    >>> gap.least_squares, bool(gap.constant[1] < gap.constant[0])
    (0.0, True)
    """
    k = asked_length(data, n_points)
    steps = [whole("depths", depth, 1) for depth in several("depths", depths)]
    if steps != sorted(set(steps)):
        raise InputError(f"depths ascend, each once; got {steps}")

    drawn: dict[str, Any] = {"draws": draws, "seed": seed}
    chosen_on, measured_on = (draw_spectra(data, k, draws=max(draws, _ERROR_DRAWS), seed=seed + n) for n in (1, 2))
    chosen_on = with_larger(chosen_on)

    def errors(learner: Learner, spectra: Float[Tensor, "draw d"]) -> Float[Tensor, "draw"]:
        return spectral_errors(learner.gain(spectra, k), spectra, data, k)

    searched: list[Sequence[Learner]] = [
        best_step_schedules(data, k, steps[-1], **drawn),
        best_gd_plus_plus(data, k, steps[-1], **drawn),
    ]
    kept = [_chosen(learners, lambda learner: float(errors(learner, chosen_on).mean())) for learners in searched]
    curves: list[list[Learner]] = [[best_constant_steps(data, k, depth, **drawn) for depth in steps]]
    curves += [[learners[depth - 1] for depth in steps] for learners in kept]
    measured = torch.stack([torch.stack([errors(learner, measured_on) for learner in curve]) for curve in curves])
    constant, schedule, plus_plus = measured.mean(-1)

    def reference(learner: Learner) -> float:
        return expected_error(learner, data, n_points=k, draws=draws, seed=seed).value

    return DepthGap(
        depths=torch.tensor(steps),
        constant=constant,
        schedule=schedule,
        plus_plus=plus_plus,
        standard_errors=measured.std(-1) / math.sqrt(len(measured_on)),
        least_squares=reference(LeastSquares()),
        ridge=reference(Ridge(data.noise**2)) if data.noise > 0 else None,
        zero=reference(Zero()),
        n_points=k,
    )


def _chosen(learners: Sequence[Learner], error: Callable[[Learner], float]) -> list[Learner]:
    """For each depth the learner of smallest error among those of at most that depth."""
    errors = [error(learner) for learner in learners]
    return [learners[min(range(depth), key=errors.__getitem__)] for depth in range(1, len(learners) + 1)]

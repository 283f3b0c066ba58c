"""Learners to compare a model with: gradient descent, GD++, least squares, ridge, averaging, nothing.

Each maps the examples of a prompt to weights w, and answers w x at the query.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import flag, real, several
from hooklens.core.errors import InputError, WrongType
from hooklens.plugins.algorithmic.icl.regression_prompts import (
    Answers,
    PerTask,
    Points,
    Queries,
    RegressionPrompts,
    need_examples,
    need_prompts,
)

Eigenvalues = Float[Tensor, "*draw d"]
Numbers = Any  # one number or several are taken; a tuple of floats after __post_init__


@dataclass(frozen=True)
class Learner:
    """A rule from examples to weights.

    With S = X^T X / k and b = X^T y / k, every learner here except `PreconditionedStep` is w = g(S) b for a function g
    of the eigenvalues of S: its `gain`. Its weights are computed as published; that they equal g(S) b is tested.
    """

    @property
    def title(self) -> str:
        """What the learner is, for tables."""
        return type(self).__name__

    def weights(self, points: Points, answers: Answers) -> Queries:
        """The weights after the examples."""
        raise InputError(f"{type(self).__name__} defines no weights(points, answers)")

    def gain(self, eigenvalues: Eigenvalues, k: int) -> Eigenvalues:
        """g at these eigenvalues of S, for k points."""
        raise InputError(f"{type(self).__name__} is not a function of S alone, so it has no gain")

    def predict(self, prompts: RegressionPrompts) -> PerTask:
        """The answers at the queries."""
        need_prompts(prompts)
        return (self.weights(prompts.points, prompts.answers) * prompts.query).sum(-1)


def need_learners(learners: Any) -> list[Learner]:
    """The learners of a list, or the one that is given alone; anything else raises.

    >>> need_learners(LeastSquares())
    [LeastSquares()]
    """
    given = list(learners) if isinstance(learners, list | tuple) else [learners]
    return [need_learner(learner) for learner in given]


def need_learner(learner: Any) -> Learner:
    """The learner; anything else raises."""
    if not isinstance(learner, Learner):
        seen = type(learner).__name__ + "; give its learner()" * hasattr(learner, "learner")
        raise WrongType(f"learners are those of hl.icl, such as LeastSquares(); got {seen}")
    return learner


@dataclass(frozen=True)
class Zero(Learner):
    """The answer 0, whatever the examples: the best answer without them."""

    title = "zero"

    def weights(self, points: Points, answers: Answers) -> Queries:
        need_examples(points, answers=answers)
        return torch.zeros_like(points[:, 0])

    def gain(self, eigenvalues: Eigenvalues, k: int) -> Eigenvalues:
        return torch.zeros_like(eigenvalues)


@dataclass(frozen=True)
class Averaging(Learner):
    """w = mean of x_i y_i, over the variance of the inputs (Garg et al. 2022, `AveragingModel`: variance 1)."""

    variance: float = 1.0
    title = "averaging"

    def __post_init__(self) -> None:
        if real("variance", self.variance, 0.0) == 0:
            raise InputError("averaging divides by the variance of the inputs, which is above 0; got 0")

    def weights(self, points: Points, answers: Answers) -> Queries:
        need_examples(points, answers=answers)
        return (answers[..., None] * points).mean(1) / self.variance

    def gain(self, eigenvalues: Eigenvalues, k: int) -> Eigenvalues:
        return torch.full_like(eigenvalues, 1 / self.variance)


@dataclass(frozen=True)
class GradientDescent(Learner):
    """Steps from w = 0 on sum (w x_i - y_i)^2 / 2, over k if `mean`; one rate a step.

    >>> points, answers = torch.ones(1, 4, 1), torch.full((1, 4), 3.0)
    >>> GradientDescent((0.5, 0.5)).weights(points, answers)       # 3/2, then half of what is left
    tensor([[2.2500]])

    Reference: von Oswald et al. (2023), "Transformers learn in-context by gradient descent", equations 2
    (the loss, over 2 k: `mean`) and 3 (the step).
    """

    rates: Numbers
    mean: bool = True

    def __post_init__(self) -> None:
        _settle(self, "rates")
        flag("mean", self.mean)

    @property
    def title(self) -> str:
        n = len(self.rates)
        steps = "one step of gradient descent" if n == 1 else f"{n} steps of gradient descent"
        return steps if self.mean else f"{steps}, summed"

    def weights(self, points: Points, answers: Answers) -> Queries:
        need_examples(points, answers=answers)
        share = 1 / points.shape[1] if self.mean else 1.0
        w = torch.zeros_like(points[:, 0])
        for rate in self.rates:
            residual = answers - torch.einsum("tpd,td->tp", points, w)
            w = w + rate * share * torch.einsum("tpd,tp->td", points, residual)
        return w

    def gain(self, eigenvalues: Eigenvalues, k: int) -> Eigenvalues:
        steps = torch.tensor(self.rates, dtype=eigenvalues.dtype) * (1 if self.mean else k)
        return descent_gain(eigenvalues, steps, torch.zeros_like(steps))


@dataclass(frozen=True)
class GDPlusPlus(Learner):
    """GD++: each step also transforms all points, x <- (I - gamma X^T X) x, the query among them, from the old points.

    Sums over the points are divided by k if `mean`. With gammas of 0 it equals `GradientDescent`.

    Reference: von Oswald et al. (2023), section 3, "Multiple steps of gradient descent vs. multiple layers of
    self-attention", and appendix A.10. There the rate alone is divided by k, and X^T X is not: with its eta and gamma
    the learner is GDPlusPlus(eta, k * gamma), or GDPlusPlus(eta / k, gamma, mean=False).
    """

    rates: Numbers
    gammas: Numbers
    mean: bool = True

    def __post_init__(self) -> None:
        _settle(self, "rates")
        _settle(self, "gammas")
        flag("mean", self.mean)
        if len(self.rates) != len(self.gammas):
            raise InputError(f"GD++ needs as many gammas as rates, got {len(self.gammas)} and {len(self.rates)}")

    @property
    def title(self) -> str:
        return f"GD++, {len(self.rates)} step{'s' * (len(self.rates) > 1)}" + ", summed" * (not self.mean)

    def weights(self, points: Points, answers: Answers) -> Queries:
        need_examples(points, answers=answers)
        share, d = 1 / points.shape[1] if self.mean else 1.0, points.shape[2]
        w, x, y = torch.zeros_like(points[:, 0]), points, answers
        moved = torch.eye(d, dtype=points.dtype, device=points.device).expand(len(points), d, d)  # times query: by now
        for rate, gamma in zip(self.rates, self.gammas, strict=True):
            step = rate * share * torch.einsum("tpd,tp->td", x, y)
            w = w + (step[:, None] @ moved)[:, 0]
            curvature = gamma * share * x.mT @ x
            y = y - torch.einsum("tpd,td->tp", x, step)
            x, moved = x - x @ curvature, moved - curvature @ moved
        return w

    def gain(self, eigenvalues: Eigenvalues, k: int) -> Eigenvalues:
        rates, gammas = torch.tensor([self.rates, self.gammas], dtype=eigenvalues.dtype) * (1 if self.mean else k)
        return descent_gain(eigenvalues, rates, gammas)


@dataclass(frozen=True, eq=False)
class PreconditionedStep(Learner):
    """One step with a matrix in place of the rate: w = P X^T y, over k if `mean`.

    Reference: Ahn et al. (2023), "Transformers learn to implement preconditioned gradient descent for in-context
    learning", theorem 1; Zhang et al. (2023), "Trained transformers learn linear models in-context", theorem 4.1.
    """

    matrix: Float[Tensor, "d d"]
    mean: bool = True

    def __post_init__(self) -> None:
        flag("mean", self.mean)
        shape = list(self.matrix.shape) if isinstance(self.matrix, Tensor) else type(self.matrix).__name__
        if not isinstance(self.matrix, Tensor) or self.matrix.ndim != 2 or shape[0] != shape[1]:
            raise InputError(f"the matrix of a preconditioned step is a tensor [d d]; got {shape}")
        if not self.matrix.is_floating_point() or not bool(self.matrix.isfinite().all()):
            raise InputError("the matrix of a preconditioned step holds finite numbers with a point, and this does not")
        object.__setattr__(self, "matrix", self.matrix.clone())  # the caller may go on changing theirs

    @property
    def title(self) -> str:
        return "one preconditioned step" + ", summed" * (not self.mean)

    def weights(self, points: Points, answers: Answers) -> Queries:
        need_examples(points, answers=answers)
        self.need_coordinates(points.shape[2])
        share = 1 / points.shape[1] if self.mean else 1.0
        return share * torch.einsum("tpd,tp->td", points, answers) @ self.matrix.to(points).mT

    def need_coordinates(self, d: int) -> None:
        """Raise unless the matrix is for points of `d` coordinates."""
        if len(self.matrix) != d:
            raise InputError(f"the matrix is for points of {len(self.matrix)} coordinates, and these have {d}")


@dataclass(frozen=True)
class LeastSquares(Learner):
    """The weights of smallest norm among those of smallest squared error: X^+ y."""

    title = "least squares"

    def weights(self, points: Points, answers: Answers) -> Queries:
        need_examples(points, answers=answers)
        x, y = _widened(points, answers)
        return (torch.linalg.pinv(x) @ y[..., None])[..., 0].to(points)

    def gain(self, eigenvalues: Eigenvalues, k: int) -> Eigenvalues:
        smallest = eigenvalues.amax(-1, keepdim=True) * eigenvalues.shape[-1] * torch.finfo(eigenvalues.dtype).eps
        return torch.where(eigenvalues > smallest, 1 / eigenvalues, 0.0)


@dataclass(frozen=True)
class Ridge(Learner):
    """w = (X^T X + penalty I)^-1 X^T y.

    With weights from N(0, I) and noise of variance s^2, the penalty s^2 gives the posterior mean, which has the
    smallest expected squared error of all learners.
    """

    penalty: float
    title = "ridge"

    def __post_init__(self) -> None:
        if real("penalty", self.penalty, 0.0) == 0:
            raise InputError("ridge needs a penalty above 0, got 0; use LeastSquares() without one")

    def weights(self, points: Points, answers: Answers) -> Queries:
        need_examples(points, answers=answers)
        x, y = _widened(points, answers)
        eye = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
        return torch.linalg.solve(x.mT @ x + self.penalty * eye, torch.einsum("tpd,tp->td", x, y)).to(points)

    def gain(self, eigenvalues: Eigenvalues, k: int) -> Eigenvalues:
        return 1 / (eigenvalues + self.penalty / k)


def descent_gain(eigenvalues: Eigenvalues, rates: Float[Tensor, "step"], gammas: Float[Tensor, "step"]) -> Eigenvalues:
    """The gain of GD++ (gammas 0: of gradient descent) with mean-normalised steps; differentiable in both.

    In an eigenvector of S, points are scaled by a and the answers that are left by r, from a = r = 1. A step adds
    rate a^2 r to the gain, and takes r (1 - rate a^2 s) and a (1 - gamma a^2 s).
    """
    gain, a, r = torch.zeros_like(eigenvalues), torch.ones_like(eigenvalues), torch.ones_like(eigenvalues)
    for rate, gamma in zip(rates, gammas, strict=True):
        strength = a.square()
        gain = gain + rate * strength * r
        r = r * (1 - rate * strength * eigenvalues)
        a = a * (1 - gamma * strength * eigenvalues)
    return gain


def _widened(points: Points, answers: Answers) -> tuple[Points, Answers]:
    """The examples in float32 at least: torch solves nothing in 16 bits."""
    wide = torch.promote_types(points.dtype, torch.float32)
    return points.to(wide), answers.to(wide)


def _settle(learner: Learner, name: str) -> None:
    """Make a field a tuple of finite numbers: one number alone is a single step."""
    values = tuple(real(name, value) for value in several(name, getattr(learner, name)))
    object.__setattr__(learner, name, values)

"""The best rates of gradient descent: a step in closed form, also for a mixture of lengths; several steps by search."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import flag, real, several, whole, zero_or_more
from hooklens.core.errors import InputError, WrongType
from hooklens.core.gradients import need_gradients
from hooklens.data.regression import InContextRegression
from hooklens.plugins.algorithmic.icl.input_moments import InputMoments, Matrix, draw_spectra
from hooklens.plugins.algorithmic.icl.learners import GDPlusPlus, GradientDescent, PreconditionedStep, descent_gain
from hooklens.results.result import Result, Table

# Data sets, each with a decomposition of a d x d matrix. With fewer, rates of several steps fit the largest eigenvalue
# that was drawn and diverge above it.
_SPECTRA_DRAWS = 20_000  # a second in 10 dimensions
_SEARCH = 60  # iterations of L-BFGS
# Copies of data sets with larger eigenvalues: few enough to cost a search little, and as large as later draws can be.
_COPIED, _LARGER = 5000, (1.15,)

Lengths = int | Sequence[int]
PerLength = Float[Tensor, "length"]
Spectra = list[tuple[int, Float[Tensor, "draw d"]]]  # lengths with eigenvalues of drawn data sets
Steps = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class BestStep(Result):
    """One step of gradient descent, the same for all lengths, beside the best step for each length.

    Errors are expected squared errors of the answer at the query, its noise included. `mean` says whether the sum over
    examples is divided by their number; a model with unnormalised attention at a fixed length can learn either.
    """

    terms = {
        "excess": "how far the shared step's error lies above the best step's at that length, as a share of it",
        "zero": "the error of the answer 0",
    }

    lengths: Int[Tensor, "length"]
    probabilities: PerLength
    rate: float
    mean: bool
    errors: PerLength
    own_rates: PerLength
    own_errors: PerLength
    zero: float

    @property
    def error(self) -> float:
        """The error of the shared step, averaged over the mixture."""
        return float(self.probabilities @ self.errors)

    @property
    def excess(self) -> PerLength:
        """How far the shared step is above the best one at each length, as a share."""
        return (self.errors / self.own_errors - 1).clamp_min(0)  # below it by rounding alone

    @property
    def mean_excess(self) -> float:
        """How far the mean error of the shared step is above that of the best steps, as a share."""
        return max(self.error / float(self.probabilities @ self.own_errors) - 1, 0.0)

    def learner(self) -> GradientDescent:
        """The step as a learner."""
        return GradientDescent((self.rate,), self.mean)

    def own_learner(self, length: int) -> GradientDescent:
        """The best step for one of the lengths."""
        at = (self.lengths == length).nonzero()
        if not len(at):
            raise InputError(f"length {length} is not among the lengths of this result: {self.lengths.tolist()}")
        return GradientDescent((float(self.own_rates[at[0, 0]]),), self.mean)

    def table(self, n: int | None = None) -> Table:
        """One row a length."""
        columns = ("examples", "probability", "error", "best step's", "excess", "best rate", "zero")
        parts = (self.lengths, self.probabilities, self.errors, self.own_errors, self.excess, self.own_rates)
        rows = [(*row, self.zero) for row in zip(*(part.tolist() for part in parts), strict=True)]
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """Errors against the number of examples."""
        from hooklens.viz.curves import lines

        values = {"one step for all lengths": self.errors, "best step for each length": self.own_errors}
        marks = {"zero": self.zero}
        return lines(values, x=self.lengths, x_title="examples", y_title="squared error", marks=marks)


def best_step(
    moments: InputMoments,
    lengths: Lengths,
    *,
    probabilities: float | Sequence[float] | None = None,
    noise: float = 0.0,
    mean: bool = True,
) -> BestStep:
    """Which single rate has the smallest expected error over prompts of these lengths, and what does sharing it cost?

    For w from N(0, I) the error of the rate eta at k examples is

        tr Sigma - 2 eta E tr(Sigma S) + eta^2 (E tr(Sigma S^2) + noise^2 tr(Sigma^2) / k) + noise^2,

    with k S in place of S if the sum is not divided (`mean=False`). The best eta is the ratio of the weighted sums of
    the two coefficients. Lengths are equally probable unless `probabilities` are given.

    >>> from hooklens.plugins.algorithmic.icl.input_moments import uniform_moments
    >>> at_ten = best_step(uniform_moments(10), 10)
    >>> round(at_ten.rate, 4), round(at_ten.error / 2, 5), round(at_ten.zero / 2, 5)
    (6.0606, 0.20623, 0.41667)

    Reference: von Oswald et al. (2023), section 3 and appendix A.6, search the rate on 10,000 tasks; the closed form is
    derived above.
    """
    _need_moments(moments, noise, mean)
    ks, weights = _mixture(lengths, probabilities)
    linear, square = (torch.stack(terms) for terms in zip(*(_terms(moments, k, noise, mean) for k in ks), strict=True))
    linear, square = ((moments.covariance @ term).diagonal(dim1=-2, dim2=-1).sum(-1) for term in (linear, square))
    zero = float(moments.covariance.trace()) + noise**2
    rate = (weights @ linear) / (weights @ square)
    own = linear / square
    return BestStep(
        lengths=torch.tensor(ks),
        probabilities=weights,
        rate=float(rate),
        mean=mean,
        errors=zero - 2 * rate * linear + rate**2 * square,
        own_rates=own,
        own_errors=zero - linear * own,
        zero=zero,
    )


def best_preconditioner(
    moments: InputMoments,
    lengths: Lengths,
    *,
    probabilities: float | Sequence[float] | None = None,
    noise: float = 0.0,
    mean: bool = True,
) -> PreconditionedStep:
    """The matrix P of the best single step w = P b: (sum p E S) (sum p (E S^2 + noise^2 Sigma / k))^-1.

    For normal inputs and one length it equals ((1 + 1/k) Sigma + tr(Sigma) / k I)^-1 without noise. For independent
    coordinates with equal moments it equals `best_step`'s rate times I.

    Reference: Ahn et al. (2023), theorem 1; Zhang et al. (2023), theorem 4.1 (noise and mixtures are derived here).
    """
    _need_moments(moments, noise, mean)
    ks, weights = _mixture(lengths, probabilities)
    linear, square = (torch.stack(terms) for terms in zip(*(_terms(moments, k, noise, mean) for k in ks), strict=True))
    summed = (torch.einsum("k,kij->ij", weights, term) for term in (square, linear))
    try:
        return PreconditionedStep(torch.linalg.solve(*summed).mT, mean)
    except torch.linalg.LinAlgError as error:
        raise InputError(
            "these inputs lie in fewer dimensions than they have coordinates, so that the best matrix is not unique; "
            "leave out the coordinates without a variance of their own"
        ) from error


def best_constant_steps(
    data: InContextRegression, lengths: Lengths, depth: int, *, draws: int = _SPECTRA_DRAWS, seed: int = 0
) -> GradientDescent:
    """`depth` steps of gradient descent with one rate: the best rate for the mean error over drawn data sets.

    The error of every data set is exact given its S (weights and noise are averaged in closed form); its mean over S is
    estimated, on drawn data sets and a few with larger eigenvalues: see `with_larger`.
    """
    spectra = _drawn(data, lengths, draws, seed)
    shared = torch.ones(whole("depth", depth, 1), 1, dtype=torch.float64)
    (rate,) = _searched(data, spectra, lambda p: (shared @ p, 0 * (shared @ p)), _gentle(data, spectra)[:1])
    return GradientDescent((rate,) * depth)


def best_step_schedules(
    data: InContextRegression, lengths: Lengths, depth: int, *, draws: int = _SPECTRA_DRAWS, seed: int = 0
) -> list[GradientDescent]:
    """1, 2, ... `depth` steps of gradient descent with a rate of its own each, as layers of a model can have.

    Each search starts at the best rates of the previous depth, so that no depth is worse than one before on the drawn
    data sets.
    """
    spectra, learners = _drawn(data, lengths, draws, seed), list[GradientDescent]()
    start = _gentle(data, spectra)[:1]
    for _ in range(whole("depth", depth, 1)):
        rates = _searched(data, spectra, lambda p: (p, torch.zeros_like(p)), start)
        learners.append(GradientDescent(rates))
        start = torch.tensor([*rates, 0.0], dtype=torch.float64)
    return learners


def best_gd_plus_plus(
    data: InContextRegression,
    lengths: Lengths,
    depth: int,
    *,
    draws: int = _SPECTRA_DRAWS,
    larger: float | Sequence[float] = _LARGER,
    seed: int = 0,
) -> list[GDPlusPlus]:
    """1, 2, ... `depth` steps of GD++ with rates and gammas of their own.

    Searched in the same way; von Oswald et al. (2023), section 3 and appendix A.12, tune a rate and a gamma for each
    layer, too. The loss has several minima, so the error found is an upper bound of the best one. `larger` are the
    factors of `with_larger`: further ones keep steps from diverging on rarer data sets, and make the search harder.
    """
    factors = [real("larger", factor, 1.0) for factor in zero_or_more("larger", larger)]
    spectra, learners = _drawn(data, lengths, draws, seed, larger=factors), list[GDPlusPlus]()
    start = _gentle(data, spectra)
    for _ in range(whole("depth", depth, 1)):
        parameters = torch.tensor(_searched(data, spectra, lambda p: tuple(p.chunk(2)), start), dtype=torch.float64)
        rates, gammas = parameters.chunk(2)
        learners.append(GDPlusPlus(tuple(rates.tolist()), tuple(gammas.tolist())))
        start = torch.cat([rates, rates[:1] * 0, gammas, rates[:1] * 0])
    return learners


def spectral_errors(
    gain: Float[Tensor, "draw d"], eigenvalues: Float[Tensor, "draw d"], data: InContextRegression, k: int
) -> Float[Tensor, "draw"]:
    """Expected squared errors given S, for w = g(S) b: s^2 (sum (1 - g s)^2 + noise^2 / k sum g^2 s) + noise^2.

    Weights, query, its noise and that of the examples are averaged out; the inputs have the covariance s^2 I.
    """
    variance = 1 / 12 if data.inputs == "uniform" else 1.0
    missed = (1 - gain * eigenvalues).square()
    return variance * (missed + data.noise**2 / k * gain.square() * eigenvalues).sum(-1) + data.noise**2


def with_larger(spectra: Float[Tensor, "draw d"], factors: Sequence[float] = _LARGER) -> Float[Tensor, "more d"]:
    """The data sets, and copies of one in `_COPIED` of them, those with the largest eigenvalues, with larger ones.

    Data sets that are drawn later exceed those drawn so far. Rates that fit the drawn ones alone diverge there, since
    the gain of n steps is a polynomial in the eigenvalues of degree n - 1, and of GD++ of degree (3^n - 3) / 2. There
    is a copy for each of the factors.

    >>> with_larger(torch.tensor([[1.0, 2.0], [0.5, 4.0]]))[2:]
    tensor([[0.5750, 4.6000]])
    """
    largest = spectra[spectra.amax(1).topk(-(-len(spectra) // _COPIED)).indices]
    return torch.cat([spectra, *(factor * largest for factor in factors)])


def _need_moments(moments: Any, noise: float, mean: bool) -> None:
    flag("mean", mean)
    real("noise", noise, 0.0)
    if not isinstance(moments, InputMoments):
        raise WrongType(f"moments are those of the inputs, hl.icl.moments_of(data); got {moments!r:.60}")


def _mixture(lengths: Lengths, probabilities: float | Sequence[float] | None) -> tuple[list[int], PerLength]:
    ks = [whole("lengths", k, 1) for k in several("lengths", lengths)]
    given = [1.0] * len(ks) if probabilities is None else several("probabilities", probabilities)
    given = [real("probabilities", p, 0.0) for p in given]
    if len(given) != len(ks) or sum(given) == 0:
        raise InputError(f"{len(ks)} lengths need as many probabilities, not all 0; got {given}")
    weights = torch.tensor(given, dtype=torch.float64)
    return ks, weights / weights.sum()


def _terms(moments: InputMoments, k: int, noise: float, mean: bool) -> tuple[Matrix, Matrix]:
    """E S and E S^2 with noise, for S summed or averaged over k examples."""
    size = 1 if mean else k
    linear, square = moments.covariance, moments.mean_square(k) + noise**2 / k * moments.covariance
    return size * linear, size**2 * square


def _drawn(
    data: InContextRegression, lengths: Lengths, draws: int, seed: int, *, larger: Sequence[float] = _LARGER
) -> Spectra:
    need_gradients("a search of rates")
    ks, _ = _mixture(lengths, None)
    return [(k, with_larger(draw_spectra(data, k, draws=draws, seed=seed), larger)) for k in ks]


def _gentle(data: InContextRegression, spectra: Spectra) -> Float[Tensor, "parameter"]:
    """A rate at which no drawn data set diverges, and a gamma of 0."""
    return torch.tensor([1 / max(float(s.amax()) for _, s in spectra), 0.0], dtype=torch.float64)


def _searched(
    data: InContextRegression, spectra: Spectra, steps: Steps, start: Float[Tensor, "parameter"]
) -> tuple[float, ...]:
    """The parameters of the smallest mean error over drawn spectra; `steps` maps them to rates and gammas."""
    variance = 1 / 12 if data.inputs == "uniform" else 1.0
    parameters = (start * variance).requires_grad_()  # in units of the variance, all are near 1
    search = torch.optim.LBFGS([parameters], max_iter=_SEARCH, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    lowest, best = math.inf, parameters.detach().clone()

    def closure() -> Tensor:
        nonlocal lowest, best
        rates, gammas = (part / variance for part in steps(parameters))
        errors = [spectral_errors(descent_gain(s, rates, gammas), s, data, k).mean() for k, s in spectra]
        value = torch.stack(errors).mean()
        (parameters.grad,) = torch.autograd.grad(value, parameters)
        if float(value.detach()) < lowest:  # the search itself may end where a step diverges, at NaN
            lowest, best = float(value.detach()), parameters.detach().clone()
        return value

    with torch.enable_grad():
        search.step(closure)
    return tuple((best / variance).tolist())

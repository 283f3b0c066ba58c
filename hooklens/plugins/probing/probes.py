"""Linear probes from an activation to a class, fitted in four ways on top of scikit-learn."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from hooklens.core.arguments import real
from hooklens.core.errors import Absent, InputError, KeepsPropertyErrors, WrongType
from hooklens.core.terminal import visible

_TINY = 1e-10  # directions with a smaller share of the largest variance are rounding error
_TOLERANCE = 1e-5  # largest remaining change of the logits, for rows of typical norm
_STEPS = 1000

Rows = Float[Tensor, "train r"]
Labels = Int[Tensor, "draw train"]
Logits = Float[Tensor, "draw test n_class"]


class Weights(NamedTuple):
    """A fitted probe in the units of the activation: the weights that read, and the step that writes.

    `weight` [class d] and `bias` [class] give the logits. `step` [class d] is the displacement that raises a class's
    logit most per unit length, with length measured as in the fit: after standardising, or after whitening.
    """

    weight: np.ndarray
    bias: np.ndarray
    step: np.ndarray

    def logits(self, x: np.ndarray) -> np.ndarray:
        """The logits [row class] of rows [row d]."""
        return x @ self.weight.T + self.bias


class Probe(KeepsPropertyErrors, nn.Module):
    """A fitted probe: the logits of its classes are linear in the activation at `point`, in the activation's units.

    >>> probe = Probe(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.zeros(2), torch.tensor([[0.0, 0.0], [6.0, 8.0]]))
    >>> probe.direction.tolist(), probe.gap                # unit vector from class 0 to class 1, distance of the means
    ([0.60..., 0.80...], 10.0)
    >>> probe.predict(torch.tensor([[1.0, 1.0], [-1.0, 0.0]])).tolist()
    [1, 0]

    `means` are the class means of the training examples. The softmax of the logits gives probabilities.

    `weight` reads and `step` writes (see `Weights`). Without scaling (`MassMean`) the two are the same. With
    standardised features, a feature with large variance has a small weight even if the class changes it strongly.

    Reference: Haufe et al. (2014), "On the interpretation of weight vectors of linear models in multivariate
    neuroimaging", on filters and patterns.
    """

    def __init__(
        self,
        weight: Float[Tensor, "n_class d"],
        bias: Float[Tensor, "n_class"],
        means: Float[Tensor, "n_class d"],
        *,
        step: Float[Tensor, "n_class d"] | None = None,
        classes: list[str] | None = None,
        point: str | None = None,
    ):
        super().__init__()
        step = weight if step is None else step
        shapes = [list(x.shape) for x in (weight, means, step)]
        if weight.ndim != 2 or shapes[1:] != shapes[:1] * 2 or bias.shape != weight.shape[:1]:
            raise InputError(
                f"weight, means and step are [n_class d] and bias is [n_class], got {shapes} and {list(bias.shape)}"
            )
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.means: Tensor
        self.step: Tensor
        self.register_buffer("means", means.clone())
        self.register_buffer("step", step.clone())
        self.classes = [str(i) for i in range(len(bias))] if classes is None else list(classes)
        self.point = point

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n_class"]:
        """The logits of the classes."""
        return self._read(x) @ self.weight.T + self.bias

    def predict(self, x: Float[Tensor, "*batch d"]) -> Int[Tensor, "*batch"]:
        """The class of each activation."""
        return self(x).argmax(-1)

    @property
    def direction(self) -> Float[Tensor, "d"]:
        """The unit vector along which an activation moves from class 0 to class 1; defined for two classes only."""
        return self._across(self.step)

    @property
    def normal(self) -> Float[Tensor, "d"]:
        """The unit vector orthogonal to the boundary between the two classes: what the probe reads."""
        return self._across(self.weight.detach())

    def _across(self, rows: Float[Tensor, "n_class d"]) -> Float[Tensor, "d"]:
        if len(self.bias) != 2:
            raise Absent(
                f"a direction needs two classes; this probe has {len(self.bias)} ({self.classes}); fit a probe on two "
                "of them"
            )
        across = rows[1] - rows[0]
        if not bool(across.any()):
            raise Absent(
                "the two classes of this probe do not differ, so it has no direction; fit it on other examples"
            )
        return across / across.norm()

    def coordinate(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The probe's reading in units of the activation: a step of length 1 along `direction` adds 1.

            >>> both = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> Probe(both, torch.zeros(2), both).coordinate(torch.tensor([[3.0, 4.0], [4.0, -3.0]])).tolist()
        [5.0, 0.0]
        """
        normal = self.normal
        return self._read(x) @ normal / (normal @ self.direction)

    def _read(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The activations in the probe's dtype; another width raises."""
        if x.shape[-1:] != self.weight.shape[1:]:
            raise InputError(
                f"this probe reads vectors of size {self.weight.shape[1]} at {self.point}, got {list(x.shape)}; give "
                "activations of the point that it was trained on"
            )
        return x.to(self.weight)

    @property
    def gap(self) -> float:
        """The distance between the two class means by `coordinate`."""
        here = self.coordinate(self.means)
        return float(here[1] - here[0])

    @property
    def middle(self) -> float:
        """The coordinate midway between the two class means."""
        return float(self.coordinate(self.means).mean())

    def extra_repr(self) -> str:
        return f"{visible(' | '.join(self.classes))} at {self.point}, d={self.weight.shape[1]}"


@runtime_checkable
class ProbeKind(Protocol):
    """A way to fit a linear probe: rows and classes in, weights in the units of the rows out.

    A kind that also has `said_of_many` (see `FitsMany`) gets shuffled labels for every point and every choice; a
    kind that only has `fit` gets fewer.
    """

    def fit(self, x: np.ndarray, y: np.ndarray, n_classes: int) -> Weights: ...


@runtime_checkable
class FitsMany(Protocol):
    """A kind of probe that predicts for many labellings at once, faster than one fit at a time."""

    def said_of_many(self, x: np.ndarray, labels: Labels, asked: np.ndarray, n_classes: int) -> Logits: ...


def kind_name(kind: ProbeKind) -> str:
    """The name of a kind of probe; anything else raises.

    >>> kind_name(Ridge())
    'ridge'
    """
    if isinstance(kind, type) or not isinstance(kind, ProbeKind):
        raise WrongType(f"kind is a kind of probe such as Logistic(), Ridge() or MassMean(), got {kind!r:.80}")
    return getattr(kind, "name", type(kind).__name__)


@dataclass(frozen=True)
class Logistic:
    """Logistic regression with an L2 penalty on standardised features; a smaller `c` is a stronger penalty.

    The features are standardised with the mean and deviation of the training rows, and the weights are returned in the
    units of the activation.

    Reference: Alain and Bengio (2016), "Understanding intermediate layers using linear classifier probes".
    """

    c: float = 0.01
    name = "logistic"

    def __post_init__(self) -> None:
        real("c", self.c, least=1e-12)

    def said_of_many(self, x: np.ndarray, labels: Labels, asked: np.ndarray, n_classes: int) -> Logits:
        return logistic_logits(x, labels, asked, n_classes, self.c)

    def fit(self, x: np.ndarray, y: np.ndarray, n_classes: int) -> Weights:
        from sklearn.linear_model import LogisticRegression

        return _standardised(LogisticRegression(C=self.c, max_iter=10_000, tol=1e-6), x, y)


@dataclass(frozen=True)
class Ridge:
    """Least squares on +-1 targets with an L2 penalty `alpha` on standardised features."""

    alpha: float = 100.0
    name = "ridge"

    def __post_init__(self) -> None:
        real("alpha", self.alpha, least=0.0)

    def said_of_many(self, x: np.ndarray, labels: Labels, asked: np.ndarray, n_classes: int) -> Logits:
        rows, other, size = principal(x, asked)
        target = 2 * one_column(labels, n_classes) - 1  # draw train column
        read = (other / (size + self.alpha)) @ rows.T  # test train: one factorisation for all labellings
        middle = target.mean(1, keepdim=True)
        return column_per_class(torch.einsum("mn,dnk->dmk", read, target - middle) + middle)

    def fit(self, x: np.ndarray, y: np.ndarray, n_classes: int) -> Weights:
        from sklearn.linear_model import RidgeClassifier

        return _standardised(RidgeClassifier(alpha=self.alpha), x, y)


@dataclass(frozen=True)
class MassMean:
    """The nearest class mean: for two classes the direction is the difference of their means, in activation units.

    Nothing is standardised. This ignores how features covary. Steering along this direction changes a model's output
    more often than steering along the best separating direction.

    Reference: Marks and Tegmark (2023), "The Geometry of Truth", mass-mean probing.
    """

    name = "mass-mean"

    def said_of_many(self, x: np.ndarray, labels: Labels, asked: np.ndarray, n_classes: int) -> Logits:
        rows, other = (torch.from_numpy(part - x.mean(0)) for part in (x, asked))
        of_class = one_hot(labels, n_classes).to(rows).transpose(1, 2)
        means = of_class @ rows / of_class.sum(2, keepdim=True).clamp_min(1)  # draw class d
        return torch.einsum("mi,dki->dmk", other, means) - means.square().sum(2)[:, None] / 2

    def fit(self, x: np.ndarray, y: np.ndarray, n_classes: int) -> Weights:
        middle = x.mean(0)
        means = class_means(x - middle, y, n_classes)
        return _moved(means, -(means**2).sum(1) / 2, middle, step=means)


@dataclass(frozen=True)
class WhitenedMassMean:
    """The nearest class mean after whitening within classes: Fisher's discriminant with shrunk covariance.

    Reference: Marks and Tegmark (2023), "The Geometry of Truth", mass-mean probing of i.i.d. data;
    Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices".
    """

    name = "whitened mass-mean"

    def fit(self, x: np.ndarray, y: np.ndarray, n_classes: int) -> Weights:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        middle = x.mean(0)
        equal = np.full(n_classes, 1 / n_classes)
        fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=equal).fit(x - middle, y)
        # the steepest step after whitening: covariance times weights, which are covariance^-1 times means
        return _moved(*_per_class(fitted), middle, step=fitted.means_)


#: The kinds of probe by name.
PROBES: dict[str, Any] = {kind.name: kind for kind in (Logistic(), Ridge(), MassMean(), WhitenedMassMean())}


def class_means(x: np.ndarray, y: np.ndarray, n_classes: int) -> np.ndarray:
    """The mean row of each class.

    >>> class_means(np.array([[1.0], [3.0], [5.0]]), np.array([0, 0, 1]), 2).tolist()
    [[2.0], [5.0]]
    """
    return np.stack([x[y == i].mean(0) for i in range(n_classes)])


def _standardised(estimator: Any, x: np.ndarray, y: np.ndarray) -> Weights:
    """Fit on standardised rows: w (x - m) / s + b is (w / s) x + b - (w / s) m, and a step w becomes s w."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    weight, bias = _per_class(estimator.fit(scaler.transform(x), y))
    return _moved(weight / scaler.scale_, bias, scaler.mean_, step=weight * scaler.scale_)


def _per_class(estimator: Any) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn stores one row for two classes; here each class has a row, and their difference is that row."""
    weight, bias = np.atleast_2d(estimator.coef_), np.atleast_1d(estimator.intercept_)
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def _moved(weight: np.ndarray, bias: np.ndarray, origin: np.ndarray, *, step: np.ndarray) -> Weights:
    """Convert weights for shifted rows to weights for the original rows."""
    return Weights(weight, bias - weight @ origin, step)


# -- many labellings of the same rows: computations that depend only on the rows are shared


def principal(x: np.ndarray, asked: np.ndarray) -> tuple[Rows, Float[Tensor, "test r"], Float[Tensor, "r"]]:
    """Standardise rows, and scale others alike; return both in the coordinates of the principal directions.

    >>> rows, other, size = principal(np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([[4.0, 1.0]]))
    >>> rows.abs().flatten().tolist(), other.abs().flatten().tolist(), size.tolist()
    ([1.0, 1.0], [3.0], [2.0])

    A penalty on the norm of the weights is unchanged in these coordinates, and there are at most as many as rows.
    `size` is the sum of squares along each.
    """
    spread = x.std(0)
    spread[spread <= 10 * np.finfo(np.float64).eps * np.abs(x).max(0, initial=0.0)] = 1.0  # as StandardScaler does
    rows, other = (torch.from_numpy((part - x.mean(0)) / spread) for part in (x, asked))
    wide = rows.shape[0] < rows.shape[1]
    size, basis = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = size > _TINY * size[-1:].clamp_min(_TINY)
    size, basis = size[kept], basis[:, kept]
    if wide:
        return basis * size.sqrt(), other @ (rows.T @ (basis / size.sqrt())), size
    return rows @ basis, other @ basis, size


def logistic_logits(x: np.ndarray, labels: Labels, asked: np.ndarray, n_classes: int, c: float) -> Logits:
    """Predictions of logistic regression with an L2 penalty, optimised for all labellings together.

    In principal coordinates the Hessian of the loss is bounded by a diagonal that does not depend on the labels (a
    quarter of the sum of squares, half for several classes). Accelerated steps preconditioned by this diagonal need no
    line search and no factorisation.

    Reference: Böhning and Lindsay (1988), "Monotonicity of quadratic-approximation algorithms"; O'Donoghue and Candès
    (2015), "Adaptive restart for accelerated gradient schemes".
    """
    rows, other, size = principal(x, asked)
    target = one_column(labels, n_classes).permute(1, 0, 2)  # train draw column
    n, bound = len(rows), 0.25 if n_classes == 2 else 0.5
    # the intercept, a column of ones orthogonal to the others, is not penalised
    rows, other = (torch.cat([part, part.new_ones(len(part), 1)], 1) for part in (rows, other))
    penalty = torch.cat([size.new_full((len(size),), 1 / c), size.new_zeros(1)])[:, None]
    curvature = penalty + bound * torch.cat([size, size.new_tensor([float(n)])])[:, None]
    weight = ahead = rows.new_zeros(rows.shape[1], target[0].numel())
    momentum = rows.new_ones(weight.shape[1])
    # the penalty bounds the curvature from below: a gradient g leaves a weight at most c g from its optimum
    moves = torch.cat([c * (size / n).sqrt(), size.new_tensor([1 / n])])[:, None]
    for step in range(_STEPS):
        logits = (rows @ ahead).view_as(target)
        prob = logits.sigmoid() if n_classes == 2 else logits.softmax(2)
        gradient = rows.T @ (prob - target).flatten(1) + penalty * ahead
        if step % 5 == 4 and float((gradient.abs() * moves).max()) <= _TOLERANCE:
            break
        new = ahead - gradient / curvature
        moved = new - weight
        uphill = (gradient * moved).sum(0) > 0  # restart the labellings that overshot
        following = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        ahead = new + torch.where(uphill, 0.0, (momentum - 1) / following) * moved
        weight, momentum = new, following
    return column_per_class((other @ ahead).view(len(other), *target.shape[1:]).transpose(0, 1))


def one_column(labels: Labels, n_classes: int) -> Float[Tensor, "draw train column"]:
    """Indicator of the class: one column for two classes, as in scikit-learn, else one column per class."""
    return labels[..., None].double() if n_classes == 2 else one_hot(labels, n_classes).double()


def column_per_class(margin: Float[Tensor, "draw test column"]) -> Logits:
    """Logits from indicator columns: half the margin for and against, if there is a single column."""
    return torch.cat([-margin, margin], 2) / 2 if margin.shape[2] == 1 else margin

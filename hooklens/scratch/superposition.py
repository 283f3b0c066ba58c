"""A toy in which more features than neurons share them, and measures that say how much is shared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import real, seeded, whole
from hooklens.core.errors import ArgumentError, InputError, did_you_mean
from hooklens.results.result import Result
from hooklens.results.table import Table
from hooklens.scratch.descent import Trainer
from hooklens.scratch.layers import Layer, ReLU, Rows, Sequential, check_rows
from hooklens.training.optimizers import Adam

Responses = Float[Tensor, "neuron feature"]
_HIDDEN = ("linear", "relu")
_BATCH = 256  # rows of fresh data in every step


class TiedAutoencoder(Layer):
    """x' = ReLU(h W + b) with h = x W^T, or ReLU(x W^T): features are stored in fewer hidden dimensions and read back.

    Column i of W is the direction in which feature i is stored. With `hidden="linear"` the hidden dimensions are
    directions of a space, and any rotation of them is as good (the ReLU output model). With `hidden="relu"` they are
    neurons: a nonlinearity acts on each of them, so that it matters which features share one.

    W is used twice, so that dL/dW has two terms: with G = dL/dx' where x' > 0 and H = dL/d(x W^T), it is
    h^T G + H^T x. dL/db is the sum of the rows of G.

    Reference: Elhage et al. (2022), "Toy models of superposition", "The ReLU output model" and "Superposition in a
    privileged basis".
    """

    def __init__(self, n_features: int, n_hidden: int, *, hidden: Literal["linear", "relu"] = "linear", seed: int = 0):
        super().__init__()
        whole("n_features", n_features, 1)
        whole("n_hidden", n_hidden, 1)
        if hidden not in _HIDDEN:
            raise did_you_mean("kind of hidden layer", hidden, _HIDDEN)
        self.hidden: Layer = ReLU() if hidden == "relu" else Sequential()  # no layers at all: the identity
        W = torch.randn(n_hidden, n_features, generator=seeded(seed), dtype=torch.float64) / math.sqrt(n_hidden)
        self.parameters = {"W": W, "b": torch.zeros(n_features, dtype=torch.float64)}

    def compute(self, x: Rows) -> Rows:
        W, b = self.parameters["W"], self.parameters["b"]
        check_rows(f"a TiedAutoencoder of {len(b)} features", x, len(b), W.dtype)
        self._stored = self.hidden.forward(x @ W.T)
        self._read = self._stored @ W + b
        return self._read.clamp_min(0)

    def pull_back(self, x: Rows, grad: Rows) -> Rows:
        W = self.parameters["W"]
        G = grad * (self._read > 0)
        H = self.hidden.backward(G @ W.T)
        self.gradients = {"W": self._stored.T @ G + H.T @ x, "b": G.sum(0)}
        return H @ W

    def responses(self) -> Responses:
        """What each hidden neuron does when one feature alone is 1."""
        W = self.parameters["W"]
        return self.hidden.forward(torch.eye(W.shape[1], dtype=W.dtype) @ W.T).T


def feature_dimensions(directions: Float[Tensor, "hidden feature"]) -> Float[Tensor, "feature"]:
    """Which share of a hidden dimension does each feature have? D_i = |W_i|^2 / sum_j (w_i . W_j)^2, w_i = W_i / |W_i|.

    >>> feature_dimensions(torch.tensor([[1.0, -1.0]]))            # an antipodal pair
    tensor([0.5000, 0.5000])

    1 for a feature that shares its direction with no other, 2/5 for each of five in a regular pentagon, 0 for a feature
    that is not stored. They add up to at most the number of hidden dimensions.

    Reference: Elhage et al. (2022), "Toy models of superposition", "The geometry of superposition"; the same number is
    the capacity of Scherlis et al. (2022), "Polysemanticity and capacity in neural networks", equation 2.
    """
    overlaps = directions.T @ directions
    return _ratio(overlaps.diagonal().square(), overlaps.square().sum(1))


def features_per_neuron(responses: Responses) -> Float[Tensor, "neuron"]:
    """How many features does each neuron respond to? The participation ratio (sum_i r_i^2)^2 / sum_i r_i^4.

    >>> features_per_neuron(torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    tensor([1., 2., 0.])

    1 for a neuron of a single feature, k for one that responds equally to k, 0 for a dead one; weaker responses count
    as parts of a feature. It depends on the basis, so that it means something only where the hidden dimensions are
    neurons, that is, where a nonlinearity acts on each of them.

    Reference: Bell and Dean (1970), "Atomic vibrations in vitreous silica", for the participation ratio.
    """
    return _ratio(responses.square().sum(1).square(), responses.pow(4).sum(1))


@dataclass(frozen=True, eq=False)
class Superposition(Result):
    """A trained toy: its weights, what each neuron responds to, and how many features share it.

    `dimensions` is `feature_dimensions` of W; `per_neuron` is `features_per_neuron` of the responses. A neuron
    with more than 1.5 is called polysemantic: had it two features, the squared response to one would be at least a
    quarter of that to the other.
    """

    W: Float[Tensor, "hidden feature"]
    b: Float[Tensor, "feature"]
    responses: Responses
    importance: Float[Tensor, "feature"]
    losses: list[float]
    hidden: str
    density: float

    terms = {
        "dimension": "share of a hidden dimension: 1 alone, 1/2 in an antipodal pair, 0 not stored",
        "strongest neuron": "the hidden dimension with the largest response to the feature alone",
    }

    @property
    def dimensions(self) -> Float[Tensor, "feature"]:
        """The share of a hidden dimension that each feature has."""
        return feature_dimensions(self.W)

    @property
    def per_neuron(self) -> Float[Tensor, "neuron"]:
        """How many features each neuron responds to."""
        return features_per_neuron(self.responses)

    @property
    def n_polysemantic(self) -> int:
        """How many neurons respond to more than 1.5 features."""
        return int((self.per_neuron > 1.5).sum())

    def table(self, n: int | None = None) -> Table:
        """One row per feature: importance, length of its direction, dimension, strongest neuron."""
        rows = [
            (i, float(self.importance[i]), float(self.W[:, i].norm()), float(dimension), int(strongest))
            for i, (dimension, strongest) in enumerate(
                zip(self.dimensions, self.responses.abs().argmax(0), strict=True)
            )
        ]
        return Table(("feature", "importance", "length", "dimension", "strongest neuron"), rows).head(n)

    def figure(self) -> Any:
        """The responses of every hidden dimension to every feature alone."""
        from hooklens.viz.figures import heatmap

        counts = [f"{i}: {count:.1f} features" for i, count in enumerate(self.per_neuron.tolist())]
        title = f"density {self.density:g}: {self.n_polysemantic} of {len(counts)} neurons polysemantic"
        if self.hidden == "linear":  # a rotation of the hidden space changes nothing, so counts per row mean nothing
            counts = [str(i) for i in range(len(self.W))]
            title = f"density {self.density:g}: dimensions {', '.join(f'{d:.2f}' for d in self.dimensions.tolist())}"
        return heatmap(self.responses, y=counts, title=title, x_title="feature", y_title="hidden", colourbar="response")


def train_superposition(
    n_features: int = 5,
    n_hidden: int = 2,
    *,
    hidden: Literal["linear", "relu"] = "linear",
    density: float = 0.05,
    importance: Sequence[float] | None = None,
    steps: int = 1500,
    lr: float = 0.02,
    seed: int = 0,
) -> Superposition:
    """Train the toy on features that are non-zero with probability `density`, and then uniform on [0, 1].

    >>> toy = train_superposition(3, 2, density=1.0, steps=5)
    >>> toy.dimensions.shape, toy.per_neuron.shape, len(toy.losses)
    (torch.Size([3]), torch.Size([2]), 5)

    The loss is half the mean over rows of sum_i importance_i (x'_i - x_i)^2; the learning rate falls linearly to 0.
    Dense features interfere, and only as many are stored as there are hidden dimensions; sparse ones are seldom present
    together, so that more are stored than there are dimensions.

    Reference: Elhage et al. (2022), "Toy models of superposition", "Demonstrating superposition".
    """
    if not 0 < real("density", density) <= 1:
        raise ArgumentError("{density} is a probability above 0 and at most 1, got {0}", density)
    weights = torch.ones(whole("n_features", n_features, 1), dtype=torch.float64)
    if importance is not None:
        weights = torch.tensor(list(importance), dtype=torch.float64)
    if weights.shape != (n_features,) or not bool((weights > 0).all()):
        raise InputError(f"importance is one number above 0 for each of {n_features} features, got {importance!r:.80}")

    def loss(output: Rows, target: Rows) -> tuple[float, Rows]:
        difference = output - target
        return float((weights * difference.square()).sum() / (2 * len(output))), weights * difference / len(output)

    model = TiedAutoencoder(n_features, n_hidden, hidden=hidden, seed=seed)
    trainer, generator = Trainer(model, Adam(lr=lr), loss), seeded(seed, 1)
    losses = []
    for step in range(whole("steps", steps, 1)):
        x = torch.rand(_BATCH, n_features, generator=generator, dtype=torch.float64)
        x *= torch.rand(_BATCH, n_features, generator=generator) < density
        losses.append(trainer.step(x, x, rate=lr * (1 - step / steps)))
    return Superposition(
        **{name: value.clone() for name, value in model.parameters.items()},
        responses=model.responses(),
        importance=weights,
        losses=losses,
        hidden=hidden,
        density=float(density),
    )


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, and 0 where both are 0."""
    return torch.where(bottom > 0, top / bottom, torch.zeros_like(top))

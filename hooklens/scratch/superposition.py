"""A toy in which more features than dimensions share them: x' = ReLU(x W^T W + b), trained by hand."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded

Features = Float[Tensor, "row feature"]
Weights = Float[Tensor, "hidden feature"]


@dataclass(frozen=True)
class Superposition:
    """The weights of the toy: each column of W is the direction in which a feature is stored."""

    W: Weights
    b: Float[Tensor, "feature"]

    def reconstruct(self, x: Features) -> Features:
        """The features as they come back from the hidden dimensions."""
        return torch.relu(x @ self.W.T @ self.W + self.b)

    def dimensions(self) -> Float[Tensor, "feature"]:
        """The share of a dimension that each feature has, D_i = |W_i|^2 / sum_j (w_i . W_j)^2.

        Five features in a regular pentagon have 2/5 each, an antipodal pair 1/2, a feature of its own 1.

        >>> pair = Superposition(torch.tensor([[1.0, -1.0]]), torch.zeros(2))
        >>> pair.dimensions()
        tensor([0.5000, 0.5000])

        Reference: Elhage et al. (2022), "Toy models of superposition", "The geometry of superposition".
        """
        norms = self.W.norm(dim=0)
        overlaps = (self.W / norms.clamp_min(1e-12)).T @ self.W
        return norms.square() / overlaps.square().sum(1).clamp_min(1e-24)

    def features_per_neuron(self) -> Float[Tensor, "hidden"]:
        """How many features each hidden neuron carries: the participation ratio of its squared weights.

        1 for a neuron of a single feature, n for one that carries n features equally. It means something only where
        the hidden dimensions are neurons, that is, where a nonlinearity acts on each of them.

        >>> Superposition(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2)).features_per_neuron()
        tensor([1., 2.])
        """
        squares = self.W.square()
        return squares.sum(1).square() / squares.square().sum(1).clamp_min(1e-24)


def train_superposition(
    n_features: int = 5,
    n_hidden: int = 2,
    *,
    density: float = 0.05,
    steps: int = 3000,
    batch: int = 1024,
    lr: float = 0.02,
    seed: int = 0,
) -> Superposition:
    """Train the toy on features that are non-zero with probability `density`, then uniform on [0, 1].

    Gradient of the mean squared error by hand: with R = 2 (x' - x) / n where x' > 0, dL/db is the sum of R's rows, and
    dL/dW = (x W^T)^T R + (R W^T)^T x, one term for each of the two places of W.
    """
    generator = seeded(seed)
    W = torch.randn(n_hidden, n_features, generator=generator, dtype=torch.float64) / n_hidden**0.5
    b = torch.zeros(n_features, dtype=torch.float64)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (W, b)]
    for step in range(1, steps + 1):
        x = torch.rand(batch, n_features, generator=generator, dtype=torch.float64)
        x *= torch.rand(batch, n_features, generator=generator) < density
        gradients = gradients_of(Superposition(W, b), x)
        for parameter, gradient, (first, second) in zip((W, b), gradients, moments, strict=True):
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            scale = (second / (1 - 0.999**step)).sqrt() + 1e-8
            parameter.sub_(lr * (1 - step / (steps + 1)) * first / (1 - 0.9**step) / scale)
    return Superposition(W, b)


def gradients_of(toy: Superposition, x: Features) -> tuple[Weights, Float[Tensor, "feature"]]:
    """The gradients of the mean squared error with respect to W and b."""
    hidden = x @ toy.W.T
    out = torch.relu(hidden @ toy.W + toy.b)
    back = 2 * (out - x) / len(x) * (out > 0)
    return hidden.T @ back + (back @ toy.W.T).T @ x, back.sum(0)

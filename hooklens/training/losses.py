"""Losses of training: one number for every target, in nats or squared units."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.precision import widened
from hooklens.model.config import Part

Logits = Float[Tensor, "*target d_vocab"]
Targets = Int[Tensor, "*target"]
PerTarget = Float[Tensor, "*target"]


@dataclass(frozen=True)
class Loss(Part):
    """What training lowers: a function of the model's output and its targets, one number for each target."""

    slot = "loss"

    def __call__(self, output: Float[Tensor, "*target out"], targets: Tensor) -> PerTarget:
        raise InputError(f"{type(self).__name__} does not define a loss; define __call__()")


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Minus the log-probability of the target, in nats. `double` computes it in float64.

    >>> CrossEntropy()(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """

    name = "cross_entropy"
    double: bool = False

    def __call__(self, output: Logits, targets: Targets) -> PerTarget:
        wide = output.double() if self.double else widened(output)
        flat = torch.nn.functional.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="none")
        return flat.view(targets.shape)


@dataclass(frozen=True)
class StableMax(Loss):
    """Cross-entropy with s(x) / sum s(x) in place of the softmax; s(x) = x + 1 for x >= 0, else 1 / (1 - x).

    It grows linearly instead of exponentially, so that differences between large logits are not rounded away.

    >>> StableMax()(torch.tensor([[1.0, -1.0]]), torch.tensor([0])).exp()
    tensor([1.2500])

    Reference: Prieto et al. (2025), "Grokking at the edge of numerical stability", definition 4.
    """

    name = "stablemax"
    double: bool = False

    def __call__(self, output: Logits, targets: Targets) -> PerTarget:
        wide = output.double() if self.double else widened(output)
        # The branch that is not taken is evaluated at 0: its gradient at x = 1 would be 0 * inf = NaN.
        negative = wide.clamp_max(0)
        scores = torch.where(wide >= 0, wide + 1, 1 / (1 - negative))
        return scores.sum(-1).log() - scores.gather(-1, targets[..., None])[..., 0].log()


@dataclass(frozen=True)
class SquaredError(Loss):
    """Half the squared distance to a target vector (the factor as in von Oswald et al. 2023, equation 2)."""

    name = "squared_error"

    def __call__(self, output: Float[Tensor, "*target out"], targets: Float[Tensor, "*target out"]) -> PerTarget:
        return (widened(output) - targets).square().sum(-1) / 2


def correct(output: Float[Tensor, "*target out"], targets: Tensor) -> PerTarget:
    """1 for each target that has the largest output, else 0; NaN for targets that are vectors.

    >>> correct(torch.tensor([[0.5, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]))
    tensor([1., 0.])
    """
    if targets.is_floating_point():
        return output.new_full(targets.shape[:-1], float("nan"))
    return (output.argmax(-1) == targets).to(output.dtype)

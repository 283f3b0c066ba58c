"""Gradient descent on layers: two losses with their gradients, and a trainer."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import CheckFailed, InputError
from hooklens.scratch.layers import Layer, Out, Rows
from hooklens.training.optimizers import SGD, Optimizer

Target = Shaped[Tensor, "row ..."]
Loss = Callable[[Tensor, Tensor], tuple[float, Tensor]]


def squared_error(output: Out, target: Float[Tensor, "row out"]) -> tuple[float, Out]:
    """L = 1/(2 n) sum |y - t|^2 over n rows, and its gradient dL/dy = (y - t) / n.

    >>> squared_error(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    (2.0, tensor([[2.]]))
    """
    if output.shape != target.shape:
        raise InputError(
            f"squared_error compares outputs with targets of the same shape, got {list(output.shape)} and "
            f"{list(target.shape)}; a single output per row is a column: target[:, None]"
        )
    difference = output - target
    return float(difference.square().sum() / (2 * len(output))), difference / len(output)


def cross_entropy(output: Out, target: Shaped[Tensor, " row"]) -> tuple[float, Out]:
    """L = -1/n sum log softmax(y)[t], in nats, and its gradient dL/dy = (softmax(y) - one-hot(t)) / n.

    >>> loss, gradient = cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
    >>> round(loss, 4), gradient
    (0.6931, tensor([[ 0.5000, -0.5000]]))
    """
    n, n_classes = output.shape
    if target.shape != (n,) or target.dtype != torch.int64:
        raise InputError(
            f"cross_entropy takes one class per row, whole numbers in torch.int64 of shape [{n}], got {target.dtype} "
            f"of shape {list(target.shape)}"
        )
    if n and not 0 <= int(target.min()) <= int(target.max()) < n_classes:
        seen = f"{int(target.min())} to {int(target.max())}"
        raise InputError(f"cross_entropy has {n_classes} outputs, so classes are 0 to {n_classes - 1}, got {seen}")
    log_probs = output.log_softmax(-1)
    one_hot = torch.nn.functional.one_hot(target, n_classes)
    return -float((log_probs * one_hot).sum() / n), (log_probs.exp() - one_hot) / n


@dataclass
class Trainer:
    """Change the parameters of a model against the gradient of a loss, step by step.

    >>> from hooklens.scratch.layers import Linear, ReLU, Sequential
    >>> x = torch.linspace(-1, 1, 32, dtype=torch.float64)[:, None]
    >>> model = Sequential(Linear(1, 16, seed=0), ReLU(), Linear(16, 1, seed=1))
    >>> losses = Trainer(model).fit(x, x.abs(), steps=300)
    >>> losses[-1] < losses[0] / 20
    True

    `rule` is any rule of `hl.training`, such as `hl.training.Adam(lr=0.01)`.
    """

    model: Layer
    rule: Optimizer = field(default_factory=lambda: SGD(lr=0.1, momentum=0.9))
    loss: Loss = squared_error
    steps_done: int = field(default=0, init=False)
    _kept: dict[tuple[int, str], dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.rule.lr > 0 and math.isfinite(self.rule.lr)):
            raise InputError(f"a learning rate is a finite number above 0, got {self.rule.lr}; try 0.1")

    def fit(self, x: Rows, target: Target, *, steps: int, batch: int | None = None, seed: int = 0) -> list[float]:
        """Train on these rows and return the loss of every step, measured before the step changes the model.

        Every step sees all rows, or `batch` of them that are drawn with replacement.
        """
        whole("steps", steps, 1)
        if len(x) == 0 or len(x) != len(target):
            raise InputError(
                f"training needs at least one row and one target for each, got {len(x)} rows and {len(target)} targets"
            )
        if batch is None:
            return [self.step(x, target) for _ in range(steps)]
        whole("batch", batch, 1)
        generator = seeded(seed)
        losses = []
        for _ in range(steps):
            rows = torch.randint(len(x), (batch,), generator=generator)
            losses.append(self.step(x[rows], target[rows]))
        return losses

    def step(self, x: Rows, target: Target, rate: float | None = None) -> float:
        """One step on one batch; returns its loss. `rate` replaces the rule's learning rate in this step."""
        value, grad = self.loss(self.model.forward(x), target)
        if not math.isfinite(value):
            raise CheckFailed(
                f"the loss is {value} after {self.steps_done} steps; the parameters were left as they are; use a "
                f"smaller learning rate than {self.rule.lr:g}, or check the rows for NaN"
            )
        self.model.backward(grad)
        self.steps_done += 1
        for i, part in enumerate(self.model.parts()):
            for name, parameter in part.parameters.items():
                self._change(parameter, part.gradients[name], (i, name), self.rule.lr if rate is None else rate)
        return value

    def _change(self, parameter: Tensor, gradient: Tensor, key: tuple[int, str], rate: float) -> None:
        """Let the rule change one parameter in place. It sees vectors, and keeps its own (momentum) by name."""
        values, change = parameter.view(-1), gradient.reshape(-1).clone()
        kept = self._kept.setdefault(key, {slot: torch.zeros_like(values) for slot in self.rule.kept})
        self.rule.prepare(change, values, kept, [slice(0, len(values))])
        self.rule.change(change, values, kept, self.steps_done, rate)  # the gradient becomes the change
        values.add_(change)

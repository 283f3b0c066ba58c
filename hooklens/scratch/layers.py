"""Layers with a backward pass by hand, on plain tensors: no autograd, no modules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded

Rows = Float[Tensor, "row in"]
Out = Float[Tensor, "row out"]


class Layer:
    """A function of rows, and how a gradient passes back through it.

    `forward` keeps what `backward` needs. `backward` takes the gradient of the loss with respect to the output,
    returns that with respect to the input, and writes those of its parameters into `gradients`.
    """

    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def __init__(self) -> None:
        self.parameters, self.gradients = {}, {}

    def forward(self, x: Rows) -> Out:
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def backward(self, grad: Out) -> Rows:
        raise TypeError(f"{type(self).__name__} does not define backward()")


class Linear(Layer):
    """y = x W + b.

    With G = dL/dy: dL/dx = G W^T, dL/dW = x^T G, dL/db = the sum of G's rows.

    >>> layer = Linear(3, 2, seed=0)
    >>> y = layer.forward(torch.ones(4, 3).double())
    >>> layer.backward(torch.ones(4, 2).double()).shape, layer.gradients["W"].shape
    (torch.Size([4, 3]), torch.Size([3, 2]))
    """

    def __init__(self, n_in: int, n_out: int, *, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        draw = torch.randn(n_in, n_out, generator=seeded(seed), dtype=dtype)
        # He et al. (2015), equation 10: the variance that keeps the size of activations behind a ReLU.
        self.parameters = {"W": draw * math.sqrt(2 / n_in), "b": torch.zeros(n_out, dtype=dtype)}

    def forward(self, x: Rows) -> Out:
        self.x = x
        return x @ self.parameters["W"] + self.parameters["b"]

    def backward(self, grad: Out) -> Rows:
        self.gradients = {"W": self.x.T @ grad, "b": grad.sum(0)}
        return grad @ self.parameters["W"].T


class ReLU(Layer):
    """max(x, 0). The derivative is 1 where x > 0, else 0 (at 0 as autograd has it)."""

    def forward(self, x: Rows) -> Out:
        self.on = x > 0
        return x * self.on

    def backward(self, grad: Out) -> Rows:
        return grad * self.on


class GELU(Layer):
    """x Phi(x), Phi the normal distribution function; the derivative is Phi(x) + x phi(x).

    Reference: Hendrycks and Gimpel (2016), "Gaussian error linear units", section 2.
    """

    def forward(self, x: Rows) -> Out:
        self.x = x
        return x * torch.special.ndtr(x)

    def backward(self, grad: Out) -> Rows:
        density = torch.exp(-self.x.square() / 2) / math.sqrt(2 * math.pi)
        return grad * (torch.special.ndtr(self.x) + self.x * density)


class Sequential(Layer):
    """Layers one after the other; the gradient passes back in reverse order (the chain rule)."""

    def __init__(self, *layers: Layer):
        super().__init__()
        self.layers = layers

    def forward(self, x: Rows) -> Out:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, grad: Out) -> Rows:
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return grad


def squared_error(output: Out, target: Out) -> tuple[float, Out]:
    """Half the mean over rows of the squared distance, and its gradient."""
    difference = output - target
    return float(difference.square().sum() / (2 * len(output))), difference / len(output)


def cross_entropy(output: Out, target: Tensor) -> tuple[float, Out]:
    """Minus the mean log-probability of the targets, and its gradient: softmax minus one-hot."""
    log_probs = output.log_softmax(-1)
    grad = log_probs.exp()
    grad[torch.arange(len(target)), target] -= 1
    return -float(log_probs.gather(1, target[:, None]).mean()), grad / len(output)


@dataclass
class Trainer:
    """Gradient descent with momentum on a model of layers.

    >>> x = torch.linspace(-1, 1, 32, dtype=torch.float64)[:, None]
    >>> model = Sequential(Linear(1, 16, seed=0), ReLU(), Linear(16, 1, seed=1))
    >>> losses = Trainer(model, lr=0.1).fit(x, x.abs(), steps=300)
    >>> losses[-1] < losses[0] / 20
    True
    """

    model: Sequential
    lr: float = 0.1
    momentum: float = 0.9
    velocities: dict[tuple[int, str], Tensor] = field(default_factory=dict, repr=False)

    def fit(self, x: Rows, target: Tensor, *, steps: int, loss=squared_error) -> Sequence[float]:
        """Train on all rows in every step; returns the losses."""
        losses = []
        for _ in range(steps):
            value, grad = loss(self.model.forward(x), target)
            self.model.backward(grad)
            self.step()
            losses.append(value)
        return losses

    def step(self) -> None:
        """v <- momentum v + gradient; parameter <- parameter - lr v."""
        for i, layer in enumerate(self.model.layers):
            for name, parameter in layer.parameters.items():
                velocity = self.velocities.get((i, name), torch.zeros_like(parameter))
                self.velocities[i, name] = velocity = self.momentum * velocity + layer.gradients[name]
                parameter.sub_(self.lr * velocity)

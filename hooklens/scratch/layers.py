"""Layers with a backward pass by hand, on plain tensors: no autograd, no modules."""

import math
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError, WrongType

Rows = Float[Tensor, "row in"]
Out = Float[Tensor, "row out"]


class Layer:
    """A function of rows, and how a gradient passes back through it (the chain rule).

    A subclass defines two methods. `compute` is the function. `pull_back` takes the input x and G = dL/dy, the gradient
    of the loss L with respect to the output y; it returns dL/dx and writes the gradients of its own parameters into
    `gradients`. `forward` and `backward` call them and remember the input in between.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._input: Tensor | None = None
        self._shape: torch.Size | None = None

    def forward(self, x: Rows) -> Out:
        """The output for some rows; their number and values are remembered for `backward`."""
        y = self.compute(x)
        self._input, self._shape = x, y.shape
        return y

    def backward(self, grad: Out) -> Rows:
        """The gradient with respect to the last input, given that with respect to the output."""
        name = type(self).__name__
        if self._input is None:
            raise InputError(f"{name}.backward() was called before forward(), whose input it needs; call forward(x)")
        if grad.shape != self._shape:
            raise InputError(
                f"{name}.backward() takes a gradient of the shape of the last output, {list(self._shape or ())}, "
                f"got {list(grad.shape)}; pass dL/dy for the rows of the last forward()"
            )
        return self.pull_back(self._input, grad)

    def compute(self, x: Rows) -> Out:
        """The function of this layer."""
        raise WrongType(f"{type(self).__name__} does not define compute(x); every layer does")

    def pull_back(self, x: Rows, grad: Out) -> Rows:
        """dL/dx from dL/dy."""
        raise WrongType(f"{type(self).__name__} does not define pull_back(x, grad); every layer does")

    def parts(self) -> "list[Layer]":
        """The layers in here that have parameters of their own or none at all: a layer is its only part."""
        return [self]


class Linear(Layer):
    """y = x W + b.

    With G = dL/dy: dL/dx = G W^T, dL/dW = x^T G, and dL/db is the sum of the rows of G.

    >>> layer = Linear(3, 2, seed=0)
    >>> y = layer.forward(torch.ones(4, 3, dtype=torch.float64))
    >>> layer.backward(torch.ones_like(y)).shape, layer.gradients["W"].shape
    (torch.Size([4, 3]), torch.Size([3, 2]))

    Reference: He et al. (2015), "Delving deep into rectifiers", equation 10, for the variance 2 / n_in of the weights.
    """

    def __init__(self, n_in: int, n_out: int, *, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.n_in, self.n_out = whole("n_in", n_in, 1), whole("n_out", n_out, 1)
        draw = torch.randn(n_in, n_out, generator=seeded(seed), dtype=dtype)
        self.parameters = {"W": draw * math.sqrt(2 / n_in), "b": torch.zeros(n_out, dtype=dtype)}

    def compute(self, x: Rows) -> Out:
        W, b = self.parameters["W"], self.parameters["b"]
        check_rows(f"a Linear layer of {self.n_in} inputs", x, self.n_in, W.dtype)
        return x @ W + b

    def pull_back(self, x: Rows, grad: Out) -> Rows:
        self.gradients = {"W": x.T @ grad, "b": grad.sum(0)}
        return grad @ self.parameters["W"].T


class ReLU(Layer):
    """max(x, 0). The derivative is 1 where x > 0, else 0; at 0 it does not exist, and 0 is taken, as autograd does."""

    def compute(self, x: Rows) -> Out:
        return x.clamp_min(0)

    def pull_back(self, x: Rows, grad: Out) -> Rows:
        return grad * (x > 0)


class GELU(Layer):
    """x Phi(x), where Phi is the normal distribution function and phi its density; the derivative is Phi + x phi.

    Reference: Hendrycks and Gimpel (2016), "Gaussian error linear units", section 2.
    """

    def compute(self, x: Rows) -> Out:
        return x * torch.special.ndtr(x)

    def pull_back(self, x: Rows, grad: Out) -> Rows:
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return grad * (torch.special.ndtr(x) + x * density)


class Sequential(Layer):
    """Layers one after the other. The gradient passes back through them in reverse order.

    >>> model = Sequential(Linear(2, 8, seed=0), GELU(), Linear(8, 1, seed=1))
    >>> model.forward(torch.zeros(5, 2, dtype=torch.float64)).shape
    torch.Size([5, 1])
    """

    def __init__(self, *layers: Layer):
        super().__init__()
        for layer in layers:
            if not isinstance(layer, Layer):
                raise WrongType(f"Sequential takes layers, such as Linear(2, 8) and ReLU(), got {layer!r:.80}")
        self.layers = layers
        linear = [part for part in self.parts() if isinstance(part, Linear)]
        for first, second in pairwise(linear):
            if first.n_out != second.n_in:
                raise InputError(
                    f"a Linear layer with {first.n_out} outputs cannot be followed by one of {second.n_in} inputs; "
                    f"use Linear({first.n_out}, {second.n_out})"
                )

    def forward(self, x: Rows) -> Out:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, grad: Out) -> Rows:
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return grad

    def parts(self) -> list[Layer]:
        return [part for layer in self.layers for part in layer.parts()]


def check_rows(what: str, x: Any, n_in: int, dtype: torch.dtype) -> None:
    """Raise unless x is a matrix of rows of `n_in` numbers of this dtype."""
    if not isinstance(x, Tensor):
        raise WrongType(f"{what} takes a tensor [row in], got a {type(x).__name__}; use torch.tensor(x, dtype={dtype})")
    if x.ndim != 2 or x.shape[1] != n_in:
        raise InputError(f"{what} takes rows of {n_in} numbers [row {n_in}], got shape {list(x.shape)}")
    if x.dtype != dtype:
        raise InputError(f"{what} has parameters in {dtype}, got rows in {x.dtype}; use x.to({dtype})")

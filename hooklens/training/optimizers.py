"""Optimisers written out: each turns the gradient into a change of the parameters, on one vector, in place."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.model.config import Part, part

_LARGEST_RATE = 1e12  # the bound of any number of a part (model/config.py), whose message does not name it
_AT_ONCE = 2**19  # elements: few enough that the vectors of a piece stay in a cache, enough that calls cost little

Vector = Float[Tensor, "*parameter"]
Slots = Mapping[str, Vector]


@dataclass(frozen=True)
class Optimizer(Part):
    """A rule that turns gradients into changes. `slots` names the vectors that it keeps from step to step."""

    slot = "optimizer"
    slots: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        rate = vars(self).get("lr", 0.0)  # a wrapper has that of its inner rule
        if isinstance(rate, int | float) and _LARGEST_RATE < rate < math.inf:
            raise InputError(
                f"{type(self).__name__}: lr is {rate!r:.80}; a finite number from 0 to {_LARGEST_RATE:g} is needed, "
                "and rates from 1e-5 to 1 are usual: they multiply the change of every parameter"
            )
        super().__post_init__()

    @property
    def lr(self) -> float:
        """The learning rate that a schedule scales: a field of rules; a wrapper has that of its inner rule."""
        raise InputError(f"{type(self).__name__} has no learning rate; give it a field lr")

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the vectors that a checkpoint has to hold."""
        return self.slots

    def prepare(self, grads: Vector, values: Vector, slots: Slots, spans: Sequence[slice]) -> None:
        """Change the gradient before the rule sees it, parameter by parameter (`spans`). Most rules do nothing here."""

    def change(self, grads: Vector, values: Vector, slots: Slots, t: int, rate: float) -> None:
        """Replace a piece of the gradient by the change of the parameters in step `t` (1, 2, ...)."""
        raise InputError(f"{type(self).__name__} does not say how it changes parameters; define change()")

    def step(
        self,
        values: Vector,
        grads: Vector,
        slots: Slots,
        *,
        t: int,
        rate: float,
        spans: Sequence[slice],
        layers: Sequence[slice] = (slice(0, None),),
    ) -> Float[Tensor, "2 layer"]:
        """One step: `grads` becomes the change, which is added to `values`.

        >>> values, grads = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])
        >>> slots, spans = {"momentum": torch.zeros(2)}, [slice(0, 2)]
        >>> SGD(lr=0.1).step(values, grads, slots, t=1, rate=0.1, spans=spans)
        tensor([[2.2361],
                [0.0707]])
        >>> values, grads
        (tensor([0.9500, 2.0500]), tensor([-0.0500,  0.0500]))

        Returns the norms of each layer's values before the step, and of their change, taken while they are in the
        cache. The layers follow each other, and the vector begins with the first.
        """
        self.prepare(grads, values, slots, spans)
        starts = [layer.start for layer in layers] + [len(values)]
        norms = []
        for start, stop in itertools.pairwise(starts):
            pieces = [vector[start:stop].split(_AT_ONCE) for vector in (grads, values, *slots.values())]
            before, changed = [], []
            for grad, value, *kept in zip(*pieces, strict=True):
                before.append(value.norm())
                self.change(grad, value, dict(zip(slots, kept, strict=True)), t, rate)
                value.add_(grad)
                changed.append(grad.norm())
            norms.append(torch.stack([torch.stack(before).norm(), torch.stack(changed).norm()]))
        return torch.stack(norms, dim=1)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum; weight decay is added to the gradient.

    Reference: Sutskever et al. (2013), equations 1 to 4, in the form of torch.optim.SGD, where the momentum is a sum
    of gradients and not of changes.
    """

    name = "sgd"
    slots = ("momentum",)
    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def change(self, grads: Vector, values: Vector, slots: Slots, t: int, rate: float) -> None:
        momentum = slots["momentum"]
        if self.weight_decay:
            grads.add_(values, alpha=self.weight_decay)
        momentum.mul_(self.momentum).add_(grads)
        if self.nesterov:
            grads.add_(momentum, alpha=self.momentum)
        else:
            grads.copy_(momentum)
        grads.mul_(-rate)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adaptive moments; weight decay is added to the gradient.

    Reference: Kingma and Ba (2015), algorithm 1.
    """

    name = "adam"
    slots = ("first", "second")
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are two numbers from 0 to below 1, got {self.betas}")

    def change(self, grads: Vector, values: Vector, slots: Slots, t: int, rate: float) -> None:
        if self.weight_decay:
            grads.add_(values, alpha=self.weight_decay)
        self.adapt(grads, slots, t, rate)

    def adapt(self, grads: Vector, slots: Slots, t: int, rate: float) -> None:
        """Replace the gradient by -rate times the corrected first moment over the root of the second."""
        first, second = slots["first"], slots["second"]
        beta1, beta2 = self.betas
        first.lerp_(grads, 1 - beta1)
        second.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
        # (first / (1 - beta1^t)) / (sqrt(second / (1 - beta2^t)) + eps), in as few passes as there are
        root = (1 - beta2**t) ** 0.5
        torch.sqrt(second, out=grads)
        grads.add_(self.eps * root)
        torch.div(first, grads, out=grads)
        grads.mul_(-rate * root / (1 - beta1**t))


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with weight decay apart from the gradient: each step takes `rate * weight_decay` off every parameter.

    Reference: Loshchilov and Hutter (2019), algorithm 2.
    """

    name = "adamw"
    weight_decay: float = 0.01

    def change(self, grads: Vector, values: Vector, slots: Slots, t: int, rate: float) -> None:
        self.adapt(grads, slots, t, rate)
        grads.add_(values, alpha=-rate * self.weight_decay)


@dataclass(frozen=True)
class Wrapper(Optimizer):
    """An optimiser that changes the gradient before another one, `inner`, sees it."""

    inner: Optimizer = AdamW()

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", part("optimizer", self.inner))
        super().__post_init__()

    @property
    def lr(self) -> float:
        return self.inner.lr

    @property
    def kept(self) -> tuple[str, ...]:
        return (*self.slots, *self.inner.kept)

    def change(self, grads: Vector, values: Vector, slots: Slots, t: int, rate: float) -> None:
        self.inner.change(grads, values, slots, t, rate)


@dataclass(frozen=True)
class OrthogonalGradient(Wrapper):
    """Only the part of each gradient that is orthogonal to its parameter, with the gradient's norm.

    A gradient along its parameter becomes 0, and so does the gradient of a parameter that is one number.

    Under cross-entropy, growing all weights lowers the loss without changing any prediction; this direction is removed.

    Reference: Prieto et al. (2025), "Grokking at the edge of numerical stability", equation 12, scaled to the norm of
    the gradient as in the authors' code.
    """

    name = "orthogonal_gradient"

    def prepare(self, grads: Vector, values: Vector, slots: Slots, spans: Sequence[slice]) -> None:
        limits = torch.finfo(grads.dtype)
        for span in spans:
            grad, value = grads[span], values[span]
            before = grad.norm()
            grad.sub_(value * (value @ grad / (value @ value).clamp_min(limits.tiny)))
            after = grad.norm()
            # A rest as short as the rounding of this difference has no direction, and is not scaled up.
            grad.mul_(torch.where(after > 16 * limits.eps * before, before / after, 0))
        self.inner.prepare(grads, values, slots, spans)


@dataclass(frozen=True)
class Grokfast(Wrapper):
    """The gradient plus `amplify` times its exponential moving average: slow components are amplified.

    The average begins at 0; that of the authors' code begins at the first gradient.

    Reference: Lee et al. (2024), "Grokfast", algorithm 2 (Grokfast-EMA; `decay` is alpha, `amplify` lambda).
    """

    name = "grokfast"
    slots = ("slow",)
    decay: float = 0.98
    amplify: float = 2.0

    def prepare(self, grads: Vector, values: Vector, slots: Slots, spans: Sequence[slice]) -> None:
        slots["slow"].lerp_(grads, 1 - self.decay)
        grads.add_(slots["slow"], alpha=self.amplify)
        self.inner.prepare(grads, values, slots, spans)

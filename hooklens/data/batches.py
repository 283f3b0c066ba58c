"""What training reads: batches that are a function of the step, so that a resumed run needs no state of the data."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from numbers import Real
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from hooklens.core.arguments import seed_number, seeded, whole
from hooklens.core.errors import ArgumentError, InputError


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, the targets of its output, and which targets count."""

    inputs: Shaped[Tensor, "batch pos *d_in"]
    targets: Shaped[Tensor, "batch pos *d_out"]
    counts: Bool[Tensor, "batch pos"]

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, start: int, stop: int) -> "Batch":
        """Some of the rows."""
        return Batch(self.inputs[start:stop], self.targets[start:stop], self.counts[start:stop])

    def to(self, device: Any, dtype: torch.dtype | None = None) -> "Batch":
        """The batch on a device; vectors also in a dtype."""
        inputs, targets = (
            tensor.to(device, dtype if tensor.is_floating_point() else None) for tensor in (self.inputs, self.targets)
        )
        return Batch(inputs, targets, self.counts.to(device))


@dataclass(frozen=True)
class TrainingData:
    """A task to train on: how to draw a batch, what is held out, and what there is to learn.

    A subclass defines `batch` and `held_out`. Both depend on nothing but the fields and their arguments.
    """

    def batch(self, step: int, size: int) -> Batch:
        """The training batch of a step."""
        raise InputError(f"{type(self).__name__} draws no batches; define batch(step, size)")

    def held_out(self, size: int) -> Iterator[Batch]:
        """All that is held out, in batches of at most `size` rows; nothing if all data are fresh."""
        raise InputError(f"{type(self).__name__} holds nothing out; define held_out(size)")

    @property
    def n_positions(self) -> int:
        """The positions of the longest rows; tasks whose batches have rows of different lengths define it."""
        return self.batch(0, 1).inputs.shape[1]

    def description(self) -> str:
        """What is there to learn, in one or two sentences."""
        raise InputError(f"{type(self).__name__} does not say what there is to learn; define description()")

    def identity(self) -> dict[str, Any]:
        """What two runs on the same data have in common, as plain values."""
        raise InputError(f"{type(self).__name__} has no identity; define identity()")


def epoch_rows(step: int, size: int, n: int, seed: int) -> Int[Tensor, "row"]:
    """The rows of a step when every one of `n` is used once an epoch, in an order drawn for each epoch.

    >>> torch.cat([epoch_rows(step, 2, 4, seed=0) for step in range(2)]).sort().values
    tensor([0, 1, 2, 3])
    """
    at = torch.arange(step * whole("batch", size, 1), (step + 1) * size)
    parts = [at[at // n == epoch] % n for epoch in (at // n).unique()]
    first = step * size // n
    orders = (torch.randperm(n, generator=drawn_for(seed, first + i)) for i in range(len(parts)))
    return torch.cat([order[part] for order, part in zip(orders, parts, strict=True)])


def drawn_for(seed: int, nth: int | str) -> torch.Generator:
    """The generator of the nth draw of a task: other seeds give other draws at every nth, a number or a text.

    Seed and number are hashed together, because torch's generator on the CPU reads only the last 32 bits of a seed.
    """
    return seeded(int.from_bytes(_hash(seed, nth)[:4], "big"))


def hashed_share(seed: int, key: str) -> float:
    """A number from 0 to 1 that depends on nothing but the seed and the text: what is below a share is held out.

    >>> 0 <= hashed_share(0, "12+34") < 1, hashed_share(0, "12+34") == hashed_share(0, "12+34")
    (True, True)
    """
    return int.from_bytes(_hash(seed, key)[:6], "big") / 2**48


def _hash(seed: int, key: object) -> bytes:
    return blake2b(f"{seed_number(seed)} {key}".encode(), digest_size=8).digest()


def share(name: str, value: Any, of: str) -> float:
    """A share above 0 and below 1.

    >>> share("held_out", 1.5, "the text")
    Traceback (most recent call last):
    hooklens.core.errors.ArgumentError: held_out is a share of the text, above 0 and below 1; got 1.5
    """
    good = isinstance(value, Real) and not isinstance(value, bool)
    if not good or not 0 < value < 1:
        raise ArgumentError("{" + name + "} is a share of {0}, above 0 and below 1; got {1}", of, f"{value!r:.60}")
    return float(value)


def next_token_batch(tokens: Int[Tensor, "batch pos"]) -> Batch:
    """Windows of tokens, each of which predicts the next.

    >>> next_token_batch(torch.tensor([[1, 2, 3]])).targets
    tensor([[2, 3]])
    """
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones_like(tokens[:, 1:], dtype=torch.bool))

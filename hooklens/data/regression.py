"""Linear regression in context: every sequence is a data set with weights of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import real, seed_number, whole
from hooklens.core.errors import did_you_mean
from hooklens.data.batches import Batch, TrainingData, drawn_for

_INPUTS = ("uniform", "normal")
_EVALUATED = 512  # held-out tasks


@dataclass(frozen=True)
class InContextRegression(TrainingData):
    """Tokens (x_i, y_i) of `n_points` examples, then a query (x, 0) at which the answer y is asked for.

    y = w x + noise with w from N(0, I); x uniform on (-1/2, 1/2) or standard normal. `interleaved` gives x and y
    tokens of their own and asks at every x, the first of which can only be guessed. There is no vocabulary: tokens are
    vectors.
    """

    d: int
    n_points: int
    inputs: str
    noise: float
    interleaved: bool
    seed: int

    @property
    def d_in(self) -> int:
        """The length of a token's vector."""
        return self.d + 1

    def draw(
        self, n: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "task point d"], Float[Tensor, "task point"], Float[Tensor, "task d"]]:
        """Points, answers and weights of `n` tasks; the last point is the query."""
        w = torch.randn(n, self.d, generator=generator)
        if self.inputs == "uniform":
            x = torch.rand(n, self.n_points + 1, self.d, generator=generator) - 0.5
        else:
            x = torch.randn(n, self.n_points + 1, self.d, generator=generator)
        noise = self.noise * torch.randn(n, self.n_points + 1, generator=generator)
        return x, (x * w[:, None]).sum(-1) + noise, w

    def tokens(self, x: Float[Tensor, "task point d"], y: Float[Tensor, "task point"]) -> Batch:
        """The batch that shows these points."""
        if not self.interleaved:
            tokens = torch.cat([x, y[..., None]], -1)
            tokens[:, -1, -1] = 0
            counts = torch.zeros(y.shape, dtype=torch.bool)
            counts[:, -1] = True
            return Batch(tokens, y[..., None], counts)
        tokens = x.new_zeros(len(x), 2 * x.shape[1], self.d_in)
        tokens[:, ::2, : self.d], tokens[:, 1::2, self.d] = x, y
        targets, counts = torch.zeros(tokens.shape[:2]), torch.zeros(tokens.shape[:2], dtype=torch.bool)
        targets[:, ::2], counts[:, ::2] = y, True
        return Batch(tokens[:, :-1], targets[:, :-1, None], counts[:, :-1])

    def batch(self, step: int, size: int) -> Batch:
        """Fresh tasks."""
        x, y, _ = self.draw(size, drawn_for(self.seed, step + 1))
        return self.tokens(x, y)

    def held_out(self, size: int) -> Iterator[Batch]:
        """512 tasks that no step draws."""
        x, y, _ = self.draw(_EVALUATED, drawn_for(self.seed, 0))
        for some_x, some_y in zip(x.split(size), y.split(size), strict=True):
            yield self.tokens(some_x, some_y)

    def description(self) -> str:
        """What there is to learn."""
        return (
            f"linear regression in {self.d} dimensions from {self.n_points} examples in the context; no weights are "
            "shared between sequences, so that only an algorithm can be learned"
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        return {
            "task": "in-context regression",
            "d": self.d,
            "n_points": self.n_points,
            "inputs": self.inputs,
            "noise": self.noise,
            "interleaved": self.interleaved,
            "seed": self.seed,
        }


def in_context_regression(
    d: int = 10,
    n_points: int = 10,
    *,
    inputs: Literal["uniform", "normal"] = "uniform",
    noise: float = 0.0,
    interleaved: bool = False,
    seed: int = 0,
) -> InContextRegression:
    """Linear regression from examples in the context, for models that read vectors (`VectorEmbed(d_in=d + 1)`).

    >>> data = in_context_regression(d=2, n_points=3)
    >>> batch = data.batch(0, 4)
    >>> batch.inputs.shape, batch.counts[0].tolist()
    (torch.Size([4, 4, 3]), [False, False, False, True])

    Without noise, least squares on at least `d` points has no error, and the ridge solution with the noise's variance
    has the smallest one with it.

    References: Garg et al. (2022), "What can transformers learn in-context?", section 2 (`interleaved`);
    von Oswald et al. (2023), "Transformers learn in-context by gradient descent", section 3 (one vector a point).
    """
    whole("d", d, 1)
    whole("n_points", n_points, 1)
    if inputs not in _INPUTS:
        raise did_you_mean("distribution of inputs", inputs, _INPUTS)
    seed_number(seed)
    return InContextRegression(d, n_points, inputs, real("noise", noise, 0.0), interleaved, seed=seed)

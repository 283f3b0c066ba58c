"""Linear regression in context: every sequence is a data set with weights of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import flag, real, seed_number, whole
from hooklens.core.errors import ArgumentError, did_you_mean
from hooklens.data.batches import Batch, TrainingData, drawn_for

_INPUTS = ("uniform", "normal")
_EVALUATED = 512  # held-out tasks; a whole number for each number of examples, at least so many together


@dataclass(frozen=True)
class InContextRegression(TrainingData):
    """Tokens (x_i, y_i) of `n_points` examples, then a query (x, 0) at which the answer y is asked for.

    y = w x + noise with w from N(0, I); x uniform on (-1/2, 1/2) or standard normal. `interleaved` gives x and y
    tokens of their own and asks at every x, the first of which can only be guessed. There is no vocabulary: tokens are
    vectors.

    With a pair (least, most) as `n_points`, all rows of a step have one number of examples, drawn uniformly from
    `least` to a bound, which grows linearly from `least` to `most` over the first `curriculum` steps.
    """

    d: int
    n_points: int | tuple[int, int]
    inputs: str
    noise: float
    interleaved: bool
    seed: int
    curriculum: int = 0

    @property
    def points(self) -> range:
        """The numbers of examples in a context, in growing order.

        >>> in_context_regression(n_points=10).points, in_context_regression(n_points=(5, 50)).points
        (range(10, 11), range(5, 51))
        """
        least, most = (self.n_points, self.n_points) if isinstance(self.n_points, int) else self.n_points
        return range(least, most + 1)

    @property
    def n_positions(self) -> int:
        """The positions of the longest rows."""
        most = self.points[-1]
        return 2 * most + 1 if self.interleaved else most + 1

    @property
    def d_in(self) -> int:
        """The length of a token's vector."""
        return self.d + 1

    def draw(
        self, n: int, generator: torch.Generator, n_points: int | None = None
    ) -> tuple[Float[Tensor, "task point d"], Float[Tensor, "task point"], Float[Tensor, "task d"]]:
        """Points, answers and weights of `n` tasks of `n_points` examples (None: the most); the last is the query."""
        k = 1 + (self.points[-1] if n_points is None else whole("n_points", n_points, 1))
        w = torch.randn(n, self.d, generator=generator)
        if self.inputs == "uniform":
            x = torch.rand(n, k, self.d, generator=generator) - 0.5
        else:
            x = torch.randn(n, k, self.d, generator=generator)
        noise = self.noise * torch.randn(n, k, generator=generator)
        return x, (x * w[:, None]).sum(-1) + noise, w

    def tokens(self, x: Float[Tensor, "task point d"], y: Float[Tensor, "task point"]) -> Batch:
        """The batch that shows these points."""
        return interleaved_tokens(x, y) if self.interleaved else regression_tokens(x, y)

    def points_at(self, step: int) -> int:
        """How many examples the rows of a step have."""
        if len(self.points) == 1:
            return self.points[0]
        grown = 1.0 if step >= self.curriculum else step / self.curriculum
        n_numbers = 1 + int(grown * (len(self.points) - 1))
        return self.points[int(torch.randint(n_numbers, (), generator=drawn_for(self.seed, f"points {step}")))]

    def batch(self, step: int, size: int) -> Batch:
        """Fresh tasks, all with the same number of examples."""
        x, y, _ = self.draw(whole("size", size, 1), drawn_for(self.seed, whole("step", step) + 1), self.points_at(step))
        return self.tokens(x, y)

    def held_out(self, size: int) -> Iterator[Batch]:
        """At least 512 tasks that no step draws; of a range, equally many for each number, whatever the curriculum.

        A batch has one number of examples.
        """
        whole("size", size, 1)
        for k in self.points:
            generator = drawn_for(self.seed, 0 if len(self.points) == 1 else f"held out {k}")
            x, y, _ = self.draw(-(-_EVALUATED // len(self.points)), generator, k)
            for some_x, some_y in zip(x.split(size), y.split(size), strict=True):
                yield self.tokens(some_x, some_y)

    def description(self) -> str:
        """What there is to learn."""
        first, last = self.points[0], self.points[-1]
        numbers = str(first) if first == last else f"{first} to {last}"
        return (
            f"linear regression in {self.d} dimensions from {numbers} examples in the context; no weights are "
            "shared between sequences, so that only an algorithm can be learned"
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        numbers = self.n_points if isinstance(self.n_points, int) else list(self.n_points)
        of_range = {} if isinstance(numbers, int) else {"curriculum": self.curriculum}
        return {
            "task": "in-context regression",
            "d": self.d,
            "n_points": numbers,
            "inputs": self.inputs,
            "noise": self.noise,
            "interleaved": self.interleaved,
            "seed": self.seed,
        } | of_range


def regression_tokens(x: Float[Tensor, "task point d"], y: Float[Tensor, "task point"]) -> Batch:
    """One token (x, y) for each point; the last one, whose y is the answer, shows 0 in its place.

    >>> regression_tokens(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[3.0, 6.0]])).inputs
    tensor([[[1., 3.],
             [2., 0.]]])
    """
    tokens = torch.cat([x, y[..., None]], -1)
    tokens[:, -1, -1] = 0
    counts = torch.zeros(y.shape, dtype=torch.bool)
    counts[:, -1] = True
    return Batch(tokens, y[..., None], counts)


def interleaved_tokens(x: Float[Tensor, "task point d"], y: Float[Tensor, "task point"]) -> Batch:
    """A token (x, 0) and a token (0, y) for each point, asked for y at every x; the last y is not shown.

    >>> interleaved_tokens(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[3.0, 6.0]])).inputs
    tensor([[[1., 0.],
             [0., 3.],
             [2., 0.]]])
    """
    n_tasks, n_points, d = x.shape
    tokens = x.new_zeros(n_tasks, 2 * n_points, d + 1)
    tokens[:, ::2, :d], tokens[:, 1::2, d] = x, y
    targets, counts = torch.zeros(tokens.shape[:2]), torch.zeros(tokens.shape[:2], dtype=torch.bool)
    targets[:, ::2], counts[:, ::2] = y, True
    return Batch(tokens[:, :-1], targets[:, :-1, None], counts[:, :-1])


def in_context_regression(
    d: int = 10,
    n_points: int | Sequence[int] = 10,
    *,
    inputs: Literal["uniform", "normal"] = "uniform",
    noise: float = 0.0,
    interleaved: bool = False,
    curriculum: int = 0,
    seed: int = 0,
) -> InContextRegression:
    """Linear regression from examples in the context, for models that read vectors (`VectorEmbed(d_in=d + 1)`).

    >>> data = in_context_regression(d=2, n_points=3)
    >>> batch = data.batch(0, 4)
    >>> batch.inputs.shape, batch.counts[0].tolist()
    (torch.Size([4, 4, 3]), [False, False, False, True])

    Without noise, least squares on at least `d` points has no error, and the ridge solution with the noise's variance
    has the smallest one with it.

    A pair as `n_points` is a range: the rows of each step have a number of examples from the first to the second. The
    upper end grows from the first to the second over `curriculum` steps, and is the second from then on:

    >>> data = in_context_regression(n_points=(5, 50), curriculum=90)
    >>> data.points_at(0), max(map(data.points_at, range(90, 400)))
    (5, 50)

    References: Garg et al. (2022), "What can transformers learn in-context?", section 2 (`interleaved`) and the
    curriculum over prompt lengths (theirs grows the number of dimensions, too);
    von Oswald et al. (2023), "Transformers learn in-context by gradient descent", section 3 (one vector a point).
    """
    whole("d", d, 1)
    numbers = _numbers_of_points(n_points)
    whole("curriculum", curriculum)
    if curriculum and isinstance(numbers, int):
        raise ArgumentError(
            "{curriculum} is the number of steps over which a range of {n_points} grows, such as (5, 50); got {0!r} "
            "examples in every context",
            numbers,
        )
    if inputs not in list(_INPUTS):
        raise did_you_mean("distribution of inputs", str(inputs), _INPUTS)
    flag("interleaved", interleaved)
    seed_number(seed)
    noise = real("noise", noise, 0.0)
    return InContextRegression(d, numbers, inputs, noise, interleaved, seed=seed, curriculum=int(curriculum))


def _numbers_of_points(n_points: int | Sequence[int]) -> int | tuple[int, int]:
    if not isinstance(n_points, Sequence) or isinstance(n_points, str):
        return whole("n_points", n_points, 1)
    if len(n_points) != 2 or whole("n_points", n_points[0], 1) > whole("n_points", n_points[1], 1):
        raise ArgumentError(
            "{n_points} is a number of examples, or the smallest and the largest, such as (5, 50); got {0}",
            f"{n_points!r:.80}",
        )
    return int(n_points[0]), int(n_points[1])

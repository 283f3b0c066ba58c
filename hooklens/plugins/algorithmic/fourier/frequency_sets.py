"""The smallest set of frequencies with which the logits are as good as the model's: how parsimonious is the circuit?"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import real, whole
from hooklens.core.errors import InputError
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import distinguished, fourier_basis, mean_by_sum
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.logit_formula import formula_logits
from hooklens.plugins.algorithmic.fourier.pair_table import PairTable, Task, as_table, tabulate
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table

MOST_SETS = 30_000  # restricted losses of one size that are tried exactly: about a second each for p = 113
_BATCH = 64  # sets that are tried together


@dataclass(frozen=True, eq=False)
class SmallestSet(Result):
    """The fewest frequencies whose restricted loss is at most `tolerance` above the model's loss on all pairs.

    `greedy` adds in each step the frequency that lowers the restricted loss most; `path` is the loss after 0, 1, 2, ...
    of them. `exact` is the best set of the smallest size at which any set is good enough, among all sets; None if sizes
    below that of `greedy` could not all be tried. All frequencies are always good enough: with them the logits are the
    mean over the pairs of each sum, and the cross-entropy is convex.
    """

    baselines = ("base",)
    terms = {"greedy loss": "restricted loss with this frequency and those above it"}

    modulus: int
    base: float
    tolerance: float
    greedy: Int[Tensor, "step"]
    path: Float[Tensor, "size"]
    exact: Int[Tensor, "used"] | None
    exact_loss: float

    @property
    def frequencies(self) -> list[int]:
        """The smallest set that is known: the exact one, or else the greedy one."""
        return sorted((self.greedy if self.exact is None else self.exact).tolist())

    @property
    def size(self) -> int:
        """The number of frequencies in it."""
        return len(self.frequencies)

    @property
    def is_exact(self) -> bool:
        """Whether every smaller set was tried."""
        return self.exact is not None

    def table(self, n: int | None = None) -> Table:
        """The greedy path, and whether a frequency is in the exact set."""
        exact = self.exact
        rows: list[tuple] = [("none", float(self.path[0]), None, 1)]
        for i, k in enumerate(self.greedy.tolist()):
            used = None if exact is None else ("no", "yes")[k in exact.tolist()]
            rows.append(
                (str(k), float(self.path[i + 1]), used, distinguished(self.modulus, self.greedy[: i + 1].tolist()))
            )
        return Table(("frequency", "greedy loss", "in the exact set", "answers"), rows).head(n)

    def figure(self) -> Any:
        """The restricted loss against the number of frequencies."""
        from hooklens.viz.curves import lines

        names = ", ".join(map(str, self.frequencies))
        best = "the smallest set" if self.is_exact else "the greedy set"
        title = f"Restricted loss by number of frequencies; {best} within {self.tolerance:.0%}: {names}"
        marks = {"the model, all pairs": self.base}
        return lines({"greedy": self.path}, title=title, x_title="frequencies", y_title="nats", marks=marks, log="y")


def find_smallest_set(
    model: HookedTransformer | PairTable, data: Task | None = None, *, tolerance: float = 0.01, most: int = MOST_SETS
) -> SmallestSet:
    """With how few frequencies is the restricted loss within `tolerance` (a share) of the model's loss on all pairs?

    The greedy set is always found. Then every smaller set is tried, size by size, as long as there are no more than
    `most` of a size. A model whose loss is not below ln p is refused: the constant alone would be as good.

    >>> from hooklens.plugins.algorithmic.fourier.logit_formula import formula_logits
    >>> from hooklens.plugins.algorithmic.fourier.pair_table import tabulate
    >>> smallest = find_smallest_set(tabulate(formula_logits(13, {2: 9.0, 5: 7.0})))
    >>> smallest.frequencies, smallest.is_exact
    ([2, 5], True)

    The measure is ours; the restricted loss is that of `restricted_loss`.
    """
    tolerance, most = real("tolerance", tolerance, 0.0), whole("most", most, 0)
    table = as_table(model, data, layer=None)
    if table.loss >= table.chance * (1 - 1e-9):  # equal to ln p but for rounding
        raise InputError(
            f"the loss on all pairs is {table.loss:.4g} nats, not below ln p = {table.chance:.4g}: the model does not "
            "generalise, and a constant is as good; use a model that grokked"
        )
    terms = _Terms(table.logits)
    rounding = 64 * torch.finfo(torch.float64).eps * float(table.logits.abs().max())
    goal = table.loss * (1 + tolerance) + rounding
    greedy, path = _greedy(terms, goal)
    exact = _exact(terms, goal, len(greedy), most)
    return SmallestSet(
        modulus=table.modulus,
        base=table.loss,
        tolerance=tolerance,
        greedy=torch.tensor(greedy, dtype=torch.long),
        path=torch.tensor(path, dtype=torch.float64),
        exact=None if exact is None else torch.tensor(exact[0], dtype=torch.long),
        exact_loss=float("nan") if exact is None else exact[1],
    )


class _Terms:
    """The constant and each frequency's (a + b) terms of the logits, as functions of the sum."""

    def __init__(self, logits: Float[Tensor, "a b answer"]):
        by_sum = mean_by_sum(logits)
        basis = fourier_basis(len(logits))
        self.constant = by_sum.mean(0)
        rows = [basis[2 * k - 1 : 2 * k + 1] for k in range(1, len(logits) // 2 + 1)]
        self.of = torch.stack([row.T @ (row @ by_sum) for row in rows])  # frequency s answer
        self.answers = torch.arange(len(logits))

    def losses(self, sets: list[list[int]]) -> Float[Tensor, "set"]:
        """The restricted loss of each set of equally many frequencies."""
        losses = []
        for start in range(0, len(sets), _BATCH):
            at = torch.tensor(sets[start : start + _BATCH], dtype=torch.long) - 1
            logits = self.constant + self.of[at].sum(1)
            right = logits[:, self.answers, self.answers]
            losses.append((logits.logsumexp(-1) - right).mean(1))
        return torch.cat(losses)


def _greedy(terms: _Terms, goal: float) -> tuple[list[int], list[float]]:
    chosen: list[int] = []
    path = [float(terms.losses([[]])[0])]
    while path[-1] > goal and len(chosen) < len(terms.of):
        others = [k for k in range(1, len(terms.of) + 1) if k not in chosen]
        losses = terms.losses([[*chosen, k] for k in others])
        chosen.append(others[int(losses.argmin())])
        path.append(float(losses.min()))
    return chosen, path


def _exact(terms: _Terms, goal: float, size: int, most: int) -> tuple[list[int], float] | None:
    """The best set of the smallest size that is good enough; None if a size has too many sets."""
    n = len(terms.of)
    for smaller in range(size + 1):
        if comb(n, smaller) > most:
            return None
        best = min((_best(terms, sets) for sets in _chunks(n, smaller)), key=lambda pair: pair[1])
        if best[1] <= goal:
            return best
    return None


def _chunks(n: int, size: int) -> Iterator[list[list[int]]]:
    sets = combinations(range(1, n + 1), size)
    while chunk := [list(chosen) for chosen in islice(sets, 4096)]:
        yield chunk


def _best(terms: _Terms, sets: list[list[int]]) -> tuple[list[int], float]:
    losses = terms.losses(sets)
    return sets[int(losses.argmin())], float(losses.min())


def demo(model: HookedTransformer) -> SmallestSet | Needs:
    """Planted logits of as many answers as the model has numbers: an untrained model itself would be refused."""
    p = demo_modulus(model)
    return p if isinstance(p, Needs) else find_smallest_set(tabulate(formula_logits(p, {1: 5.0})))

"""Modular arithmetic: "a b =" and its answer modulo p, all pairs split once into training and held-out ones."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import flag, seed_number, seeded, whole
from hooklens.core.errors import ArgumentError, InputError, did_you_mean
from hooklens.data.batches import Batch, TrainingData, drawn_for, epoch_rows

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

SIGNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"+": torch.add, "-": torch.sub, "x": torch.mul}


@dataclass(frozen=True)
class Modular(TrainingData):
    """The table of an operation modulo `p`. Tokens 0 to p - 1 are numbers, `p` the equals sign.

    The pairs are shuffled once by the seed; the first share of them is for training, the rest is held out. With
    `shuffled` the answers of the table are permuted, by the same seed: a control in which there is no rule to find.
    """

    p: int
    operation: str
    fraction: float
    seed: int
    shuffled: bool = False

    @property
    def d_vocab(self) -> int:
        """Numbers and the equals sign; answers are the first `p` of them."""
        return self.p + 1

    @property
    def vocabulary(self) -> list[str]:
        """What each token stands for."""
        return [*map(str, range(self.p)), "="]

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """Reads and writes prompts with spaces between the tokens, such as `3 4 =`."""
        from hooklens.data.vocabularies import spaced_tokenizer

        return spaced_tokenizer(self.vocabulary)

    @cached_property
    def pairs(self) -> tuple[Int[Tensor, "train_pair 2"], Int[Tensor, "held_out_pair 2"]]:
        """The pairs (a, b) of training and the held-out ones: together all p x p, each once."""
        order = torch.randperm(self.p**2, generator=seeded(self.seed))
        every = torch.stack([order // self.p, order % self.p], 1)
        n = share_of(self.p**2, self.fraction)
        return every[:n], every[n:]

    @cached_property
    def table(self) -> Int[Tensor, "a b"]:
        """The answer to every pair (a, b)."""
        numbers = torch.arange(self.p)
        answers = SIGNS[self.operation](numbers[:, None], numbers[None]) % self.p
        if not self.shuffled:
            return answers
        order = torch.randperm(self.p**2, generator=drawn_for(self.seed, "shuffled answers"))
        return answers.flatten()[order].view(self.p, self.p)

    def answers(self, pairs: Int[Tensor, "some 2"]) -> Int[Tensor, "some"]:
        """The answer of each pair."""
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int64, torch.int32):
            raise InputError(f"pairs are whole numbers [pair 2], in int64; got {pairs.dtype} {list(pairs.shape)}")
        if len(pairs) and not 0 <= int(pairs.min()) <= int(pairs.max()) < self.p:
            raise InputError(f"pairs are numbers from 0 to {self.p - 1}, got {int(pairs.min())} to {int(pairs.max())}")
        return self.table[pairs[:, 0], pairs[:, 1]]

    def examples(self, pairs: Int[Tensor, "pair 2"]) -> Batch:
        """Prompts "a b =" with the answer at the last position, the only one that counts."""
        answers = self.answers(pairs)
        inputs = torch.cat([pairs, torch.full_like(pairs[:, :1], self.p)], 1)
        counts = torch.zeros(inputs.shape, dtype=torch.bool)
        counts[:, -1] = True
        return Batch(inputs, torch.where(counts, answers[:, None], 0), counts)

    @cached_property
    def _all(self) -> Batch:
        return self.examples(self.pairs[0])

    def batch(self, step: int, size: int) -> Batch:
        """`size` training pairs; all of them in every step if there are no more than `size`."""
        train, _ = self.pairs
        whole("step", step)
        if whole("size", size, 1) >= len(train):
            return self._all
        return self.examples(train[epoch_rows(step, size, len(train), self.seed)])

    def held_out(self, size: int) -> Iterator[Batch]:
        """The held-out pairs."""
        for pairs in self.pairs[1].split(whole("size", size, 1)) if len(self.pairs[1]) else ():
            yield self.examples(pairs)

    def description(self) -> str:
        """What there is to learn."""
        if self.shuffled:
            return (
                f"the answers of a {self.operation} b modulo {self.p}, permuted over the table, from "
                f"{self.fraction:.0%} of all {self.p**2} pairs: a control in which no rule answers the others"
            )
        return (
            f"a {self.operation} b modulo {self.p}, from {self.fraction:.0%} of all {self.p**2} pairs; the others can "
            "only be answered by a rule"
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        known = {
            "task": "modular",
            "p": self.p,
            "operation": self.operation,
            "fraction": self.fraction,
            "seed": self.seed,
        }
        return known | {"shuffled": True} if self.shuffled else known


def modular_arithmetic(
    p: int = 113,
    *,
    operation: Literal["+", "-", "x"] = "+",
    fraction: float = 0.3,
    seed: int = 0,
    shuffled: bool = False,
) -> Modular:
    """Addition, subtraction or multiplication modulo `p`, with a fraction of all pairs to train on.

    >>> data = modular_arithmetic(p=5, fraction=0.8)
    >>> [len(pairs) for pairs in data.pairs], data.d_vocab
    ([20, 5], 6)

    `shuffled` permutes the answers over the whole table: each answer is as frequent as before, the training pairs can
    be memorised as well, and nothing can be known about the others.

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 3.
    """
    p, seed = whole("p", p, 2), seed_number(seed)
    if operation not in list(SIGNS):  # a list compares what has no hash
        raise did_you_mean("operation", str(operation), SIGNS)
    return Modular(p, operation, check_fraction(fraction, p**2), seed, flag("shuffled", shuffled))


def check_fraction(fraction: Any, n_pairs: int) -> float:
    """Return the share of pairs to train on, which must leave at least one pair to train on.

    >>> check_fraction(0.5, 25)
    0.5
    """
    good = isinstance(fraction, Real) and not isinstance(fraction, bool)
    if not good or not 0 < fraction <= 1 or share_of(n_pairs, fraction) < 1:
        raise ArgumentError(
            "{fraction} is the share of all {0} pairs to train on, above 0, at most 1, and at least one pair; got {1}",
            *(n_pairs, f"{fraction!r:.60}"),
        )
    return float(fraction)


def share_of(n_pairs: int, fraction: float) -> int:
    """A share of a number of pairs, rounded down.

    >>> share_of(12769, 0.3), share_of(100, 0.29)          # 3830.7, and 29 that a product of floats just misses
    (3830, 29)
    """
    return math.floor(round(fraction * n_pairs, 6))

"""Decimal arithmetic as text: "12+34=46", one token a character."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import torch

from hooklens.core.arguments import seed_number, whole
from hooklens.core.errors import ArgumentError, did_you_mean
from hooklens.data.batches import Batch, TrainingData, hashed_share, share

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

END = "."
_CHARACTERS = "0123456789+-x=" + END
_SIGNS = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}
_LISTED = 2  # digits up to which all problems are listed: 10,000 of them
_LEAST, _MOST = 0.001, 0.9  # shares with which problems of either part are found by drawing
_EVALUATED = 256  # held-out problems, or all if there are fewer


@dataclass(frozen=True)
class DecimalArithmetic(TrainingData):
    """Problems with numbers of up to `digits` digits; the answer and the mark that ends it, and nothing else, count.

    A problem is held out by a hash of its numbers, so that no table of all problems is needed.
    """

    digits: int
    operation: str
    reverse: bool
    zeros: bool
    held_out_fraction: float
    seed: int

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """One token for each character."""
        from hooklens.data.vocabularies import character_tokenizer

        return character_tokenizer(_CHARACTERS)

    @property
    def vocabulary(self) -> list[str]:
        """What each token stands for: digits, signs, and the mark that ends an answer."""
        return list(_CHARACTERS)

    @property
    def d_vocab(self) -> int:
        """The number of characters."""
        return len(_CHARACTERS)

    @property
    def answer_width(self) -> int:
        """Characters of the longest answer, its sign included."""
        return 2 * self.digits if self.operation == "x" else self.digits + 1

    @property
    def width(self) -> int:
        """Characters of the longest problem, with its answer and the mark that ends it."""
        return 2 * self.digits + 2 + self.answer_width + 1

    def problem(self, a: int, b: int) -> str:
        """The problem with its answer.

        >>> decimal_arithmetic(2).problem(12, 34), decimal_arithmetic(2, reverse=True).problem(12, 34)
        ('12+34=46', '12+34=64')
        >>> decimal_arithmetic(2, operation="-", zeros=True).problem(3, 34)
        '03-34=-31'
        """
        value = _SIGNS[self.operation](a, b)
        length, answer_length = (self.digits, self.answer_width - (value < 0)) if self.zeros else (1, 1)
        answer = f"{'-' if value < 0 else ''}{abs(value):0{answer_length}d}"
        return f"{a:0{length}d}{self.operation}{b:0{length}d}={answer[::-1] if self.reverse else answer}"

    def is_held_out(self, a: int, b: int) -> bool:
        """Whether a problem is never trained on."""
        return hashed_share(self.seed, f"{a}{self.operation}{b}") < self.held_out_fraction

    @cached_property
    def held_out_problems(self) -> list[tuple[int, int]]:
        """256 of the held-out problems, or all where there are fewer; each once."""
        draw = random.Random(f"{self.seed} held out")
        if self.digits <= _LISTED:
            numbers = range(10**self.digits)
            every = [(a, b) for a, b in product(numbers, numbers) if self.is_held_out(a, b)]
            return draw.sample(every, min(_EVALUATED, len(every)))
        problems: dict[tuple[int, int], None] = {}
        while len(problems) < _EVALUATED:
            problems[self._drawn(draw, held_out=True)] = None
        return list(problems)

    def _drawn(self, draw: random.Random, *, held_out: bool) -> tuple[int, int]:
        while True:
            a, b = draw.randrange(10**self.digits), draw.randrange(10**self.digits)
            if self.is_held_out(a, b) == held_out:
                return a, b

    def examples(self, problems: list[tuple[int, int]]) -> Batch:
        """The problems as rows of one length, filled with the end mark; only the first mark of a row counts."""
        tokens = torch.full((len(problems), self.width), self.vocabulary.index(END))
        counts = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (a, b) in enumerate(problems):
            text = self.problem(a, b)
            tokens[row, : len(text)] = torch.tensor([_CHARACTERS.index(character) for character in text])
            counts[row, text.index("=") + 1 : len(text) + 1] = True
        return Batch(tokens[:, :-1], tokens[:, 1:], counts[:, 1:])

    def batch(self, step: int, size: int) -> Batch:
        """Fresh problems that are not held out."""
        draw = random.Random(f"{self.seed} train {step}")
        return self.examples([self._drawn(draw, held_out=False) for _ in range(size)])

    def held_out(self, size: int) -> Iterator[Batch]:
        """The `held_out_problems`."""
        for start in range(0, len(self.held_out_problems), size):
            yield self.examples(self.held_out_problems[start : start + size])

    def description(self) -> str:
        """What there is to learn."""
        order = ", the answer from its last digit to its first" if self.reverse else ""
        return (
            f"a {self.operation} b for numbers of up to {self.digits} digits, written as text{order}: the digits, "
            "their carries, and where to stop"
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        return {
            "task": "decimal arithmetic",
            "digits": self.digits,
            "operation": self.operation,
            "reverse": self.reverse,
            "zeros": self.zeros,
            "held_out": self.held_out_fraction,
            "seed": self.seed,
        }


def decimal_arithmetic(
    digits: int = 2,
    *,
    operation: Literal["+", "-", "x"] = "+",
    reverse: bool = False,
    zeros: bool = False,
    held_out: float = 0.1,
    seed: int = 0,
) -> DecimalArithmetic:
    """Sums, differences or products of numbers as text.

    `reverse` writes answers from the last digit, the order in which carries arise; `zeros` fills all numbers with
    zeros, so that a digit's place is its position. A share `held_out` of all problems is never trained on.

    >>> data = decimal_arithmetic(2)
    >>> batch = data.batch(0, 1)
    >>> batch.inputs.shape, data.tokenizer.to_string(batch.targets[batch.counts])[-1]
    (torch.Size([1, 9]), '.')

    Reference: Lee et al. (2023), "Teaching arithmetic to small transformers", section 3.
    """
    whole("digits", digits, 1)
    seed_number(seed)
    if operation not in _SIGNS:
        raise did_you_mean("operation", operation, _SIGNS)
    held_out = share("held_out", held_out, "all problems")
    data = DecimalArithmetic(digits, operation, reverse, zeros, held_out, seed=seed)
    if (
        not _LEAST <= held_out <= _MOST
        or not data.held_out_problems
        or len(data.held_out_problems) == 10 ** (2 * digits)
    ):
        raise ArgumentError(
            "{held_out} leaves problems to train on and to hold out if it is from {0} to {1}; got {2} of {3} problems",
            *(_LEAST, _MOST, held_out, f"{10 ** (2 * digits):,}"),
        )
    return data

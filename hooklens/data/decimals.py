"""Decimal arithmetic as text: "12+34=46", one token a character."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from hooklens.core.arguments import seed_number, whole
from hooklens.core.errors import InputError, did_you_mean
from hooklens.data.batches import Batch, TrainingData

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

_CHARACTERS = "0123456789+-x="
_SIGNS = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}


@dataclass(frozen=True)
class DecimalSums(TrainingData):
    """Problems with numbers of up to `digits` digits; the answer's digits, and nothing else, count.

    A problem belongs to the held-out ones by a hash of its numbers, so that no table of all problems is needed.
    """

    digits: int
    operation: str
    reverse: bool
    held_out_fraction: float
    seed: int

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """One token for each character."""
        from hooklens.data.vocabularies import character_tokenizer

        return character_tokenizer(_CHARACTERS)

    @property
    def d_vocab(self) -> int:
        """Digits, signs and the equals sign."""
        return len(_CHARACTERS)

    @property
    def width(self) -> int:
        """Characters of the longest answer, its sign included."""
        longest = {"+": self.digits + 1, "-": self.digits + 1, "x": 2 * self.digits}
        return longest[self.operation]

    def problem(self, a: int, b: int) -> str:
        """The problem with its answer, all numbers filled with zeros to one length.

        >>> DecimalSums(2, "+", False, 0.1, 0).problem(12, 34), DecimalSums(2, "+", True, 0.1, 0).problem(12, 34)
        ('12+34=046', '12+34=640')
        """
        value = _SIGNS[self.operation](a, b)
        answer = f"{'-' if value < 0 else ''}{abs(value):0{self.width - (value < 0)}d}"
        answer = answer[::-1] if self.reverse else answer
        return f"{a:0{self.digits}d}{self.operation}{b:0{self.digits}d}={answer}"

    def is_held_out(self, a: int, b: int) -> bool:
        """Whether a problem is never trained on."""
        return random.Random(f"{self.seed} {a} {b}").random() < self.held_out_fraction

    def _draw(self, size: int, seed: str, held_out: bool) -> Batch:
        draw, texts = random.Random(f"{self.seed} {seed}"), []
        while len(texts) < size:
            a, b = draw.randrange(10**self.digits), draw.randrange(10**self.digits)
            if self.is_held_out(a, b) == held_out:
                texts.append(self.problem(a, b))
        tokens = torch.tensor([[_CHARACTERS.index(character) for character in text] for text in texts])
        counts = torch.zeros(tokens[:, 1:].shape, dtype=torch.bool)
        counts[:, -self.width :] = True
        return Batch(tokens[:, :-1], tokens[:, 1:], counts)

    def batch(self, step: int, size: int) -> Batch:
        """Fresh problems that are not held out."""
        return self._draw(size, f"train {step}", held_out=False)

    def held_out(self, size: int) -> Iterator[Batch]:
        """256 of the held-out problems."""
        for i, start in enumerate(range(0, 256, size)):
            yield self._draw(min(size, 256 - start), f"held out {i}", held_out=True)

    def description(self) -> str:
        """What there is to learn."""
        order = ", the answer from its last digit to its first" if self.reverse else ""
        return f"a {self.operation} b for numbers of {self.digits} digits, as text{order}"

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        return {
            "task": "decimal sums",
            "digits": self.digits,
            "operation": self.operation,
            "reverse": self.reverse,
            "held_out": self.held_out_fraction,
            "seed": self.seed,
        }


def decimal_arithmetic(
    digits: int = 2,
    *,
    operation: Literal["+", "-", "x"] = "+",
    reverse: bool = False,
    held_out: float = 0.1,
    seed: int = 0,
) -> DecimalSums:
    """Sums, differences or products of numbers as text; `reverse` writes answers from the last digit.

    >>> data = decimal_arithmetic(2)
    >>> data.tokenizer.to_string(data.batch(0, 1).inputs)[0][2::3]
    '+='
    """
    whole("digits", digits, 1)
    seed_number(seed)
    if operation not in _SIGNS:
        raise did_you_mean("operation", operation, _SIGNS)
    if not 0 < held_out < 1:
        raise InputError(
            f"held_out is the share of problems that are never trained on, between 0 and 1; got {held_out}"
        )
    return DecimalSums(digits, operation, reverse, held_out, seed)

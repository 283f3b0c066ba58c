"""Repeated random tokens: sequences in which the next token can be predicted only from the sequence itself."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import seed_number, seeded, whole
from hooklens.core.errors import InputError
from hooklens.data.batches import Batch, TrainingData, drawn_for, next_token_batch
from hooklens.metrics import MinusLoss
from hooklens.model.config import TokenEmbed
from hooklens.model.transformer import HookedTransformer

_EVALUATED = 64  # held-out sequences


@dataclass(frozen=True)
class Repeated:
    """A first token, followed by a random pattern that repeats; `period` is the length of each sequence's pattern.

    No token occurs twice in a pattern. In every sequence, the token after each position from `first_query` on is a
    repeat; the first `first_part` tokens contain no repeat.
    """

    tokens: Int[Tensor, "sequence pos"]
    period: Int[Tensor, "sequence"]

    @property
    def first_query(self) -> int:
        """The first position from which the next token is a repeat in every sequence."""
        return 1 + int(self.period.max())

    @property
    def first_part(self) -> int:
        """The number of tokens before the first repeat of any sequence."""
        return 1 + int(self.period.min())

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: Any) -> "Repeated":
        """The sequences on a device."""
        return Repeated(self.tokens.to(device), self.period)

    def part(self, start: int, stop: int) -> "Repeated":
        """The sequences from `start` to `stop`."""
        return Repeated(self.tokens[start:stop], self.period[start:stop])

    def metric(self) -> "MinusRepeatLoss":
        """Minus the mean loss at the positions where the next token is a repeat."""
        return MinusRepeatLoss(torch.full((len(self),), -1), self.tokens, self.first_query)


@dataclass(frozen=True, eq=False)
class MinusRepeatLoss(MinusLoss):
    """Minus the mean next-token cross-entropy where the next token is a repeat, in nats a token."""


def repeated_tokens(
    source: HookedTransformer | int, n: int = 8, *, length: int = 25, period: int | None = None, seed: int = 0
) -> Repeated:
    """`n` sequences of random tokens that repeat with a period between a third and a half of the length.

    `source` is a model, or the size of a vocabulary. The period differs between sequences, so that a head that attends
    a fixed distance back is not mistaken for an induction head. Sequences begin with the tokenizer's BOS, or else with
    a random token that occurs nowhere else; special tokens are not drawn. Short contexts and small vocabularies shorten
    the sequences.

    >>> from hooklens.testing import induction_model
    >>> sequences = repeated_tokens(induction_model(), 2, length=9)
    >>> sequences.tokens.shape, sequences.period.tolist(), sequences.first_query
    (torch.Size([2, 9]), [3, 4], 5)
    >>> torch.equal(sequences.tokens[1, 1:5], sequences.tokens[1, 5:9])
    True
    >>> repeated_tokens(50, 2, length=9).period.tolist()
    [3, 4]
    """
    if isinstance(source, HookedTransformer):
        if not isinstance(source.cfg.embed, TokenEmbed):
            raise InputError(
                "repeated tokens need a model that reads tokens, and this model reads vectors; give prompts to a "
                "method that takes them, such as hl.heads.score_heads(model, prompts)"
            )
        usable, first = _usable(source)
        return _drawn(_Plan(usable, first, source.cfg.n_ctx), n, length, period, seed).to(source.device)
    return _drawn(_Plan(torch.arange(whole("source", source, 2)), None, None), n, length, period, seed)


@dataclass(frozen=True)
class _Plan:
    """What is drawn from: the tokens, the one that begins a sequence if there is one, and the longest sequence."""

    usable: Int[Tensor, "token"]
    first: int | None
    n_ctx: int | None


def _drawn(plan: _Plan, n: int, length: int, period: int | None, seed: int) -> Repeated:
    usable, first = plan.usable, plan.first
    n, length = whole("n", n), min(whole("length", length), plan.n_ctx or length)
    longest = min((length - 1) // 2, len(usable) - (first is None))
    longest = longest if period is None else whole("period", period)
    if n < 1 or longest < 1 or 2 * longest + 1 > length or longest > len(usable) - (first is None):
        within = "" if plan.n_ctx is None else f"n_ctx {plan.n_ctx} and "
        raise InputError(
            f"cannot draw {n} sequences of {length} tokens with a period of {longest}: the period must fit twice after "
            f"the first token, with {within}{len(usable)} tokens to draw from"
        )
    shortest = max(1, -(-2 * longest // 3)) if period is None else period
    generator = seeded(seed)
    # all periods equally often, so that even two sequences have different ones
    periods = shortest + (torch.arange(n) + longest - shortest - n + 1) % (longest - shortest + 1)
    rows = [_row(usable, first, int(p), length, generator) for p in periods]
    return Repeated(torch.stack(rows), periods)


def _row(
    usable: Int[Tensor, "token"], first: int | None, period: int, length: int, generator: torch.Generator
) -> Int[Tensor, "pos"]:
    drawn = usable[torch.randperm(len(usable), generator=generator)[: period + 1]]
    start = drawn[-1:] if first is None else torch.tensor([first])
    return torch.cat([start, drawn[:period].repeat(-(-(length - 1) // period))[: length - 1]])


def _usable(model: HookedTransformer) -> tuple[Int[Tensor, "token"], int | None]:
    """The tokens that may be drawn, and the token that begins a text, if there is one."""
    every = torch.arange(min(model.cfg.d_vocab, model.cfg.d_vocab_out))
    tokenizer = model.tokenizer
    if tokenizer is None:
        return every, None
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, *tokenizer.stop_ids)
    special = torch.tensor([i for i in ids if i is not None], dtype=torch.long)
    return every[~torch.isin(every, special)], tokenizer.bos_id


@dataclass(frozen=True)
class RandomRepeats(TrainingData):
    """Sequences of `repeated_tokens`, drawn anew for every step; what counts is the tokens that repeat.

    Of a sequence with period p, the tokens from p + 2 on count: by then a token has come back, and what followed it the
    first time follows again.
    """

    d_vocab: int
    length: int
    period: int | None
    seed: int

    @property
    def vocabulary(self) -> list[str]:
        """What each token stands for: its number."""
        return [str(token) for token in range(self.d_vocab)]

    def _drawn(self, size: int, nth: int) -> Batch:
        seed = int(torch.randint(2**32, (1,), generator=drawn_for(self.seed, nth)))
        repeated = repeated_tokens(self.d_vocab, size, length=self.length, period=self.period, seed=seed)
        batch = next_token_batch(repeated.tokens)
        return replace(batch, counts=torch.arange(self.length - 1) > repeated.period[:, None])

    def batch(self, step: int, size: int) -> Batch:
        """Fresh sequences."""
        return self._drawn(size, step + 1)

    def held_out(self, size: int) -> Iterator[Batch]:
        """64 sequences of a draw that no step makes."""
        batch = self._drawn(_EVALUATED, 0)
        for start in range(0, _EVALUATED, size):
            yield batch.rows(start, start + size)

    def description(self) -> str:
        """What there is to learn."""
        return (
            f"to find the last token earlier in the context and copy what followed it (induction), with {self.d_vocab} "
            f"random tokens; guessing costs {math.log(self.d_vocab):.4f} nats, the algorithm none"
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        return {
            "task": "random repeats",
            "d_vocab": self.d_vocab,
            "length": self.length,
            "period": self.period,
            "seed": self.seed,
        }


def random_repeats(d_vocab: int = 64, *, length: int = 33, period: int | None = None, seed: int = 0) -> RandomRepeats:
    """Repeated random tokens to train on: the data on which induction heads form.

    >>> data = random_repeats(20, length=9, period=4)
    >>> batch = data.batch(0, 2)
    >>> torch.equal(batch.targets[batch.counts], batch.inputs[:, 2:5].flatten())
    True

    Reference: Olsson et al. (2022), "In-context learning and induction heads", "Argument 4".
    """
    seed_number(seed)
    repeated_tokens(whole("d_vocab", d_vocab, 2), 1, length=length, period=period)  # raises where it cannot be drawn
    return RandomRepeats(d_vocab, length, period, seed)

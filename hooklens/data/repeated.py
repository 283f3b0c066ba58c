"""Repeated random tokens: sequences in which the next token can be predicted only from the sequence itself."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError
from hooklens.metrics import MinusLoss
from hooklens.model.config import TokenEmbed
from hooklens.model.transformer import HookedTransformer


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
    model: HookedTransformer, n: int = 8, *, length: int = 25, period: int | None = None, seed: int = 0
) -> Repeated:
    """`n` sequences of random tokens that repeat with a period between a third and a half of the length.

    The period differs between sequences, so that a head that attends a fixed distance back is not mistaken for an
    induction head. Sequences begin with the tokenizer's BOS, or else with a random token that occurs nowhere else;
    special tokens are not drawn. Short contexts and small vocabularies shorten the sequences.

    >>> from hooklens.testing import induction_model
    >>> sequences = repeated_tokens(induction_model(), 2, length=9)
    >>> sequences.tokens.shape, sequences.period.tolist(), sequences.first_query
    (torch.Size([2, 9]), [3, 4], 5)
    >>> torch.equal(sequences.tokens[1, 1:5], sequences.tokens[1, 5:9])
    True
    """
    if not isinstance(model.cfg.embed, TokenEmbed):
        raise InputError("repeated tokens need a model that reads tokens, and this model reads vectors; give prompts")
    usable, first = _usable(model)
    n, length = whole("n", n), min(whole("length", length), model.cfg.n_ctx)
    longest = min((length - 1) // 2, len(usable) - (first is None))
    longest = longest if period is None else period
    if n < 1 or longest < 1 or 2 * longest + 1 > length or longest > len(usable) - (first is None):
        raise InputError(
            f"cannot draw {n} sequences of {length} tokens with a period of {longest}: the period must fit twice after "
            f"the first token, with n_ctx {model.cfg.n_ctx} and {len(usable)} tokens to draw from"
        )
    shortest = max(1, -(-2 * longest // 3)) if period is None else period
    generator = seeded(seed)
    # all periods equally often, so that even two sequences have different ones
    periods = shortest + (torch.arange(n) + longest - shortest - n + 1) % (longest - shortest + 1)
    rows = [_row(usable, first, int(p), length, generator) for p in periods]
    return Repeated(torch.stack(rows).to(model.device), periods)


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

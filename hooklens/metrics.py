"""Metrics: functions of logits, one value a prompt pair, higher meaning more like clean.

Any function of logits `[pair pos d_vocab]` is a metric. The ones here also say what they read, which lets a sweep skip
the rest of the unembedding.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import ArgumentError, InputError, WrongType
from hooklens.core.precision import widened
from hooklens.data.prompts import show
from hooklens.model.transformer import HookedTransformer, need_hooked

Read = Float[Tensor, "row read token"]
Values = Float[Tensor, "row"]
MetricFn = Callable[[Float[Tensor, "pair pos d_vocab"]], Tensor]
Answers = str | int | Sequence[str] | Sequence[int] | Tensor


class Reads(NamedTuple):
    """What a metric reads: positions `[pair read]` (negative: from the end), tokens `[pair token]` or None for all."""

    pos: Int[Tensor, "pair read"]
    tokens: Int[Tensor, "pair token"] | None


@runtime_checkable
class ReadingMetric(Protocol):
    """A metric that says what it reads; `pairs(index)` is the same metric for these pairs, one row each."""

    @property
    def reads(self) -> Reads: ...
    def on_read(self, logits: Read) -> Values: ...
    def pairs(self, index: Int[Tensor, "row"]) -> "ReadingMetric": ...


@dataclass(frozen=True, eq=False)
class _AtPosition(ABC):
    """A metric of the logits at one position of each prompt (default: the last)."""

    pos: Int[Tensor, "pair"]

    def __call__(self, logits: Float[Tensor, "pair pos d_vocab"]) -> Values:
        """One value a pair, from full logits."""
        if len(self.pos) not in (1, len(logits)):
            raise InputError(f"the metric was made for {len(self.pos)} pairs, and got logits of {len(logits)}")
        this = self.pairs(torch.arange(len(logits)))
        pos, tokens = (None if part is None else part.to(logits.device) for part in this.reads)
        rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
        read = logits[rows, pos]
        return this.on_read(read if tokens is None else read.gather(2, tokens[:, None].expand(-1, read.shape[1], -1)))

    def pairs(self, index: Int[Tensor, "row"]) -> Any:
        """The same metric with one row for each of these pairs; a metric of one pair serves any number."""
        changed = {
            name: value[index] if len(value) > 1 else value.expand(len(index), *value.shape[1:])
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    @property
    def reads(self) -> Reads:
        return Reads(self.pos[:, None], self._tokens())

    def _tokens(self) -> Int[Tensor, "pair token"] | None:
        return None

    @abstractmethod
    def on_read(self, logits: Read) -> Values:
        """One value a row, from the logits that it reads."""


@dataclass(frozen=True, eq=False)
class LogitDiff(_AtPosition):
    """logit(answer) - logit(wrong_answer), in nats of log odds."""

    answer: Int[Tensor, "pair"]
    wrong_answer: Int[Tensor, "pair"]

    def _tokens(self) -> Int[Tensor, "pair token"]:
        return torch.stack([self.answer, self.wrong_answer], dim=1)

    def on_read(self, logits: Read) -> Values:
        pair = widened(logits[:, 0])
        return pair[:, 0] - pair[:, 1]


@dataclass(frozen=True, eq=False)
class Prob(_AtPosition):
    """The probability of the answer."""

    answer: Int[Tensor, "pair"]

    def on_read(self, logits: Read) -> Values:
        return widened(logits[:, 0]).softmax(-1).gather(1, self.answer.to(logits.device)[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class LogProb(_AtPosition):
    """The log-probability of the answer, in nats: minus the loss."""

    answer: Int[Tensor, "pair"]

    def on_read(self, logits: Read) -> Values:
        return widened(logits[:, 0]).log_softmax(-1).gather(1, self.answer.to(logits.device)[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class MinusKL(_AtPosition):
    """-KL(reference || model) at one position, in nats; 0 where the model predicts as the reference does."""

    log_probs: Float[Tensor, "pair d_vocab"]

    def on_read(self, logits: Read) -> Values:
        said = widened(logits[:, 0]).log_softmax(-1)
        target = self.log_probs.to(said)
        return -(target.exp() * (target - said)).sum(-1)


@dataclass(frozen=True, eq=False)
class MinusLoss(_AtPosition):
    """Minus the mean next-token cross-entropy over the whole prompt, in nats a token."""

    tokens: Int[Tensor, "pair pos"]

    @property
    def reads(self) -> Reads:
        n = self.tokens.shape[1] - 1
        return Reads(torch.arange(n).expand(len(self.tokens), n), None)

    def on_read(self, logits: Read) -> Values:
        targets = self.tokens[:, 1:].to(logits.device)
        return widened(logits).log_softmax(-1).gather(2, targets[..., None])[..., 0].mean(1)


def logit_diff(
    model: HookedTransformer, *, answer: Answers, wrong_answer: Answers, pos: int | Sequence[int] = -1
) -> LogitDiff:
    """How much more the model says `answer` than `wrong_answer`, as a difference of logits; one answer or one a pair.

    >>> from hooklens.testing import tiny_model
    >>> metric = logit_diff(tiny_model(), answer=3, wrong_answer=4)
    >>> logits = torch.zeros(1, 5, 11); logits[0, -1, 3] = 2.0
    >>> metric(logits)
    tensor([2.])

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 3.
    """
    right, wrong = answer_ids(model, answer, "answer"), answer_ids(model, wrong_answer, "wrong_answer")
    check_answers_differ(model, right, wrong)
    return LogitDiff(*_one_a_pair(pos=torch.as_tensor(pos), answer=right, wrong_answer=wrong))


def prob(model: HookedTransformer, *, answer: Answers, pos: int | Sequence[int] = -1) -> Prob:
    """The probability that the model gives `answer`, between 0 and 1."""
    return Prob(*_one_a_pair(pos=torch.as_tensor(pos), answer=answer_ids(model, answer)))


def log_prob(model: HookedTransformer, *, answer: Answers, pos: int | Sequence[int] = -1) -> LogProb:
    """The log-probability that the model gives `answer`, in nats."""
    return LogProb(*_one_a_pair(pos=torch.as_tensor(pos), answer=answer_ids(model, answer)))


def kl(model: HookedTransformer, reference: Any, *, pos: int = -1) -> MinusKL:
    """Minus the KL divergence, in nats, from the model's own prediction on the `reference` prompts (usually clean).

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(); tokens = torch.tensor([[1, 2, 3]])
    >>> abs(kl(model, tokens)(model(tokens)).item()) < 1e-6
    True
    """
    with torch.no_grad():
        log_probs = widened(model(reference, logits_at=pos)[:, 0]).log_softmax(-1)
    return MinusKL(torch.full((len(log_probs),), pos), log_probs)


def loss(model: HookedTransformer, tokens: Any) -> MinusLoss:
    """Minus the mean next-token cross-entropy on `tokens`, in nats a token (minus, so that higher is better)."""
    texts = [tokens] if isinstance(tokens, str) else tokens
    if not isinstance(texts, Tensor) and all(isinstance(text, str) for text in texts):
        rows = [model.to_tokens(text)[0] for text in texts]
        if len({len(row) for row in rows}) != 1:
            raise InputError(
                f"loss reads every token, so prompts must be of one length, got {[len(row) for row in rows]} tokens; "
                "patch each length on its own, or use log_prob of the answer"
            )
        texts = torch.stack(rows)
    ids = torch.atleast_2d(torch.as_tensor(texts, device=model.device))
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise InputError(f"loss needs prompts [pair pos] of at least two tokens, got {list(ids.shape)}")
    return MinusLoss(torch.full((len(ids),), -1), ids)


def recovered(values: Tensor, clean: float, corrupted: float) -> Tensor:
    """The share of the clean-corrupted difference that a value restores: 0 at corrupted, 1 at clean."""
    return (values - corrupted) / (clean - corrupted)


def answer_ids(model: HookedTransformer, answer: Answers, name: str = "answer") -> Int[Tensor, "pair"]:
    """Token ids of one answer or several; a text of several tokens is refused, with its tokens shown."""
    need_hooked(model, "an answer")
    is_many = isinstance(answer, list | tuple) or (isinstance(answer, Tensor) and answer.ndim > 0)
    many: list[Any] = list(answer) if is_many else [answer]  # type: ignore[arg-type]
    ids = torch.tensor([_token_id(model, one, name) for one in many])
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= model.cfg.d_vocab_out:
        raise ArgumentError(
            f"{{{name}}} must be tokens between 0 and {{0}}, got {{1!r}}", model.cfg.d_vocab_out - 1, answer
        )
    return ids


def check_answers_differ(model: HookedTransformer, answer: Int[Tensor, "pair"], wrong: Int[Tensor, "wrong"]) -> None:
    """One token in both places is refused: their difference is 0, whatever the model says."""
    n = max(len(answer), len(wrong))
    if min(len(answer), len(wrong)) not in (1, n):
        return  # another error, which says how many there are
    same = (answer.cpu() == wrong.cpu()).expand(n).nonzero().flatten().tolist()
    if same:
        shown = show(model, answer[same[0] % len(answer)][None])[0]
        where = f" (pair {same[0]})" if n > 1 else ""
        raise ArgumentError(
            "{answer} and {wrong_answer} are the same token {0!r}{1}, so their difference is always 0; give another "
            "{wrong_answer}",
            shown,
            where,
        )


def _token_id(model: HookedTransformer, one: Any, name: str) -> int:
    if isinstance(one, str):
        try:
            return model.to_single_token(one)
        except InputError as error:
            raise ArgumentError(f"{{{name}}}: {{0}}", error) from None
    try:
        if isinstance(one, bool) or (isinstance(one, Tensor) and one.ndim):
            raise TypeError
        return operator.index(one)
    except TypeError as error:
        raise WrongType(f"{name} is a token, its text or its id, or a list of one a pair; got {one!r:.60}") from error


def _one_a_pair(**given: Tensor) -> list[Int[Tensor, "pair"]]:
    """Each brought to one value a pair; what is given once holds for all pairs."""
    n = max(value.numel() for value in given.values())
    if any(value.ndim > 1 or value.numel() not in (1, n) for value in given.values()):
        seen = ", ".join(f"{value.numel()} for {name}" for name, value in given.items())
        raise InputError(f"{' and '.join(given)} are one for all pairs or one a pair, got {seen}")
    return [value.reshape(-1).expand(n) for value in given.values()]

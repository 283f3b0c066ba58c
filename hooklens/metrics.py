"""Metrics: functions of logits that return one value per prompt pair; higher means more like clean.

Any function of logits `[pair pos d_vocab]` is a metric. The metrics here also declare what they read, so a sweep can
skip the rest of the unembedding.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from hooklens.core.arguments import check_call
from hooklens.core.errors import ArgumentError, InputError, WrongType
from hooklens.core.padding import PaddedTensor, columns, first_real
from hooklens.core.precision import widened
from hooklens.model.config import VectorEmbed
from hooklens.model.ids import as_ids, as_mask, show
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.results.result_file import Kept

Read = Float[Tensor, "row read token"]
Values = Float[Tensor, "row"]
Positions = int | Sequence[int] | Integer[Tensor, "*pair"]
Answers = str | int | Sequence[str] | Sequence[int] | Tensor


def need_metric(metric: Any) -> Any:
    """Return a metric: a function that can be called with logits alone. Anything else raises."""
    if not callable(metric) or isinstance(metric, type):
        raise WrongType(
            f"a metric is a function of logits [pair pos d_vocab] such as hl.logit_diff(...), got {metric!r:.60}"
        )
    check_call("metric", metric, "logits")
    return metric


def need_distribution(model: HookedTransformer, asker: str) -> None:
    """Raise for a model with one output number: its softmax is 1 whatever the model computes."""
    need_hooked(model, asker)
    if model.cfg.d_vocab_out < 2:
        raise InputError(
            f"{asker} needs probabilities of several tokens, and this model's output is one number; use "
            "hl.prediction(model), or hl.squared_error(model, target=...)"
        )


def need_pairs(made_for: int, n: int) -> None:
    """Raise unless a metric made for so many pairs can score `n`."""
    if made_for not in (1, n):
        raise InputError(f"the metric was made for {made_for} pairs, the prompts are {n}; give one answer a pair")


class Reads(NamedTuple):
    """The inputs of a metric: positions `[pair read]` (negative: from the end), tokens `[pair token]` or None for all.

    If prompts are padded, positions count the real tokens of each prompt.
    """

    pos: Int[Tensor, "pair read"]
    tokens: Int[Tensor, "pair token"] | None


@runtime_checkable
class ReadingMetric(Protocol):
    """A metric that declares what it reads; `pairs(index)` is the same metric for these pairs, one row each."""

    @property
    def reads(self) -> Reads: ...
    def on_read(self, logits: Read) -> Values: ...
    def pairs(self, index: Int[Tensor, "row"]) -> "ReadingMetric": ...


@dataclass(frozen=True, eq=False)
class AtPosition(Kept, ABC):
    """Base class of metrics that read the logits at one position of each prompt; a sweep computes only these.

    A subclass is a frozen dataclass whose fields are tensors with one row per pair, or one row for all pairs. It
    defines `on_read`, and also `read_tokens` if it reads the logits of only a few tokens.

    >>> @dataclass(frozen=True, eq=False)
    ... class Confidence(AtPosition):
    ...     def on_read(self, logits):
    ...         return logits[:, 0].softmax(-1).amax(-1)
    >>> Confidence(pos=-1)(torch.zeros(2, 5, 4))
    tensor([0.2500, 0.2500])
    """

    pos: Int[Tensor, "pair"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos", _positions(self.pos).reshape(-1))  # a number or a list will do
        rows = {name: len(value) for name, value in self._fields().items()}
        if len({n for n in rows.values() if n != 1}) > 1:
            raise InputError(
                f"the fields of {type(self).__name__} have one row for each pair, or one for all; got "
                + ", ".join(f"{n} for {name}" for name, n in rows.items())
            )
        # one row per pair if any field has: a part of the pairs is then a part of the rows
        object.__setattr__(self, "pos", self.pos.expand(max(rows.values())))

    def __call__(self, logits: Float[Tensor, "pair pos d_vocab"]) -> Values:
        """One value a pair, from full logits."""
        n = max(map(len, self._fields().values()))
        if n not in (1, len(logits)):
            raise InputError(f"the metric was made for {n} pairs, but got logits of {len(logits)}")
        metric = self.pairs(torch.arange(len(logits)))
        pos, tokens = metric.reads
        pos, tokens = pos.to(logits.device), None if tokens is None else tokens.to(logits.device)
        if isinstance(logits, PaddedTensor):
            pos, logits = columns(logits.attention_mask, pos), logits.as_subclass(Tensor)
        rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
        read = logits[rows, pos]
        if tokens is not None:
            read = read.gather(2, tokens[:, None].expand(-1, read.shape[1], -1))
        return metric.on_read(read)

    def pairs(self, index: Int[Tensor, "row"]) -> Any:
        """The same metric with one row for each of these pairs; a metric of one pair works for any number."""
        changed = {
            name: value[index] if len(value) > 1 else value.expand(len(index), *value.shape[1:])
            for name, value in self._fields().items()
        }
        return replace(self, **changed)

    def _fields(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and value.ndim}

    @property
    def reads(self) -> Reads:
        tokens = self.read_tokens()
        good = isinstance(tokens, Tensor) and tokens.ndim == 2 and tokens.numel() and not tokens.is_floating_point()
        if tokens is not None and not good:
            seen = list(tokens.shape) if isinstance(tokens, Tensor) else repr(tokens)[:80]
            raise WrongType(
                f"{type(self).__name__}.read_tokens must return a tensor of token ids [pair token], at least one per "
                f"pair, or None for the whole vocabulary; got {seen}"
            )
        return Reads(self.pos[:, None], tokens)

    def read_tokens(self) -> Int[Tensor, "pair token"] | None:
        """The tokens whose logits `on_read` receives, one row per pair; None for the whole vocabulary."""
        return None

    @abstractmethod
    def on_read(self, logits: Read) -> Values:
        """One value per row, from the logits that the metric reads: `[row, 1, token]`."""


@dataclass(frozen=True, eq=False)
class LogitDiff(AtPosition):
    """logit(answer) - logit(wrong_answer), in nats of log odds."""

    answer: Int[Tensor, "pair"]
    wrong_answer: Int[Tensor, "pair"]

    def read_tokens(self) -> Int[Tensor, "pair token"]:
        return torch.stack([self.answer, self.wrong_answer], dim=1)

    def on_read(self, logits: Read) -> Values:
        pair = widened(logits[:, 0])
        return pair[:, 0] - pair[:, 1]


@dataclass(frozen=True, eq=False)
class Prob(AtPosition):
    """The probability of the answer."""

    answer: Int[Tensor, "pair"]

    def on_read(self, logits: Read) -> Values:
        return widened(logits[:, 0]).softmax(-1).gather(1, self.answer.to(logits.device)[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class LogProb(AtPosition):
    """The log-probability of the answer, in nats: minus the loss."""

    answer: Int[Tensor, "pair"]

    def on_read(self, logits: Read) -> Values:
        return widened(logits[:, 0]).log_softmax(-1).gather(1, self.answer.to(logits.device)[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class MinusKL(AtPosition):
    """-KL(reference || model) at one position, in nats; 0 if the model's prediction equals the reference's.

    -inf if the model forbids (logit -inf) a token that the reference allows.
    """

    log_probs: Float[Tensor, "pair d_vocab"]

    def on_read(self, logits: Read) -> Values:
        log_probs = widened(logits[:, 0]).log_softmax(-1)
        return -kl_divergence(self.log_probs.to(log_probs), log_probs)


@dataclass(frozen=True, eq=False)
class MinusLoss(AtPosition):
    """Minus the mean next-token cross-entropy over each prompt, in nats per token, predicted from `start` on.

    `pos` is the position of each prompt's last token; everything after it is padding.
    """

    tokens: Int[Tensor, "pair pos"]
    start: int = 0

    def __call__(self, logits: Float[Tensor, "pair pos d_vocab"]) -> Values:
        """One value per pair, from full logits; if the logits have an attention mask, padding is left out."""
        if not isinstance(logits, PaddedTensor):
            return super().__call__(logits)
        mask = logits.attention_mask.to(self.tokens.device)
        metric = self.pairs(torch.arange(len(mask))) if len(self.pos) == 1 else self
        lengths = metric._predicted() + 1
        if torch.equal(lengths, mask.sum(1).to(self.pos.device)):
            return AtPosition.__call__(metric, logits)
        if metric.tokens.shape != mask.shape:
            raise InputError(
                f"the loss was made for prompts of {lengths.tolist()} tokens, but got logits of "
                f"{mask.sum(1).tolist()}; make it from the prompts that the model reads"
            )
        tokens, pos = _unpadded(metric.tokens, mask)
        return AtPosition.__call__(replace(metric, tokens=tokens, pos=pos), logits)

    def _predicted(self) -> Int[Tensor, "pair"]:
        return self.pos % self.tokens.shape[1]

    @property
    def reads(self) -> Reads:
        n = self._predicted()[:, None]
        # a prompt shorter than the longest has its last prediction repeated, which `on_read` does not count
        at = torch.arange(self.start, int(n.max()), device=n.device)
        return Reads(torch.minimum(at.expand(len(n), -1), n - 1), None)

    def on_read(self, logits: Read) -> Values:
        targets = self.tokens[:, self.start + 1 :][:, : logits.shape[1]].to(logits.device)
        log_probs = widened(logits).log_softmax(-1).gather(2, targets[..., None])[..., 0]
        n = (self._predicted() - self.start).to(logits.device)
        counted = torch.arange(logits.shape[1], device=logits.device) < n[:, None]
        return log_probs.masked_fill(~counted, 0.0).sum(1) / n


@dataclass(frozen=True, eq=False)
class Prediction(AtPosition):
    """One number of the output, as it is: the prediction of a model with one output number."""

    output: Int[Tensor, "pair"]

    def read_tokens(self) -> Int[Tensor, "pair token"]:
        return self.output[:, None]

    def on_read(self, logits: Read) -> Values:
        return widened(logits[:, 0, 0])


@dataclass(frozen=True, eq=False)
class MinusSquaredError(AtPosition):
    """Minus the squared error of the output to a target, mean over the numbers of the output."""

    target: Float[Tensor, "pair d_out"]

    def on_read(self, logits: Read) -> Values:
        read = widened(logits[:, 0])
        return -(read - self.target.to(read)).square().mean(-1)


def prediction(model: HookedTransformer, *, pos: Positions = -1, output: int = 0) -> Prediction:
    """What number does the model predict? For models whose output is a number, such as one of regression.

    It reads one number at one position, so that a sweep computes only this.

    >>> from hooklens.testing import tiny_model
    >>> metric = prediction(tiny_model(embed={"part": "vectors", "d_in": 3}, d_vocab_out=1))
    >>> metric(torch.tensor([[[0.5], [2.0]]]))             # two positions, one output number
    tensor([2.])
    """
    return Prediction(*_one_a_pair(pos=_positions(pos), output=answer_ids(model, output, "output")))


def squared_error(model: HookedTransformer, *, target: Any, pos: Positions = -1) -> MinusSquaredError:
    """Minus the squared error of the prediction to `target` (minus, so that higher is better).

    `target` is one number for all pairs, one per pair, or `[pair d_out]` for a model with several output numbers.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(embed={"part": "vectors", "d_in": 3}, d_vocab_out=1)
    >>> squared_error(model, target=[0.5, 3.0])(torch.tensor([[[0.5]], [[2.0]]]))
    tensor([-0., -1.])
    """
    need_hooked(model, "squared_error(model, target=...), which makes a metric of the output,")
    n, what = model.cfg.d_vocab_out, "target is one number, one per pair, or numbers [pair d_out]"
    try:
        given = torch.as_tensor(target, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(f"{what}; got {target!r:.60}") from error
    numbers, at = given.reshape(-1, 1) if given.ndim < 2 else given, _positions(pos).reshape(-1)
    if numbers.ndim != 2 or numbers.shape[1] != n or not bool(numbers.isfinite().all()) or not len(numbers):
        raise InputError(f"{what}, finite, with d_out {n} for this model; got {list(given.shape)}: {target!r:.60}")
    n_pairs = max(len(at), len(numbers))
    if {len(at), len(numbers)} - {1, n_pairs}:
        raise InputError(f"target and pos are one for all pairs or one per pair, got {len(numbers)} and {len(at)}")
    return MinusSquaredError(at.expand(n_pairs), numbers.expand(n_pairs, n))


def logit_diff(model: HookedTransformer, *, answer: Answers, wrong_answer: Answers, pos: Positions = -1) -> LogitDiff:
    """How much does the model prefer `answer` to `wrong_answer`, as a difference of logits? One answer or one per pair.

    >>> from hooklens.testing import tiny_model
    >>> metric = logit_diff(tiny_model(), answer=3, wrong_answer=4)
    >>> logits = torch.zeros(1, 5, 11); logits[0, -1, 3] = 2.0
    >>> metric(logits)
    tensor([2.])

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 3.
    """
    right, wrong = answer_ids(model, answer, "answer"), answer_ids(model, wrong_answer, "wrong_answer")
    check_answers_differ(model, right, wrong)
    return LogitDiff(*_one_a_pair(pos=_positions(pos), answer=right, wrong_answer=wrong))


def prob(model: HookedTransformer, *, answer: Answers, pos: Positions = -1) -> Prob:
    """What probability does the model give to `answer`? Between 0 and 1."""
    need_distribution(model, "prob")
    return Prob(*_one_a_pair(pos=_positions(pos), answer=answer_ids(model, answer)))


def log_prob(model: HookedTransformer, *, answer: Answers, pos: Positions = -1) -> LogProb:
    """What log-probability does the model give to `answer`? In nats."""
    need_distribution(model, "log_prob")
    return LogProb(*_one_a_pair(pos=_positions(pos), answer=answer_ids(model, answer)))


def kl(model: HookedTransformer, reference: Any, *, pos: int = -1, attention_mask: Any = None) -> MinusKL:
    """Minus the KL divergence, in nats, from the model's own prediction on the `reference` prompts (usually clean).

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(); tokens = torch.tensor([[1, 2, 3]])
    >>> abs(kl(model, tokens)(model(tokens)).item()) < 1e-6
    True
    """
    need_hooked(model, "kl(model, reference), which makes a metric of logits,")
    need_distribution(model, "kl")
    with torch.no_grad():
        logits = model(reference, logits_at=pos, attention_mask=attention_mask)[:, 0]
        log_probs = widened(logits).log_softmax(-1)
    return MinusKL(torch.full((len(log_probs),), pos), log_probs)


def kl_divergence(
    target: Float[Tensor, "*row token"], predicted: Float[Tensor, "*any_row token"]
) -> Float[Tensor, "*out_row"]:
    """KL(target || predicted) in nats, from log-probabilities. A token that the target forbids contributes 0.

    >>> never = float("-inf")
    >>> kl_divergence(torch.tensor([0.0, never]), torch.tensor([[0.0, never], [never, 0.0]])).tolist()
    [0.0, inf]
    """
    # A probability too small to represent is not 0: times an infinite difference it gives infinity, not NaN.
    p = target.exp().clamp_min(torch.finfo(target.dtype).tiny)
    return (p * (target - predicted)).masked_fill(target.isneginf(), 0.0).sum(-1)


def loss(model: HookedTransformer, tokens: Any, *, attention_mask: Any = None) -> MinusLoss:
    """Minus the mean next-token cross-entropy on `tokens`, in nats per token (minus, so that higher is better).

    Each prompt's mean is over its own tokens. Texts may differ in length; padded ids need their mask.
    """
    need_hooked(model, "loss(model, tokens), which makes a metric of logits,")
    if isinstance(model.cfg.embed, VectorEmbed):
        raise InputError(
            "loss is over the next token, and this model reads vectors; use hl.squared_error(model, target=...)"
        )
    texts = [tokens] if isinstance(tokens, str) else tokens
    if isinstance(texts, list | tuple) and texts and isinstance(texts[0], str):
        ids, attention_mask = model.to_tokens(list(texts), return_mask=True)
    else:
        ids = torch.atleast_2d(as_ids(texts, "loss needs prompts of integers [pair pos]", model.device))
    mask = torch.ones_like(ids).bool() if attention_mask is None else as_mask(attention_mask, ids.device)
    if ids.ndim != 2 or mask.shape != ids.shape or not len(ids) or int(mask.sum(1).min()) < 2:
        seen = f"{list(ids.shape)}" + ("" if attention_mask is None else f" with {mask.sum(-1).tolist()} real tokens")
        raise InputError(f"loss needs prompts [pair pos] of at least two tokens, got {seen}")
    ids, last = _unpadded(ids, mask)
    return MinusLoss(last, ids)


def _unpadded(
    tokens: Int[Tensor, "pair pos"], mask: Bool[Tensor, "pair pos"]
) -> tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair"]]:
    """Move the real tokens of each row to the front, and return the position of the last one."""
    return tokens.gather(1, first_real(mask)), mask.sum(1).cpu() - 1


def recovered(values: Tensor, clean: float, corrupted: float) -> Tensor:
    """What share of the clean-corrupted difference does a value restore? 0 at corrupted, 1 at clean."""
    return (values - corrupted) / (clean - corrupted)


def answer_ids(model: HookedTransformer, answer: Answers, name: str = "answer") -> Int[Tensor, "pair"]:
    """Token ids of one answer or several; a text of several tokens raises an error that shows its tokens."""
    need_hooked(model, "an answer")
    answers: Any = answer  # NumPy arrays too
    if not isinstance(answers, list | tuple) and not getattr(answers, "ndim", 0):
        answers = [answers]
    ids = [_token_id(model, token, name) for token in answers]
    if not ids or min(ids) < 0 or max(ids) >= model.cfg.d_vocab_out:
        raise ArgumentError(
            f"{{{name}}} must be tokens between 0 and {{0}}, got {{1!r:.80}}", model.cfg.d_vocab_out - 1, answer
        )
    return torch.tensor(ids)


def _positions(pos: Positions) -> Int[Tensor, "*pair"]:
    return as_ids(pos, "pos is an integer, or one for each pair")


def check_answers_differ(model: HookedTransformer, answer: Int[Tensor, "pair"], wrong: Int[Tensor, "wrong"]) -> None:
    """Raise if the two answers are the same token: their difference is 0, whatever the model predicts."""
    n = max(len(answer), len(wrong))
    if min(len(answer), len(wrong)) not in (1, n):
        return  # this raises another error, which gives the numbers
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


def _token_id(model: HookedTransformer, token: Any, name: str) -> int:
    if isinstance(token, str):
        try:
            return model.to_single_token(token)
        except InputError as error:
            raise ArgumentError(f"{{{name}}}: {{0}}", error) from None
    try:
        if isinstance(token, bool) or (isinstance(token, Tensor) and token.ndim):
            raise TypeError
        return operator.index(token)
    except TypeError as error:
        raise WrongType(f"{name} must be a token, its text or its id, or a list of these; got {token!r:.60}") from error


def _one_a_pair(**given: Tensor) -> list[Int[Tensor, "pair"]]:
    """Expand each to one value per pair; a single value applies to all pairs."""
    n = max(value.numel() for value in given.values())
    if any(value.ndim > 1 or value.numel() not in (1, n) for value in given.values()):
        seen = ", ".join(f"{value.numel()} for {name}" for name, value in given.items())
        raise InputError(f"{' and '.join(given)} must be one for all pairs or one per pair, got {seen}")
    return [value.reshape(-1).expand(n) for value in given.values()]

"""Prompt pairs with their answers, metric and groups: returned by tasks, stored in JSONL files, accepted by methods."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from hooklens.core.errors import ArgumentError, InputError, OutOfRange, WrongType, did_you_mean
from hooklens.data.prompts import Prompts, read_pairs, reads_vectors, rows_of
from hooklens.metrics import Answers, ReadingMetric, logit_diff, need_metric, need_pairs
from hooklens.model.transformer import HookedTransformer
from hooklens.results.result import Result, Table
from hooklens.results.statistics import halves


@dataclass(frozen=True, eq=False)
class PromptPairs(Result):
    """Clean and corrupted prompts, as texts, token ids or vectors, with the metric or answers that score a model.

    >>> pairs = PromptPairs(["a b", "c d", "e f"], ["a x", "c x", "e x"], answer=[" 1", " 2", " 3"], wrong_answer=" 0")
    >>> len(pairs), pairs[1].clean, pairs[:2].answer, pairs[-1].wrong_answer
    (3, ['c d'], [' 1', ' 2'], [' 0'])
    >>> [len(half) for half in pairs.split(seed=0)]
    [1, 2]

    `answer` and `wrong_answer` are one for all pairs or one per pair. `group` labels pairs that share something, such
    as a sentence: `split` never splits a group, and intervals resample groups. `columns` are further properties of the
    pairs, read as `pairs["name"]`. `corrupted` may be None for methods that need none. Indexing also selects the rows
    of a metric of the library; a plain function of logits must not contain values for single pairs, and cannot be
    saved.
    """

    clean: Any
    corrupted: Any
    metric: Any = None
    answer: Any = field(default=None, kw_only=True)
    wrong_answer: Any = field(default=None, kw_only=True)
    group: Any = field(default=None, kw_only=True)
    columns: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        clean, corrupted = _listed(self.clean), None if self.corrupted is None else _listed(self.corrupted)
        if corrupted is not None and len(clean) != len(corrupted):
            raise InputError(
                f"clean and corrupted prompts form pairs, got {len(clean)} clean and {len(corrupted)} corrupted prompts"
            )
        if (self.answer is None) != (self.wrong_answer is None):
            raise ArgumentError("{answer} and {wrong_answer} are given together, and one of them is missing")
        if self.metric is not None:
            need_metric(self.metric)
        n = len(clean)
        if not isinstance(self.columns, Mapping):
            raise WrongType(f"columns is a dict of names and lists with one value per pair, got {self.columns!r:.80}")
        for name, column in {"group": self.group, **self.columns}.items():
            _check_length(name, column, n)
        changed = {name: _one_a_pair(name, getattr(self, name), n) for name in ("answer", "wrong_answer")}
        changed |= {"clean": clean, "corrupted": corrupted, "group": _numbers(self.group)}
        for name, value in changed.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.clean)

    def __iter__(self) -> Iterator["PromptPairs"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """A selection of pairs, by number, slice, list of numbers or mask; a name returns that column."""
        if isinstance(index, str):
            if index not in self.columns:
                raise did_you_mean("column", index, self.columns)
            return self.columns[index]
        rows, given = _rows(index, len(self)), ("clean", "corrupted", "answer", "wrong_answer", "group")
        columns = {name: _some(column, rows) for name, column in self.columns.items()}
        parts = {name: _some(getattr(self, name), rows) for name in given}
        return replace(self, metric=self._metric_of_some(rows), columns=columns, **parts)

    def _metric_of_some(self, rows: list[int]) -> Any:
        metric = self.metric
        if not isinstance(metric, ReadingMetric) or len(metric.reads.pos) == 1:
            return metric
        need_pairs(len(metric.reads.pos), len(self))
        return metric.pairs(torch.tensor(rows, dtype=torch.long))

    def split(self, *, seed: int = 0) -> tuple["PromptPairs", "PromptPairs"]:
        """Split into two halves that share no group: one for selection, one for the reported numbers."""
        if not len(self):
            raise InputError("there are no pairs to split into halves")
        first, second = halves(len(self), group=self.group, seed=seed)
        return self[first], self[second]

    def metric_of(self, model: HookedTransformer) -> Any:
        """The pairs' metric, or the logit difference of their answers if they have none."""
        if self.metric is not None:
            return self.metric
        if self.answer is None and reads_vectors(model):
            raise ArgumentError(
                "{metric} is missing; give a function of the model's output such as hl.prediction(model), or "
                "hl.squared_error(model, target=...)"
            )
        if self.answer is None:
            raise ArgumentError(
                "{metric} is missing, and the pairs hold no answers; give a function of logits such as "
                "hl.logit_diff(...), or PromptPairs(..., answer=, wrong_answer=)"
            )
        return logit_diff(model, answer=self.answer, wrong_answer=self.wrong_answer)

    def tokens(
        self, model: HookedTransformer
    ) -> tuple[Shaped[Tensor, "pair pos *d_in"], Shaped[Tensor, "pair pos *d_in"]]:
        """Clean and corrupted token ids (or vectors); all prompts must have the same length."""
        (group,) = read_pairs(model, self.clean, self.corrupted, ("pos",))
        return group.clean, group.corrupted

    def digests(self, model: HookedTransformer) -> list[str]:
        """A short digest of each clean prompt's tokens, which identifies the prompt."""
        rows = rows_of(model, self.clean, "clean")
        return [hashlib.sha256(str(row.tolist()).encode()).hexdigest()[:16] for row in rows]

    def table(self, n: int | None = 8) -> Table:
        """One row per pair: prompts, answers, group."""
        given = {name.replace("_", " "): getattr(self, name) for name in ("clean", "corrupted", "answer")}
        given |= {"wrong answer": self.wrong_answer, "group": self.group}
        shown = {name: list(map(_shown, column)) for name, column in given.items() if column is not None}
        return Table(tuple(shown), list(zip(*shown.values(), strict=True))).head(n)


def as_pairs(
    model: HookedTransformer,
    clean: "Prompts | PromptPairs",
    corrupted: Prompts | None = None,
    metric: Any = None,
    group: Any = None,
) -> PromptPairs:
    """Convert a method's arguments, prompts and a metric or PromptPairs, to pairs of token ids with their metric.

    A metric or groups given with PromptPairs replace theirs.
    """
    if not isinstance(clean, PromptPairs):
        others = None if corrupted is None else rows_of(model, corrupted, "corrupted")
        pairs = PromptPairs(rows_of(model, clean, "clean"), others, metric, group=group)
        return replace(pairs, metric=pairs.metric_of(model))
    if corrupted is not None:
        raise ArgumentError("{clean} is PromptPairs, which contain corrupted prompts; leave {corrupted} out")
    return replace(
        clean,
        clean=rows_of(model, clean.clean, "clean"),
        corrupted=None if clean.corrupted is None else rows_of(model, clean.corrupted, "corrupted"),
        metric=clean.metric_of(model) if metric is None else metric,
        group=clean.group if group is None else group,
    )


def numbered(labels: Sequence[Any]) -> Int[Tensor, "pair"]:
    """Number the labels in order of first appearance.

    >>> numbered(["x", "y", "x"]).tolist()
    [0, 1, 0]
    """
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([order[label] for label in labels])


def _numbers(group: Any) -> Int[Tensor, "pair"] | None:
    """The groups as numbers; integers keep their values."""
    if group is None:
        return None
    labels = [_plain(label) for label in (group.tolist() if hasattr(group, "tolist") else group)]
    for label in labels:
        if not _is_label(label):
            raise WrongType(f"group holds one label per pair, a text or a whole number; got {label!r:.60}")
    if all(type(label) is int for label in labels):
        return torch.tensor(labels, dtype=torch.long)
    return numbered(labels)


def _is_label(label: Any) -> bool:
    """Whether this can label a group: None and NaN are missing labels, and other fractions do not name anything."""
    if label is None or (isinstance(label, Real) and not isinstance(label, Integral)):
        return False
    try:
        hash(label)
    except TypeError:
        return False
    return not isinstance(label, Tensor)


def _plain(value: Any) -> Any:
    """A scalar of torch or NumPy as Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _check_length(name: str, column: Any, n: int) -> None:
    try:
        if column is not None and len(column) != n:
            raise InputError(f"{name} needs one value per pair, got {len(column)} for {n} pairs")
    except TypeError as error:
        raise WrongType(f"{name} is a list or a tensor with one value per pair, got {column!r:.80}") from error


def _listed(prompts: Any) -> Any:
    """The prompts as a list; a text or a row of token ids is a single prompt."""
    if isinstance(prompts, Tensor):
        is_one = prompts.ndim == (2 if prompts.is_floating_point() else 1)  # vectors [pos d_in], or token ids [pos]
        return prompts[None] if is_one else torch.atleast_2d(prompts)
    if isinstance(prompts, str):
        return [prompts]
    try:
        rows = list(prompts)
    except TypeError as error:
        raise WrongType(f"prompts are texts or rows of token ids, got {prompts!r:.80}") from error
    for row in rows:
        if not isinstance(row, str | Sequence | Integral) and not hasattr(row, "ndim"):
            raise WrongType(f"prompts are texts or rows of token ids, got {row!r:.80}")
    single = bool(rows) and (rows[0].ndim == 0 if hasattr(rows[0], "ndim") else isinstance(rows[0], int))
    return [rows] if single else rows


def _one_a_pair(name: str, answer: Answers | None, n: int) -> Any:
    if answer is None:
        return None
    given: Any = answer.tolist() if hasattr(answer, "tolist") else answer
    listed = list(given) if isinstance(given, list | tuple) else [given]
    if len(listed) not in (1, n):
        raise ArgumentError(
            "{" + name + "} is one for all pairs or one per pair, got {0} for {1} pairs", len(listed), n
        )
    for value in map(_plain, listed):
        if not isinstance(value, str | Integral) or isinstance(value, bool):
            raise ArgumentError(
                "{" + name + "} is a text or a token id, one for all pairs or one per pair; got {0!r:.60}", value
            )
    return listed * n if len(listed) == 1 else listed


def _rows(index: Any, n: int) -> list[int]:
    """The numbers of the pairs that an index selects."""
    try:
        if index is None or isinstance(index, bool):
            raise TypeError("torch takes None and a single boolean for a new axis")
        if isinstance(index, slice):
            return list(range(n))[index]
        return torch.arange(n)[index.cpu() if isinstance(index, Tensor) else index].reshape(-1).tolist()
    except (IndexError, TypeError) as error:
        raise OutOfRange(
            f"pairs are indexed by a slice, numbers below {n} or {n} booleans; got {index!r:.60}"
        ) from error


def _some(column: Any, rows: list[int]) -> Any:
    if column is None:
        return None
    return column[torch.tensor(rows, dtype=torch.long)] if isinstance(column, Tensor) else [column[i] for i in rows]


def _shown(value: Any) -> Any:
    """Format a prompt, an answer or a group as a cell of a table."""
    if isinstance(value, Tensor) and value.ndim == 2:
        return f"{len(value)} vectors of {value.shape[1]} numbers"
    plain = value.tolist() if hasattr(value, "tolist") else value
    return plain if isinstance(plain, str | int) else str(list(plain))

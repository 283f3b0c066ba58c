"""What is written in place of an activation: one small class for each meaning, the same in every method.

A method passes its `Target`s to a replacement: prompts of one length, at the points that are overwritten. A word such
as "zero" stands for a class with its defaults; `as_replacement` alone reads words. A new kind is one class, in any
package.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeGuard

import torch
from jaxtyping import Shaped
from torch import Tensor

from hooklens.core.arguments import check_call, seeded, whole
from hooklens.core.errors import InputError, NameNotFound, WrongType, did_you_mean
from hooklens.core.names import axes
from hooklens.core.precision import widened
from hooklens.data.prompts import Pairs, Prompts, Row, common_ends, rows_of
from hooklens.model.transformer import HookedTransformer
from hooklens.results.result_file import Kept

Tokens = Shaped[Tensor, "prompt pos *d_in"]
Acts = Mapping[str, Tensor]
#: What a replacement returns: prompts (token ids or vectors), whose run holds the values; activations by point, of
#: shapes that broadcast; or a function of (activation, point).
Written = Tensor | Acts | Callable[[Tensor, str], Tensor]


@dataclass(frozen=True, eq=False)
class Runs:
    """Every prompt that a method writes to, and what any run holds at the points that are overwritten.

    `held`: the method has the activations of its own prompts anyway, so that a function of these costs no further run.
    """

    model: HookedTransformer
    prompts: list[Row]
    read: Callable[[Tokens], Acts]
    held: bool

    @cached_property
    def over_positions(self) -> dict[str, Tensor]:
        """The sum over every position of the method's own prompts, which prompts of several lengths share."""
        return self.sums(self.prompts, by_pos=False)

    def mean_over_positions(self, rows: list[Row]) -> dict[str, Tensor]:
        """The mean over all positions of these prompts."""
        sums = self.over_positions if rows is self.prompts else self.sums(rows, by_pos=False)
        return {name: total / sum(map(len, rows)) for name, total in sums.items()}

    def sums(self, rows: Sequence[Row], *, by_pos: bool) -> dict[str, Tensor]:
        """Over prompts at each position, or over all of their positions; run one at a time, so that sums are held."""
        sums: dict[str, Tensor] = {}
        for row in rows:
            for name, act in self.read(row[None]).items():
                term = act if by_pos else _summed(act, name)
                sums[name] = sums[name] + term if name in sums else term
        return sums


@dataclass(frozen=True, eq=False)
class Target:
    """Prompts of one length whose activations are overwritten, and the run of each pair that they stand in.

    `index` says which of `runs.prompts` they are; `pair` has the tokens of the clean and of the corrupted prompts, and
    is empty where prompts have no partner.
    """

    tokens: Tokens
    index: tuple[int, ...]
    pair: Mapping[str, Shaped[Tensor, "prompt _other_pos *d_in"]]
    points: Sequence[str]
    runs: Runs

    def read(self, tokens: Tokens) -> Acts:
        """What a run on these tokens holds at the points."""
        return self.runs.read(tokens)

    def rows(self, prompts: Prompts | None) -> list[Row]:
        """Reference prompts (texts or token ids) as rows of token ids; None: every prompt that the method writes to."""
        return self.runs.prompts if prompts is None else rows_of(self.runs.model, prompts, "reference")

    def fits(self, rows: Sequence[Row]) -> bool:
        """Have all of these prompts the length of the prompts written to, so that positions correspond?"""
        return all(len(row) == self.tokens.shape[1] for row in rows)


def targets_of(
    model: HookedTransformer,
    groups: Sequence[Pairs],
    points: Sequence[str],
    *,
    into: str = "clean",
    paired: bool = True,
    read: Callable[[Tokens], Acts] | None = None,
) -> list[Target]:
    """A target for each group of prompts of one length. `read` is a method's own way to read activations by point."""
    prompts = {i: row for group in groups for i, row in zip(group.index, getattr(group, into), strict=True)}

    def at_points(ids: Tokens) -> Acts:
        return model.run_with_cache(ids, names=list(points), stop_at_layer=model.cfg.n_layers)[1]

    runs = Runs(model, [prompts[i] for i in sorted(prompts)], read or at_points, held=read is None)
    targets = []
    for group in groups:
        pair = {"clean": group.clean, "corrupted": group.corrupted} if paired else {}
        targets.append(Target(getattr(group, into), group.index, pair, points, runs))
    return targets


class Replacement(Kept, ABC):
    """What is written in place of an activation. A subclass is a frozen dataclass that defines `write`.

    >>> @dataclass(frozen=True, eq=False)
    ... class Doubled(Replacement):
    ...     def write(self, target):
    ...         return lambda activation, point: 2 * activation
    >>> str(Doubled())
    'doubled'

    A sweep in progress is recognised by the class and everything that its fields refer to.
    """

    #: Do all values come from runs of the model? Then a part of a circuit that reads nothing else writes them as well.
    from_runs: ClassVar[bool] = False
    #: Is the value of a linear map of the activation the map of the value? So for means, not for medians.
    linear: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What tables, figures and files call it: the name of the class in words."""
        return re.sub(r"(?<!^)([A-Z])", r" \1", type(self).__name__).lower()

    @abstractmethod
    def write(self, target: Target) -> Written:
        """What is written to these prompts: token ids to run, activations by point, or a function of an activation."""

    def every_draw(self, targets: Sequence[Target]) -> list[list[Written]]:
        """What is written to each target; several times where it is drawn, and effects are averaged over draws."""
        return [[self.write(target) for target in targets]]

    def once(self, targets: Sequence[Target]) -> list[Written]:
        """The same, for a method that writes one value."""
        draws = self.every_draw(targets)
        if len(draws) > 1:
            words = ", ".join(repr(word) for word in WORDS if word != self.label)
            raise InputError(
                f"this method writes one value, and {self!r:.80} draws {len(draws)}; give one draw, such as "
                f"Resample(draws=1), or a value that is not drawn ({words}), or average over draws with hl.ablate"
            )
        return draws[0]

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False)
class OtherRun(Replacement):
    """The activation in another run, prompt by prompt: "clean" or "corrupted" of the pair, or given prompts.

    Prompts of a pair that differ in length are matched at their shared beginning and end; positions between keep their
    own value. Given prompts have the lengths of those that they stand for.
    """

    run: Any
    from_runs, linear = True, True

    @property
    def label(self) -> str:
        return self.run if isinstance(self.run, str) and self.run in ("clean", "corrupted") else "other run"

    def write(self, target: Target) -> Written:
        if self.label == "other run":
            return self._given(target)
        if self.label not in target.pair:
            raise InputError(
                f"value={self.label!r} is the {self.label} run of a pair, and these prompts have no pairs; give "
                "OtherRun(prompts), or write with hl.patch"
            )
        other = target.pair[self.label]
        if other is target.tokens:
            raise InputError(f"value={self.label!r} would be written into the {self.label} run itself")
        if other.shape == target.tokens.shape:
            return other
        return matched(target.tokens, other, target.read(target.tokens), target.read(other))

    def _given(self, target: Target) -> Tensor:
        rows, n, length = target.rows(self.run), len(target.runs.prompts), target.tokens.shape[1]
        if len(rows) != n:
            raise InputError(f"OtherRun(prompts) holds one prompt for each that is written to, got {len(rows)} for {n}")
        rows = [rows[i] for i in target.index]
        if not target.fits(rows):
            lengths = ", ".join(map(str, sorted({len(row) for row in rows})))
            raise InputError(
                f"OtherRun(prompts) writes position by position: prompts of {length} tokens stand beside runs of "
                f"{lengths}; re-word them, or use value='mean'"
            )
        return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class Zero(Replacement):
    """Zeros."""

    linear = True

    def write(self, target: Target) -> Written:
        return dict.fromkeys(target.points, torch.zeros(()))


@dataclass(frozen=True, eq=False)
class Mean(Replacement):
    """The mean over `reference` prompts, or over the prompts written to, each prompt's own activation included.

    Position by position where all of these have the length of the prompts written to, otherwise over all positions.
    """

    reference: Any = None
    linear = True

    @property
    def label(self) -> str:
        return super().label + ("" if self.reference is None else " of reference")

    def write(self, target: Target) -> Written:
        runs, rows = target.runs, target.rows(self.reference)
        if self.reference is None:
            _need_others(target, self)
        if not target.fits(rows):
            return runs.mean_over_positions(rows)
        if rows is runs.prompts and runs.held:
            return lambda act, name: act.mean(0, keepdim=True)
        return {name: total / len(rows) for name, total in runs.sums(rows, by_pos=True).items()}


@dataclass(frozen=True, eq=False)
class MeanOverPositions(Mean):
    """The mean over all positions of `reference` prompts, or of the prompts written to."""

    def write(self, target: Target) -> Written:
        return target.runs.mean_over_positions(target.rows(self.reference))


@dataclass(frozen=True, eq=False)
class MeanOfOthers(Replacement):
    """The mean over the other prompts written to, never a prompt's own: 1/n of what is taken away would stay in a mean.

    Position by position where all have one length, otherwise over all positions of the others.
    """

    linear = True

    def write(self, target: Target) -> Written:
        prompts, length = target.runs.prompts, target.tokens.shape[1]
        _need_others(target, self)
        if target.fits(prompts):
            return lambda act, name: (widened(act).sum(0, keepdim=True) - widened(act)) / (len(prompts) - 1)
        sums, n = target.runs.over_positions, sum(map(len, prompts)) - length
        return lambda act, name: (widened(sums[name]) - widened(_summed(act, name))) / n


@dataclass(frozen=True, eq=False)
class Resample(Replacement):
    """Another prompt's activation, `draws` times with another prompt each time; effects are averaged.

    Prompts are drawn from `reference`, or from the prompts written to: those of the same length that are not the
    prompt's own tokens.
    """

    reference: Any = None
    draws: int = 4
    seed: int = 0
    from_runs, linear = True, True

    def write(self, target: Target) -> Written:
        return self.once([target])[0]

    def every_draw(self, targets: Sequence[Target]) -> list[list[Written]]:
        whole("draws", self.draws, 1)
        pool, generator = targets[0].rows(self.reference), seeded(self.seed)
        donors = [donors_of(target.tokens, pool, self.draws, generator) for target in targets]
        return [[donor[draw % len(donor)] for donor in donors] for draw in range(max(map(len, donors)))]


@dataclass(frozen=True, eq=False)
class Given(Replacement):
    """A tensor, activations by point (a cache), or a function of (activation, point)."""

    value: Any

    def __post_init__(self) -> None:
        if callable(self.value):
            check_call("value", self.value, "activation", "point")

    @property
    def label(self) -> str:
        return "given value"

    def write(self, target: Target) -> Written:
        if isinstance(self.value, Mapping) or callable(self.value):
            return self.value
        return dict.fromkeys(target.points, self.value)


Value = str | Replacement | Tensor | Mapping[str, Tensor] | Callable[[Tensor, str], Tensor]

_DEFAULTS = (OtherRun("clean"), OtherRun("corrupted"), Zero(), Mean(), MeanOfOthers(), MeanOverPositions(), Resample())
#: The words that stand for a replacement, in every method; each is also its label.
WORDS: dict[str, Replacement] = {replacement.label: replacement for replacement in _DEFAULTS}


def as_replacement(value: Value) -> Replacement:
    """What is asked to be written, from a word, a replacement, a tensor, activations by point, or a function.

    >>> as_replacement("mean of others"), as_replacement(torch.zeros(3)).label
    (MeanOfOthers(), 'given value')
    """
    if isinstance(value, Replacement):
        return value
    if isinstance(value, str):
        if value not in WORDS:
            raise did_you_mean("value to write", value, WORDS)
        return WORDS[value]
    if isinstance(value, Mapping):
        return Given(dict(value))
    if isinstance(value, Tensor) or (callable(value) and not isinstance(value, type)):
        return Given(value)
    raise WrongType(
        f"value= is a word such as 'clean' or 'zero', a Replacement such as hl.Mean(reference=prompts), a tensor, "
        f"activations by point, or a function of (activation, point); got {value!r:.60}"
    )


def are_prompts(written: Written, tokens: Tokens) -> TypeGuard[Tensor]:
    """Does a replacement name a run, by prompts of the kind of these: token ids, or vectors?"""
    return isinstance(written, Tensor) and written.is_floating_point() == tokens.is_floating_point()


def activations_of(written: Written, own: Acts) -> dict[str, Tensor]:
    """What is written at each point, in the shape of what is there; a run's tokens are for the method to run."""
    points = list(own)
    if callable(written):
        written = {name: written(own[name].clone(), name) for name in points}
    if not isinstance(written, Mapping):
        raise WrongType(
            "a replacement writes token ids of the shape of the prompts, activations by point, or a function of "
            f"(activation, point); got {written!r:.60}"
        )
    missing = [name for name in points if name not in written]
    if missing:
        raise NameNotFound(
            f"value= has no activation for {missing[0]} ({len(missing)} of {len(points)} points are missing); give "
            "all, for example those of run_with_cache(tokens, names=the site)[1], or write at one layer only: "
            "site=hl.site(name, layer)"
        )
    return {name: fitted(written[name], own[name], name) for name in points}


def fitted(value: Any, act: Tensor, name: str) -> Tensor:
    """A value in the dtype, on the device and in the shape of an activation."""
    try:
        value = torch.as_tensor(value, dtype=act.dtype, device=act.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(f"the value to write at {name} must be a tensor or a number, got {value!r:.60}") from error
    try:
        return value.expand_as(act)
    except RuntimeError as error:
        raise InputError(
            f"the value to write at {name} has shape {list(value.shape)}; the activation is {list(act.shape)}"
        ) from error


def matched(
    tokens: Tokens, other: Shaped[Tensor, "prompt _other_pos *d_in"], mine: Acts, theirs: Acts
) -> dict[str, Tensor]:
    """The other run's activations at the positions that both prompts share, the run's own between."""
    out = {}
    for name in theirs:
        if "key_pos" in axes(name):
            raise InputError(
                "patterns of prompts of different length cannot be matched; patch z, or re-word the prompts"
            )
        out[name] = mine[name].clone()
        for pair in range(len(tokens)):
            first, last = common_ends(tokens[pair], other[pair])
            out[name][pair, :first] = theirs[name][pair, :first]
            if last:
                out[name][pair, -last:] = theirs[name][pair, -last:]
    return out


def donors_of(
    tokens: Tokens, pool: Sequence[Row], draws: int, generator: torch.Generator
) -> Shaped[Tensor, "draw prompt pos *d_in"]:
    """For every prompt, other prompts of its length from the pool, none twice before all were drawn."""
    chosen: list[list[Tensor]] = []
    for own in tokens:
        others = [row for row in pool if len(row) == len(own) and not torch.equal(row, own)]
        if not others:
            raise InputError(
                f"resampling needs another prompt of {len(own)} tokens for every prompt of that length, and there is "
                "none; give value=Resample(reference=prompts of that length), or value='mean of others'"
            )
        order = torch.randperm(len(others), generator=generator)[:draws].tolist()
        chosen.append([others[i] for i in order])
    most = max(map(len, chosen))
    return torch.stack([torch.stack([others[draw % len(others)] for others in chosen]) for draw in range(most)])


def _need_others(target: Target, mean: Replacement) -> None:
    if len(target.runs.prompts) < 2:
        raise InputError(
            f"value={mean.label!r} is a mean over prompts, and there is one prompt; give more, or "
            "value=hl.Mean(reference=prompts)"
        )


def _summed(act: Tensor, name: str) -> Tensor:
    """The sum over positions."""
    if "key_pos" in axes(name):
        raise InputError("a mean pattern needs prompts that all have the length of those written to")
    return act.sum(1, keepdim=True)


def is_run(replacement: Replacement, name: str) -> bool:
    """Is it the value of that run of the pair, "clean" or "corrupted"?"""
    return isinstance(replacement, OtherRun) and isinstance(replacement.run, str) and replacement.run == name

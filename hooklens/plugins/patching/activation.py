"""Activation patching: overwrite one site at a time and see how far the metric moves, exactly and for a whole grid."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.component import layer_name
from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.core.names import Site
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts, check_prompts_differ, read_pairs
from hooklens.metrics import ReadingMetric
from hooklens.model.linear import packed_linears
from hooklens.plugins.patching.grid import STRONGEST, cell_name, draw_grid, in_order, labels_of, largest_first, shape_of
from hooklens.plugins.patching.two_runs import TwoRuns
from hooklens.plugins.patching.values import Mean, aligned, mean_of
from hooklens.results.result import Result, Table
from hooklens.results.statistics import ratio_interval
from hooklens.sweeps.execute import Outcome, execute
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import first_nonfinite, not_finite
from hooklens.sweeps.plan import grid, plan, settle_by, site_and_layer
from hooklens.sweeps.resume import Resume
from hooklens.sweeps.settings import pinned

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_WORDS = ("clean", "corrupted", "zero", "mean")


Value = str | Mean | Tensor | Mapping[str, Tensor] | Callable[[Tensor, str], Tensor]


@dataclass(frozen=True, eq=False)
class PatchSweep(TwoRuns, Result):
    """The metric after every patch of a grid, beside the metric of the two runs that are needed to read it."""

    per_pair: Float[Tensor, "pair *grid"]
    clean_per_pair: Float[Tensor, "pair"]
    corrupted_per_pair: Float[Tensor, "pair"]
    site: str
    by: tuple[str, ...]
    into: str
    value: str
    labels: dict[str, list[str]]
    computed: float
    largest_error: float
    n_verified: int
    how: str
    kernel: str = ""

    @property
    def values(self) -> Float[Tensor, "*grid"]:
        """The metric after each patch, mean over pairs."""
        return self.per_pair.mean(0)

    @property
    def recovered(self) -> Float[Tensor, "*grid"]:
        """(value - corrupted) / (clean - corrupted), each a mean over pairs: 0 as corrupted, 1 as clean.

        NaN everywhere where clean and corrupted do not differ, or differ by no more than chance over pairs.
        """
        if not self.defined:
            return torch.full_like(self.values, float("nan"))
        return (self.values - self.corrupted) / (self.clean - self.corrupted)

    @property
    def defined(self) -> bool:
        """Does the interval of clean minus corrupted exclude 0? With one pair: do they differ?"""
        gap = self.clean_per_pair - self.corrupted_per_pair
        if len(gap) == 1:
            return bool(gap[0] != 0)
        low, high = ratio_interval(gap[:, None], torch.ones_like(gap))
        return not bool(low[0] <= 0 <= high[0])

    def interval(self, level: float = 0.95, *, draws: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Both ends of `recovered`, by a bootstrap over pairs that recomputes both means; NaN for one pair."""
        gap = self.clean_per_pair - self.corrupted_per_pair
        if not self.defined:
            nothing = torch.full_like(self.values, float("nan"))
            return nothing, nothing.clone()
        moved = self.per_pair - self.corrupted_per_pair.view(-1, *[1] * len(self.by))
        low, high = ratio_interval(moved.flatten(1), gap, level=level, draws=draws, seed=seed)
        return low.view_as(self.values), high.view_as(self.values)

    @property
    def effect(self) -> Float[Tensor, "*grid"]:
        """How far each patch moved the metric from the run it went into."""
        return self.values - (self.corrupted if self.into == "corrupted" else self.clean)

    def order(self) -> list[tuple[int, ...]]:
        """Every grid index, the largest effect first."""
        return largest_first(self.effect)

    def name_of(self, index: tuple[int, ...]) -> str:
        """What a grid index is called: L5H1, L3 ' Mary' (4), L2N17."""
        return cell_name(self.by, self.labels, index)

    def top(self, k: int = 10) -> Table:
        """The `k` patches that moved the metric most."""
        return self._rows(self.order()[:k])

    def table(self, n: int | None = 20) -> Table:
        """The patches that moved the metric most, with what they restored; every one for `n=None`."""
        return self._rows(self.order()[:n])

    def _rows(self, chosen: Sequence[tuple[int, ...]]) -> Table:
        values, shares, (low, high) = self.values, self.recovered, self.interval()
        rows = []
        for index in chosen:
            row = [self.name_of(index), float(values[index]), float(shares[index])]
            rows.append((*row, float(low[index]), float(high[index])) if len(self.per_pair) > 1 else tuple(row))
        columns = (self.site, "metric", "recovered", "95% low", "95% high")
        return Table(columns[: len(rows[0])] if rows else columns[:3], rows)

    def figure(self, rows: int | None = STRONGEST) -> Any:
        """A heat map over two axes, bars with their interval over one; of three the strongest `rows`, None for all."""
        shown, name = (self.recovered, "recovered") if self.defined else (self.effect, "change of the metric")
        title = f"{self.site}: {name} ({self.value} into {self.into})"
        ends = self.interval() if len(self.by) == 1 else None
        return draw_grid(shown, self.by, labels=self.labels, title=title, name=name, ends=ends, rows=rows)


def patch(
    model: "HookedTransformer",
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    site: str | tuple | Site = "resid_pre",
    by: str | Sequence[str] | None = None,
    value: Value = "clean",
    resume: str | Path | Resume | None = None,
) -> PatchSweep:
    """Which activations carry the difference between clean and corrupted? One exact patch for every cell of a grid.

    Give two prompts (or lists of them) and a metric, or `PromptPairs`, as every method between two prompts takes them.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import logit_diff
    >>> model = tiny_model(); clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    >>> sweep = patch(model, clean, corrupted, logit_diff(model, answer=5, wrong_answer=6))
    >>> sweep.values.shape                    # layer pos
    torch.Size([2, 3])
    >>> bool(torch.isclose(sweep.values[0, 1], torch.tensor(sweep.clean), atol=1e-5))
    True

    `site` is resid_pre/mid/post, attn_out, mlp_out, post (neurons), z, q, k, v, pattern or result, at every layer or,
    as `hl.site("z", 5)`, at one. `by` is the grid: "layer x pos", "layer x head", "layer x head x pos", "layer x
    neuron", "layer". `value` is "clean" (written into the corrupted run) or, written into the clean run, "corrupted"
    (noising), "zero", "mean" over the clean prompts, Mean(reference=prompts), a tensor, a cache, or a function of
    (activation, point). `resume` names a file in which finished parts are kept, so that an interrupted sweep goes on; a
    metric that cannot be recognised there needs a name, `hl.Resume(path, key="...")`.

    Clean and corrupted prompts of different length can be swept by layer or head: positions are matched at the shared
    beginning and end, and those between keep their own value. Memory, checks and the plain loop: `hl.engine(...)`.

    Reference: Meng et al. (2022), "Locating and Editing Factual Associations in GPT", section 2.
    """
    site, layer = site_and_layer(model, site)
    axes = settle_by(model, site, by)
    into = "corrupted" if isinstance(value, str) and value == "clean" else "clean"
    pairs = as_pairs(model, clean, corrupted, metric)
    groups = read_pairs(model, pairs.clean, pairs.corrupted, axes)
    check_metric(pairs.metric, groups)
    if isinstance(value, str) and value in ("clean", "corrupted"):
        check_prompts_differ(groups)
    if resume is not None and len(groups) > 1:
        raise InputError("resume= needs prompts of one length; patch each length on its own")
    file = None if resume is None else Resume.of(resume)
    with torch.no_grad(), pinned(None) if file is None else file.products(), packed_linears(rows=1024), _hint(resume):
        both = [
            _patch_group(model, group, metric=pairs.metric, site=site, by=axes, layer=layer, value=value, resume=file)
            for group in groups
        ]
    parts = [outcome for outcome, _ in both]
    ends = (in_order(groups, [other for _, other in both]), in_order(groups, [p.base for p in parts]))
    clean_end, corrupted_end = ends if into == "corrupted" else ends[::-1]
    shape = shape_of(model, site, axes, groups[0].clean.shape[1])
    labels = labels_of(model, axes, shape, groups[0])
    if layer is not None:
        shape, labels["layer"] = (1, *shape[1:]), [layer_name(layer)]
    per_pair = in_order(groups, [p.values.T for p in parts]).reshape(-1, *shape)
    errors = torch.tensor([p.largest_error for p in parts])
    return PatchSweep(
        per_pair=per_pair,
        clean_per_pair=clean_end,
        corrupted_per_pair=corrupted_end,
        site=site,
        by=axes,
        into=into,
        value=_word(value),
        labels=labels,
        computed=sum(p.computed * len(g.index) for p, g in zip(parts, groups, strict=True)) / len(per_pair),
        largest_error=float(errors.max()),
        n_verified=sum(p.n_verified for p in parts),
        how=parts[0].how,
        kernel=parts[0].kernel,
    )


@contextmanager
def _hint(resume: object) -> Iterator[None]:
    """Tell somebody who interrupts a sweep how not to lose it."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if resume is None:
            interrupt.add_note("hl.patch(..., resume=path) keeps what is finished in a file, and goes on from there")
        raise


def check_metric(metric: Any, groups: list[Pairs]) -> None:
    if not callable(metric) or isinstance(metric, type):
        raise WrongType(
            f"a metric is a function of logits [pair pos d_vocab] such as hl.logit_diff(...), got {metric!r}"
        )
    if len(groups) == 1:
        return
    if not isinstance(metric, ReadingMetric):
        raise InputError(
            f"prompts of {len(groups)} different lengths were given, and a plain function needs all pairs in one "
            "tensor; use a built-in metric, or prompts of one length"
        )
    made_for, n = len(metric.reads.pos), sum(len(group.index) for group in groups)
    if made_for not in (1, n):
        raise InputError(f"the metric was made for {made_for} pairs, the prompts are {n}; give one answer a pair")


def _patch_group(
    model,
    group: Pairs,
    metric: Any,
    site: str,
    by: tuple[str, ...],
    layer: int | None,
    value: Value,
    resume: Resume | None,
) -> tuple[Outcome, Float[Tensor, "pair"]]:
    """The sweep of one group, and the metric of the run that is not patched."""
    noising = _word(value) != "clean"
    into, other = (group.clean, group.corrupted) if noising else (group.corrupted, group.clean)
    written = _written(model, group, into=into, other=other, site=site, value=value)
    patches = None  # the whole grid, which the plan makes
    if layer is not None:
        patches = [patch for patch in grid(model, site, by, into.shape[1])[1] if patch.layer == layer]
    made = plan(model, into, site, written, by=by, patches=patches)
    given = dict(value) if isinstance(value, Mapping) else value
    made = replace(made, source=(given, group.clean, group.corrupted))  # what was asked, which identifies the sweep
    outcome = execute(made, group.of(metric), resume=resume)
    return outcome, _other_run(model, group, metric=metric, tokens=other, stream=made.donor, outcome=outcome)


def _written(model, group: Pairs, into: Tensor, other: Tensor, site: str, value: Value) -> Any:
    """What a plan takes as values: other tokens, activations by point, or a function."""
    if isinstance(value, str):
        if value not in _WORDS:
            raise did_you_mean("value to write", value, _WORDS)
        if value in ("clean", "corrupted"):
            return other if group.aligned else aligned(model, into, other, site)
        if value == "zero":
            return lambda act, name: torch.zeros_like(act)
        if len(into) < 2:
            raise InputError(
                "value='mean' is the mean over the pairs, and there is one pair; give more, or "
                "value=hl.Mean(reference=prompts)"
            )
        return lambda act, name: act.mean(0, keepdim=True)
    if isinstance(value, Mean):
        return mean_of(model, value, into, site)
    if isinstance(value, Tensor):
        return lambda act, name: value
    return value


def _other_run(
    model, group: Pairs, metric: Any, tokens: Int[Tensor, "pair pos"], stream: Tensor | None, outcome: Outcome
) -> Float[Tensor, "pair"]:
    """The metric of the run that is not patched; its stream is known where it gave the values."""
    stream = model(tokens, stop_at_layer=model.cfg.n_layers) if stream is None else stream
    found = Reader(model, group.of(metric), stream).base
    if (said := not_finite(found)) is not None:
        point = first_nonfinite(model, tokens)
        where = "every activation is finite: look at the metric" if point is None else f"not finite from {point} on"
        raise InputError(
            f"the metric of the {'clean' if tokens is group.clean else 'corrupted'} run is {said}: {where}"
        )
    if group.aligned:  # the same prompt twice is the same number, not one to rounding
        return torch.where((group.clean == group.corrupted).all(1), outcome.base, found)
    return found


def _word(value: Value) -> str:
    if isinstance(value, str):
        return value
    return "mean of reference" if isinstance(value, Mean) else "given value"


def demo(model: "HookedTransformer") -> PatchSweep:
    """A resid_pre sweep on two short prompts that differ in one token; numbers where the model has no tokenizer."""
    return patch(model, demo_pairs(model, 1, 8))

"""Activation patching: overwrite one site at a time and see how far the metric moves, exactly and for a whole grid."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.component import layer_name
from hooklens.core.errors import InputError, WrongType
from hooklens.core.names import Site
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts, check_prompts_differ, read_pairs
from hooklens.metrics import ReadingMetric
from hooklens.plugins.patching.grid import STRONGEST, cell_name, draw_grid, labels_of, largest_first
from hooklens.plugins.patching.two_runs import TwoRuns, ends_of, joined, resume_of, with_other
from hooklens.results.result import Result, Table
from hooklens.results.statistics import DRAWS, ratio_interval
from hooklens.sweeps.execution import Outcome, execute
from hooklens.sweeps.planning import plan, points_of, settle_by, site_and_layer
from hooklens.sweeps.replacement import Replacement, Value, Written, as_replacement, is_run, targets_of
from hooklens.sweeps.resume import Resume, hint, products_of
from hooklens.sweeps.site_patches import SitePatches

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True, eq=False)
class PatchSweep(TwoRuns, Result):
    """The metric after every patch of a grid, beside the metric of the two runs that are needed to read it."""

    ranked_by = "change of the metric"

    per_pair: Float[Tensor, "pair *grid"]
    clean_per_pair: Float[Tensor, "pair"]
    corrupted_per_pair: Float[Tensor, "pair"]
    site: str
    by: tuple[str, ...]
    into: str
    replacement: str
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

    def interval(self, level: float = 0.95, *, draws: int = DRAWS, seed: int = 0) -> tuple[Tensor, Tensor]:
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
        title = f"{self.site}: {name} ({self.replacement} into {self.into})"
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
    (noising), "zero", "mean" (over the clean prompts), any other `Replacement` such as Mean(reference=prompts), a
    tensor, a cache, or a function of (activation, point). `resume` names a file in which finished parts are kept, so
    that an interrupted sweep goes on; a metric that cannot be recognised there needs a name,
    `hl.Resume(path, key="...")`.

    Clean and corrupted prompts of different length can be swept by layer or head: positions are matched at the shared
    beginning and end, and those between keep their own value. Memory, checks and the plain loop: `hl.engine(...)`.

    Reference: Meng et al. (2022), "Locating and Editing Factual Associations in GPT", section 2.
    """
    site, layer = site_and_layer(model, site)
    axes, replacement = settle_by(model, site, by), as_replacement(value)
    into = "corrupted" if is_run(replacement, "clean") else "clean"
    pairs = as_pairs(model, clean, corrupted, metric)
    groups = read_pairs(model, pairs.clean, pairs.corrupted, axes)
    check_metric(pairs.metric, groups)
    if is_run(replacement, "clean") or is_run(replacement, "corrupted"):
        check_prompts_differ(groups)
    file = resume_of(resume, groups)
    with products_of(file), hint(resume, "hl.patch"):
        written = replacement.once(targets_of(model, groups, points_of(model, site), into=into))
        asked = _Asked(
            metric=pairs.metric, site=site, by=axes, layer=layer, into=into, replacement=replacement, file=file
        )
        found = [_sweep(model, group, to, asked) for group, to in zip(groups, written, strict=True)]
    shape, outcome = found[0][0], joined(groups, [part for _, part in found])
    clean_end, corrupted_end = ends_of(outcome, into)
    labels = labels_of(model, axes, shape, groups[0])
    if layer is not None:
        labels["layer"] = [layer_name(layer)]
    return PatchSweep(
        per_pair=outcome.values.T.reshape(-1, *shape),
        clean_per_pair=clean_end,
        corrupted_per_pair=corrupted_end,
        site=site,
        by=axes,
        into=into,
        replacement=str(replacement),
        labels=labels,
        computed=outcome.computed,
        largest_error=outcome.largest_error,
        n_verified=outcome.n_verified,
        how=outcome.how,
        kernel=outcome.kernel,
    )


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


@dataclass(frozen=True)
class _Asked:
    """What a sweep does with each group of pairs."""

    metric: Any
    site: str
    by: tuple[str, ...]
    layer: int | None
    into: str
    replacement: Replacement
    file: Resume | None


def _sweep(model, group: Pairs, written: Written, asked: _Asked) -> tuple[tuple[int, ...], Outcome]:
    """The shape of the grid and the sweep of the pairs of one length."""
    into, other = (group.clean, group.corrupted) if asked.into == "clean" else (group.corrupted, group.clean)
    made = plan(model, into, asked.site, written, by=asked.by, layer=asked.layer)
    made = replace(made, source=(asked.replacement, group.clean, group.corrupted))  # which identifies the sweep
    known = made.donor is not None and written is other
    stream = made.donor if known else model(other, stop_at_layer=model.cfg.n_layers)
    outcome = execute(SitePatches(made), group.of(asked.metric), resume=asked.file, other=stream)
    return made.shape, with_other(model, outcome, group, "clean" if asked.into == "corrupted" else "corrupted")


def demo(model: "HookedTransformer") -> PatchSweep:
    """A resid_pre sweep on two short prompts that differ in one token; numbers where the model has no tokenizer."""
    return patch(model, demo_pairs(model, 1, 8))

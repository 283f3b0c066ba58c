"""Activation patching: overwrite one site at a time and see how far the metric moves, exactly and for a whole grid."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.names import Site
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts, check_prompts_differ, read_pairs
from hooklens.metrics import ReadingMetric, need_metric, need_pairs
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.grid import STRONGEST, OnGrid, labels_of
from hooklens.plugins.patching.two_runs import Swept, ends_of, joined, share_ends, with_other
from hooklens.results.account import RunAccount
from hooklens.results.result import Result, Table
from hooklens.results.statistics import DRAWS, Ends
from hooklens.sweeps.execution import execute
from hooklens.sweeps.planning import grid_axes, plan, points_of, site_and_layer
from hooklens.sweeps.replacement import Value, as_replacement, is_run, targets_of
from hooklens.sweeps.resume import Resume, resuming
from hooklens.sweeps.site_patches import SitePatches


@dataclass(frozen=True, eq=False)
class PatchSweep(RunAccount, OnGrid, Swept, Result):
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

    def interval(self, level: float = 0.95, *, draws: int = DRAWS, seed: int = 0) -> Ends:
        """Both ends of `recovered`, by a bootstrap over pairs that recomputes both means; NaN for one pair."""
        moved = self._from(self.corrupted_per_pair)
        return share_ends(moved, self.gap, group=None, level=level, draws=draws, seed=seed)

    def table(self, n: int | None = 20) -> Table:
        """The patches that moved the metric most, with what they restored; every one for `n=None`."""
        parts = [self.values, self.recovered]
        parts += self.interval() if len(self.per_pair) > 1 else ()
        return Table((self.site, "metric", "recovered", "95% low", "95% high")[: 1 + len(parts)], self.rows(parts, n))

    def figure(self, rows: int | None = STRONGEST) -> Any:
        """A heat map over two axes, bars with their interval over one; of three the strongest `rows`, None for all."""
        shown, name = (self.recovered, "recovered") if self.defined else (self.effect, "change of the metric")
        title = f"{self.site}: {name} ({self.replacement} into {self.into})"
        ends = self.interval() if len(self.by) == 1 else None
        return self.draw(shown, title, name, ends, rows)


def patch(
    model: HookedTransformer,
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
    A model that reads vectors takes vectors [pair pos d_in], and a metric such as `hl.prediction(model)`.

    >>> import torch
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
    axes, replacement = grid_axes(site, by), as_replacement(value)
    into, from_run = ("corrupted", "clean") if is_run(replacement, "clean") else ("clean", "corrupted")
    pairs = as_pairs(model, clean, corrupted, metric)
    groups = read_pairs(model, pairs.clean, pairs.corrupted, axes)
    check_metric(pairs.metric, groups)
    if is_run(replacement, from_run):
        check_prompts_differ(groups)
    parts = []
    with resuming(resume, "hl.patch", n_lengths=len(groups)) as file:
        written = replacement.once(targets_of(model, groups, points_of(model, site), into=into))
        for group, to in zip(groups, written, strict=True):
            planned = plan(model, getattr(group, into), site, to, by=axes, layer=layer)
            planned = replace(planned, source=(replacement, group.clean, group.corrupted))  # which identifies the sweep
            other = getattr(group, from_run)
            known = planned.donor is not None and to is other
            stream = planned.donor if known else model(other, stop_at_layer=model.cfg.n_layers)
            outcome = execute(SitePatches(planned), group.of(pairs.metric), file=file, other=stream)
            parts.append(with_other(model, outcome, group, from_run))
    outcome, labels = joined(groups, parts), labels_of(model, site, axes, groups[0])
    if layer is not None:
        labels["layer"] = [labels["layer"][layer]]
    return PatchSweep(
        per_pair=outcome.values.T.reshape(len(pairs), *(len(labels[axis]) for axis in axes)),
        site=site,
        by=axes,
        into=into,
        replacement=str(replacement),
        labels=labels,
        **ends_of(outcome, into),
        **outcome.account,
    )


def check_metric(metric: Any, groups: list[Pairs]) -> None:
    """Raise unless this is a metric of all pairs of these groups."""
    need_metric(metric)
    if len(groups) == 1:
        return
    if not isinstance(metric, ReadingMetric):
        raise InputError(
            f"prompts of {len(groups)} different lengths were given, and a plain function needs all pairs in one "
            "tensor; use a built-in metric, or prompts of one length"
        )
    need_pairs(len(metric.reads.pos), sum(len(group.index) for group in groups))


def demo(model: HookedTransformer) -> PatchSweep:
    """A resid_pre sweep on two short prompts that differ in one token; numbers where the model has no tokenizer."""
    return patch(model, demo_pairs(model, 1, 8))

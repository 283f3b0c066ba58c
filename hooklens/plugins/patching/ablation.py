"""Ablation: take one component away at a time and see how far the metric falls, exactly and for a whole grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.data.demo_prompts import demo_metric, demo_texts
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts, read_pairs
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.patching.grid import OnGrid, labels_of, read_patches
from hooklens.plugins.patching.two_runs import joined
from hooklens.results.account import RunAccount
from hooklens.results.claims import HeldOutEffects
from hooklens.results.result import Result, Table
from hooklens.results.statistics import DRAWS, Tested, group_numbers, mean_interval, sign_flip_p
from hooklens.sweeps.execution import execute
from hooklens.sweeps.planning import Patch, component_of, grid_axes, has_site, plan, points_of, site_kind
from hooklens.sweeps.replacement import Resample, Value, as_replacement, targets_of
from hooklens.sweeps.settings import engine
from hooklens.sweeps.site_patches import SitePatches

Grid = Float[Tensor, "*grid"]
_MOST_FLIPS = 40_000


@dataclass(frozen=True, eq=False)
class AblationSweep(RunAccount, OnGrid, Tested, Result):
    """The metric after every ablation of a grid, prompt by prompt, beside the metric of the unedited model.

    `replacement` is what was written. `by_draw` is the mean effect of each draw of other prompts (one row where nothing
    is drawn). Prompts of one `group` share something: intervals and p-values are over groups.
    """

    ranked_by = "effect, on the prompts that chose it"

    baselines = ("base",)
    per_prompt: Float[Tensor, "prompt *grid"]
    base_per_prompt: Float[Tensor, "prompt"]
    by_draw: Float[Tensor, "draw *grid"]
    group: Int[Tensor, "prompt"]
    site: str
    by: tuple[str, ...]
    replacement: str
    labels: dict[str, list[str]]

    @property
    def base(self) -> float:
        """The metric of the unedited model, mean over prompts."""
        return float(self.base_per_prompt.mean())

    @property
    def values(self) -> Grid:
        """The metric after each ablation, mean over prompts."""
        return self.per_prompt.mean(0)

    @property
    def effect_per_prompt(self) -> Float[Tensor, "prompt *grid"]:
        """How far each ablation moved each prompt's metric; below 0 where the component helped."""
        return self.per_prompt - self.base_per_prompt.view(-1, *[1] * (self.per_prompt.ndim - 1))

    @property
    def effect(self) -> Grid:
        """How far each ablation moved the metric, mean over prompts; below 0 where the component helped."""
        return self.effect_per_prompt.mean(0)

    def interval(self, level: float = 0.95, *, draws: int = DRAWS, seed: int = 0) -> tuple[Grid, Grid]:
        """Both ends of `effect`, by a bootstrap over groups of prompts; NaN for a single group."""
        return mean_interval(self.effect_per_prompt, group=self.group, level=level, draws=draws, seed=seed)

    @cached_property
    def p(self) -> Grid:
        """Two-sided p-value of "no effect", from flipping signs of groups; exactly 1 where nothing moved."""
        return sign_flip_p(self.effect_per_prompt, group=self.group, draws=self._flips)

    @property
    def least_q(self) -> float:
        """The smallest q that a component which alone matters could get: few groups of prompts, high floor."""
        n = int(self.group.max()) + 1
        return min(1.0, self.effect.numel() * (2 / 2**n if n <= 12 else 1 / (self._flips + 1)))

    @property
    def _flips(self) -> int:
        # one component of m has q = m p, and p is at least 1 / (flips + 1): 40 a component let it pass 0.05
        return min(max(4096, 40 * self.effect.numel()), _MOST_FLIPS)

    def held_out_top(self, k: int = 10, *, seed: int = 0) -> HeldOutEffects:
        """The `k` components of largest effect on one half of the prompts, with their effect on the other half."""
        return HeldOutEffects.of({self.replacement: self.effect_per_prompt}, self.names, self.group, k, seed)

    def table(self, n: int | None = 20) -> Table:
        """The components of largest effect; every one for `n=None`."""
        parts = [self.values, self.effect]
        parts += (*self.interval(), self.p, self.q) if int(self.group.max()) else ()
        columns = (self.site, "metric", f"effect ({self.replacement})", "95% low", "95% high", "p", "q")
        return Table(columns[: 1 + len(parts)], self.rows(parts, n))

    def figure(self) -> Any:
        """A heat map over two axes, bars with their interval over one."""
        title = f"{self.site}: change of the metric under {self.replacement} ablation"
        ends = self.interval() if self.per_prompt.ndim == 2 else None
        return self.draw(self.effect, title, "change of the metric", ends)


def ablate(
    model: HookedTransformer,
    prompts: Prompts | PromptPairs,
    metric: Any = None,
    *,
    site: str = "z",
    by: str | Sequence[str] | None = None,
    value: Value = "resample",
    group: Sequence[int] | Int[Tensor, "prompt"] | None = None,
    patches: Any = None,
) -> AblationSweep:
    """What does the metric lose without each component? One exact ablation for every cell of a grid.

    >>> from hooklens.metrics import log_prob
    >>> from hooklens.testing import induction_model
    >>> model = induction_model(); prompts = torch.tensor([[3, 1, 4, 3], [5, 2, 6, 5], [7, 9, 8, 7]])
    >>> sweep = ablate(model, prompts, log_prob(model, answer=[1, 2, 9]), value="zero")
    >>> sweep.effect.round(decimals=1)            # layer head: L0H0 previous token, L1H1 induction
    tensor([[-1.2000,  0.0000],
            [ 0.0000, -2.4000]])

    `PromptPairs` stand for their clean prompts, metric and groups.
    `site` and `by` are those of `hl.patch`: heads z "layer x head", neurons post "layer x neuron", whole layers
    attn_out or mlp_out "layer", positions "layer x pos". `patches` takes the grid's place where a few are asked for,
    such as ["L5H1", "L2H0@-1"].

    `value` is what is written, a `Replacement` or its word. "resample": the activation of other prompts of the set,
    four draws averaged (`Resample` says how many, of which prompts, and the seed). "mean of others": the mean over all
    other prompts, the prompt's own left out. "mean": over all prompts, or `hl.Mean(reference=prompts)`. Means are
    position by position where all lengths agree, else over all positions. "zero": a value that most sites never hold,
    so that what breaks may be the model's surprise rather than its need: see `compare_ablations`. `OtherRun(prompts)`:
    the activation in other runs, prompt by prompt.

    `group` says which prompts share something, one label a prompt: intervals and p-values are then over groups.

    Reference: Li and Janson (2024), "Optimal ablation for interpretability", section 2 (the kinds); Chan et al. (2022),
    "Causal scrubbing" (resampling).
    """
    site, replacement = has_site(model, site_kind(site)), as_replacement(value)
    axes, asked = grid_axes(site, by), None if patches is None else read_patches(model, site, patches)
    pairs = as_pairs(model, prompts, metric=metric, group=group)
    groups = read_pairs(model, pairs.clean, pairs.clean, _needs(axes, asked))
    check_metric(pairs.metric, groups)
    draws = []
    with torch.no_grad(), packed_linears(rows=1024):
        for written in replacement.every_draw(targets_of(model, groups, points_of(model, site), paired=False)):
            parts = []
            for part, to in zip(groups, written, strict=True):
                planned = plan(model, part.clean, site, to, by=axes, patches=asked)
                parts.append(execute(SitePatches(planned), part.of(pairs.metric)))
            draws.append(joined(groups, parts))
    if asked is None:
        labels = labels_of(model, site, axes, groups[0])
    else:
        axes, labels = ("patch",), {"patch": [component_of(model, site, patch).name for patch in asked]}
    base, values = draws[0].base, torch.stack([draw.values.T for draw in draws])
    shape = [len(labels[axis]) for axis in axes]
    return AblationSweep(
        per_prompt=values.mean(0).view(-1, *shape),
        base_per_prompt=base,
        by_draw=(values.mean(1) - base.mean()).view(-1, *shape),
        group=group_numbers(len(pairs), pairs.group),
        site=site,
        by=axes,
        replacement=str(replacement),
        labels=labels,
        **RunAccount.joined(draws).account,
    )


def _needs(axes: tuple[str, ...], patches: Sequence[Patch] | None) -> tuple[str, ...]:
    """By position, prompts must have one length."""
    if patches is None:
        return axes
    return ("layer", "pos") if any(patch.pos is not None for patch in patches) else ("layer",)


def demo(model: HookedTransformer) -> AblationSweep:
    """Every head, resampled among six short prompts; random token numbers where the model has no tokenizer."""
    with engine(progress=False):
        return ablate(model, demo_texts(model, 6, 8), demo_metric(model), value=Resample(draws=2))

"""Attribution patching: what activation patching would find, estimated for a whole grid by one backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.names import axes
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts, check_prompts_differ, read_pairs
from hooklens.metrics import ReadingMetric
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.patching.backward import backward_rows, gradients_of, need_backward
from hooklens.plugins.patching.grid import OnGrid, draw_agreement, in_order, labels_of
from hooklens.plugins.patching.two_runs import TwoRuns, joined
from hooklens.results.result import Result, Table
from hooklens.results.statistics import DRAWS, correlation, group_numbers, mean_interval, rank_correlation
from hooklens.sweeps.execution import execute
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.planning import Patch, grid_axes, has_site, plan, points_of, site_kind
from hooklens.sweeps.replacement import OtherRun, matched, targets_of
from hooklens.sweeps.settings import engine
from hooklens.sweeps.site_patches import SitePatches

Grid = Float[Tensor, "*grid"]


@dataclass(frozen=True, eq=False)
class AttributionPatching(OnGrid, TwoRuns, Result):
    """The estimated effect of every patch of a grid, pair by pair, and exact effects of some cells as its control.

    `per_pair` is (clean - corrupted) . gradient at the corrupted run: the change of the metric if the metric were
    linear. The checked cells are the `n_top` of largest estimate, then as many drawn from the rest.
    """

    ranked_by = "estimate"

    per_pair: Float[Tensor, "pair *grid"]
    clean_per_pair: Float[Tensor, "pair"]
    corrupted_per_pair: Float[Tensor, "pair"]
    site: str
    by: tuple[str, ...]
    labels: dict[str, list[str]]
    checked: Int[Tensor, "checked axis"]
    exact_per_pair: Float[Tensor, "pair checked"]
    n_top: int
    group: Int[Tensor, "pair"]

    @property
    def effect(self) -> Grid:
        """The estimated change of the metric when clean is written into the corrupted run, mean over pairs."""
        return self.per_pair.mean(0)

    def interval(self, level: float = 0.95, *, draws: int = DRAWS, seed: int = 0) -> tuple[Grid, Grid]:
        """Both ends of `effect`, over groups of pairs: of the estimate's mean, not of its distance to the truth."""
        return mean_interval(self.per_pair, group=self.group, level=level, draws=draws, seed=seed)

    @property
    def exact(self) -> Float[Tensor, "checked"]:
        """What patching itself finds for the checked cells, mean over pairs."""
        return self.exact_per_pair.mean(0)

    @property
    def estimated(self) -> Float[Tensor, "checked"]:
        """The estimates of the checked cells."""
        return self.effect[tuple(self.checked.T)]

    @property
    def correlation(self) -> float:
        """Pearson's correlation of estimate and exact effect over the checked cells; NaN where none was checked."""
        return float(correlation(self.estimated, self.exact))

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation over the checked cells."""
        return float(rank_correlation(self.estimated, self.exact))

    @property
    def largest_error(self) -> float:
        """How far an estimate of a checked cell lies from its exact effect, at most; NaN where none was checked."""
        return float((self.estimated - self.exact).abs().max()) if len(self.checked) else float("nan")

    def table(self, n: int | None = 20) -> Table:
        """The cells of largest estimate, with their exact effect where it was computed."""
        exact = dict(zip(map(tuple, self.checked.tolist()), self.exact.tolist(), strict=True))
        many = int(self.group.max()) > 0
        parts = (self.effect, *self.interval()) if many else (self.effect,)
        rows = [(*row, exact.get(i)) for row, i in zip(self.rows(parts, n), self.order()[:n], strict=True)]
        return Table((self.site, "estimate", *(("95% low", "95% high") if many else ()), "exact"), rows)

    def figure(self) -> Any:
        """The estimates: a heat map over two axes, bars over one."""
        title = f"{self.site}: estimated effect"
        if len(self.checked):
            title += f"; correlation with {len(self.checked)} exact ones {self.correlation:.2f}"
        return self.draw(self.effect, title, "estimate", self.interval() if len(self.by) == 1 else None)

    def check_figure(self) -> Any:
        """The checked cells by their exact effect and its estimate; on the diagonal the two agree."""
        names = [self.name_of(index) for index in self.checked.tolist()]
        title = f"{self.site}: attribution against patching"
        return draw_agreement(self.exact, self.estimated, names, title, ("exact effect", "estimate"))


def attribution_patch(
    model: HookedTransformer,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    site: str = "resid_pre",
    by: str | Sequence[str] | None = None,
    exact: int = 8,
    group: Sequence[int] | Int[Tensor, "pair"] | None = None,
) -> AttributionPatching:
    """Which patches would matter? Every effect of `hl.patch` at once, to first order: (clean - corrupted) . gradient.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import logit_diff
    >>> model = tiny_model(); clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    >>> found = attribution_patch(model, clean, corrupted, logit_diff(model, answer=5, wrong_answer=6))
    >>> found.effect.shape, round(found.correlation, 2)    # layer pos; the control: layer norms bend
    (torch.Size([2, 3]), 0.9)

    It costs two forward passes and a backward one, whatever the grid. It is exact where the metric is linear in the
    site. A norm bends, and a saturated softmax or a neuron that is off in the corrupted run has no gradient, so that
    what it would do is missed. `exact` is the control: patching itself computes that many cells of largest estimate
    and as many others, drawn by seed from those that differ between the runs, and the result carries their correlation.
    `site`, `by` and prompts are those of `hl.patch`; `group` says which pairs share something.

    Reference: Nanda (2023), "Attribution Patching"; Syed et al. (2023), "Attribution Patching Outperforms Automated
    Circuit Discovery", equation 2.
    """
    site = has_site(model, site_kind(site))
    axes_ = grid_axes(site, by)
    pairs = as_pairs(model, clean, corrupted, metric, group)
    groups = read_pairs(model, pairs.clean, pairs.corrupted, axes_)
    check_prompts_differ(groups)
    check_metric(pairs.metric, groups)
    need_backward(model, "attribution patching")
    whole("exact", exact)
    parts = _pieces(model, groups, pairs.metric, site)
    estimates = [_estimate(model, part, part.of(pairs.metric), site, axes_) for part in parts]
    per_pair, moved, clean_end, corrupted_end = (in_order(parts, rows) for rows in zip(*estimates, strict=True))
    checked = _to_check(per_pair.mean(0), moved.any(0), exact)
    return AttributionPatching(
        per_pair=per_pair,
        clean_per_pair=clean_end,
        corrupted_per_pair=corrupted_end,
        site=site,
        by=axes_,
        labels=labels_of(model, site, axes_, groups[0]),
        checked=checked,
        exact_per_pair=_exactly(model, groups, metric=pairs.metric, site=site, by=axes_, checked=checked),
        n_top=min(exact, len(checked)),
        group=group_numbers(len(pairs), pairs.group),
    )


def _pieces(model: HookedTransformer, groups: list[Pairs], metric: Any, site: str) -> list[Pairs]:
    """Groups cut so that a backward pass fits the engine's memory; a plain function must see its pairs together."""
    if not isinstance(metric, ReadingMetric):
        return groups
    cfg, pieces = model.cfg, []
    for group in groups:
        n_pos = max(group.clean.shape[1], group.corrupted.shape[1])
        widths = {"pattern": cfg.n_heads * n_pos, "result": cfg.n_heads * cfg.d_model, "post": cfg.d_mlp}
        size = max(1, backward_rows(model, n_pos, widths.get(site, cfg.d_model)))
        every = len(groups) == 1 and size >= len(group.index)
        for at in range(0, len(group.index), size):
            cut = slice(at, at + size)
            pieces.append(Pairs(group.index[cut], group.clean[cut], group.corrupted[cut], every))
    return pieces


def _estimate(
    model: HookedTransformer, group: Pairs, metric: Any, site: str, by: tuple[str, ...]
) -> tuple[Float[Tensor, "pair *grid"], Bool[Tensor, "pair *grid"], Float[Tensor, "pair"], Float[Tensor, "pair"]]:
    """(written - there) . gradient of every cell; where the two differ at all; the metric of clean and corrupted."""
    n = model.cfg.n_layers
    points = points_of(model, site)
    with torch.no_grad():
        stream, written = model.run_with_cache(group.clean, names=points, stop_at_layer=n)
        clean_end = Reader(model, metric, stream).base
    with torch.enable_grad():
        stream, there = model.run_with_cache(group.corrupted, names=points, stop_at_layer=n, grads=True)
        base, grads = gradients_of(model, metric, stream, [there[point] for point in points])
    own = {point: there[point].detach() for point in points}
    values = written if group.aligned else matched(group.corrupted, group.clean, own, written)
    gaps = [values[point] - own[point] for point in points]
    layers = [_summed(gap * grad, point, by) for gap, grad, point in zip(gaps, grads, points, strict=True)]
    moved = [_summed(gap.abs(), point, by) > 0 for gap, point in zip(gaps, points, strict=True)]
    return torch.stack(layers, 1).to(base), torch.stack(moved, 1), clean_end, base


_CALLED = {"query_pos": "pos", "kv_head": "head", "d_mlp": "neuron"}


def _summed(product: Tensor, point: str, by: tuple[str, ...]) -> Float[Tensor, "pair *cell"]:
    """Summed over every axis that the grid does not have, the others in the grid's order."""
    names = [_CALLED.get(name, name) for name in axes(point)]
    rest = [i for i, name in enumerate(names) if i and name not in by]
    kept = [name for name in names[1:] if name in by]
    summed = product.sum(rest) if rest else product
    return summed.permute(0, *(1 + kept.index(name) for name in by[1:]))


def _to_check(effect: Grid, moved: Bool[Tensor, "*grid"], exact: int) -> Int[Tensor, "checked axis"]:
    """The cells of largest estimate, and as many drawn by seed from the rest; of those where something is written."""
    size = effect.abs().masked_fill(~moved, -1.0).flatten().cpu()
    flat = size.argsort(descending=True, stable=True)[: int(moved.sum())]
    top, rest = flat[:exact], flat[exact:]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[:exact]]
    return torch.stack(torch.unravel_index(torch.cat([top, drawn]), effect.shape), 1)


def _exactly(
    model: HookedTransformer, groups: list[Pairs], metric: Any, site: str, by: tuple[str, ...], checked: Tensor
) -> Float[Tensor, "pair checked"]:
    """The exact effects of these cells, by patching."""
    patches = [Patch(**dict(zip(by, index, strict=True))) for index in checked.tolist()]
    if not patches:
        return torch.zeros(sum(len(group.index) for group in groups), 0)
    outcomes = []
    with torch.no_grad(), engine(verify=0), packed_linears(rows=1024):
        clean = OtherRun("clean").once(targets_of(model, groups, points_of(model, site), into="corrupted"))
        for group, written in zip(groups, clean, strict=True):
            planned = plan(model, group.corrupted, site, written, by=by, patches=patches)
            outcomes.append(execute(SitePatches(planned), group.of(metric)))
    outcome = joined(groups, outcomes)
    return (outcome.values - outcome.base).T


def demo(model: HookedTransformer) -> AttributionPatching:
    """Heads on two short prompts that differ in one token, half of them checked; numbers without a tokenizer."""
    with engine(progress=False):
        return attribution_patch(model, demo_pairs(model, 1, 8), site="z", exact=1)

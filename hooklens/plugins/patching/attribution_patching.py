"""Attribution patching: what activation patching would find, estimated for a whole grid by one backward pass."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError
from hooklens.core.gradients import need_gradients
from hooklens.core.names import axes
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts, check_prompts_differ, read_pairs
from hooklens.metrics import ReadingMetric
from hooklens.model.linear import packed_linears
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.patching.attribution_result import AttributionPatching, Grid
from hooklens.plugins.patching.grid import in_order, labels_of, shape_of
from hooklens.results.statistics import group_numbers
from hooklens.sweeps.execution import execute
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import why_plain
from hooklens.sweeps.planning import Patch, has_site, plan, points_of, settle_by, site_kind
from hooklens.sweeps.replacement import OtherRun, matched, targets_of
from hooklens.sweeps.settings import current, engine
from hooklens.sweeps.site_patches import SitePatches

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def attribution_patch(
    model: "HookedTransformer",
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
    what it would do is missed. `exact` is the control: patching itself works out that many cells of largest estimate
    and as many others, drawn by seed from those that differ between the runs, and the result carries their correlation.
    `site`, `by` and prompts are those of `hl.patch`; `group` says which pairs share something.

    Reference: Nanda (2023), "Attribution Patching"; Syed et al. (2023), "Attribution Patching Outperforms Automated
    Circuit Discovery", equation 2.
    """
    site, axes_ = site_kind(site), settle_by(model, site, by)
    pairs = as_pairs(model, clean, corrupted, metric, group)
    groups = read_pairs(model, pairs.clean, pairs.corrupted, axes_)
    check_prompts_differ(groups)
    check_metric(pairs.metric, groups)
    _refuse(model, site, exact)
    parts = _pieces(model, groups, pairs.metric, site)
    found = [_estimate(model, part, part.of(pairs.metric), site, axes_) for part in parts]
    per_pair, moved, clean_end, corrupted_end = (in_order(parts, list(each)) for each in zip(*found, strict=True))
    checked = _to_check(per_pair.mean(0), moved.any(0), exact)
    shape = shape_of(model, site, axes_, groups[0].clean.shape[1])
    return AttributionPatching(
        per_pair=per_pair,
        clean_per_pair=clean_end,
        corrupted_per_pair=corrupted_end,
        site=site,
        by=axes_,
        labels=labels_of(model, axes_, shape, groups[0]),
        checked=checked,
        exact_per_pair=_exactly(model, groups, metric=pairs.metric, site=site, by=axes_, checked=checked),
        n_top=min(exact, len(checked)),
        group=group_numbers(len(pairs), pairs.group),
    )


def _refuse(model: "HookedTransformer", site: str, exact: int) -> None:
    need_gradients("attribution_patching")
    whole("exact", exact)
    has_site(model, site)
    reason = why_plain(model)
    if reason is not None and reason.startswith("dropout"):
        raise InputError(f"gradients were asked for while {reason}: clean and corrupted would differ by their masks")


def _pieces(model: "HookedTransformer", groups: list[Pairs], metric: Any, site: str) -> list[Pairs]:
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


def backward_rows(model: "HookedTransformer", n_pos: int, width: int = 0) -> int:
    """How many prompts of that length a backward pass through the model takes in the engine's memory, about.

    `width` is how much of each position and layer is kept beside what the backward pass itself keeps.
    """
    cfg = model.cfg
    kept = 16 * cfg.d_model + 4 * (cfg.d_mlp or 0) + 3 * width
    return current().memory // (cfg.n_layers * n_pos * kept * model.W_E.element_size())


def _estimate(
    model: "HookedTransformer", group: Pairs, metric: Any, site: str, by: tuple[str, ...]
) -> tuple[Float[Tensor, "pair *grid"], Bool[Tensor, "pair *grid"], Float[Tensor, "pair"], Float[Tensor, "pair"]]:
    """(written - there) . gradient of every cell; where the two differ at all; the metric of clean and corrupted."""
    n = model.cfg.n_layers
    points = points_of(model, site)
    with torch.no_grad():
        stream, written = model.run_with_cache(group.clean, names=points, stop_at_layer=n)
        clean_end = Reader(model, metric, stream).base
    with torch.enable_grad():
        stream, there = model.run_with_cache(group.corrupted, names=points, stop_at_layer=n, grads=True)
        reader = Reader(model, metric, stream.detach())
        total = reader.in_graph(stream).sum()
        if not total.requires_grad:
            raise InputError("the metric has no gradient (does it compare, round or take an argmax?); use hl.patch")
        grads = torch.autograd.grad(total, [there[point] for point in points], materialize_grads=True)
    own = {point: there[point].detach() for point in points}
    values = written if group.aligned else matched(group.corrupted, group.clean, own, written)
    gaps = [values[point] - own[point] for point in points]
    layers = [_summed(gap * grad, point, by) for gap, grad, point in zip(gaps, grads, points, strict=True)]
    moved = [_summed(gap.abs(), point, by) > 0 for gap, point in zip(gaps, points, strict=True)]
    return torch.stack(layers, 1).to(reader.dtype), torch.stack(moved, 1), clean_end, reader.base


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
    model: "HookedTransformer", groups: list[Pairs], metric: Any, site: str, by: tuple[str, ...], checked: Tensor
) -> Float[Tensor, "pair checked"]:
    """What patching finds for these cells."""
    patches = [Patch(**dict(zip(by, index, strict=True))) for index in checked.tolist()]
    found = []
    with torch.no_grad(), engine(verify=0), packed_linears(rows=1024):
        clean = OtherRun("clean").once(targets_of(model, groups, points_of(model, site), into="corrupted"))
        for group, written in zip(groups, clean, strict=True):
            if not patches:
                found.append(torch.zeros(len(group.index), 0))
                continue
            made = plan(model, group.corrupted, site, written, by=by, patches=patches)
            outcome = execute(SitePatches(made), group.of(metric))
            found.append((outcome.values - outcome.base).T)
    return in_order(groups, found)


def demo(model: "HookedTransformer") -> AttributionPatching:
    """Heads on two short prompts that differ in one token, half of them checked; numbers without a tokenizer."""
    with engine(progress=False):
        return attribution_patch(model, demo_pairs(model, 1, 8), site="z", exact=1)

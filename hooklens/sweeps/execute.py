"""Run a plan: only the rows that can change, only the layers above, many patches in one matrix."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.progress import progress, step, within
from hooklens.model.linear import kernel_of, packed_linears
from hooklens.sweeps.entry import entering
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import drops_out, plain_values, refuse_nonfinite, why_plain
from hooklens.sweeps.plan import Patch, Plan
from hooklens.sweeps.resume import Progressed, Resume, key_of, progressed
from hooklens.sweeps.rows import Group, PackedContext, merge, pack, unpack
from hooklens.sweeps.settings import Settings, current, pinned
from hooklens.sweeps.verify import verify


@dataclass(frozen=True, eq=False)
class Outcome:
    """The metric of every patch and pair, and how it was computed."""

    values: Float[Tensor, "patch pair"]
    base: Float[Tensor, "pair"]
    computed: float  # share of the plain loop's token-layers that were worked out
    largest_error: float  # between patches run both ways; NaN if none was
    n_verified: int
    how: str
    kernel: str  # "linear" or "packed": what linear layers multiplied with


@dataclass
class Item:
    """One patch of one pair that has to be run: its rows begin at `start`."""

    patch: int
    pair: int
    start: int


Walk = Callable[[Any, Reader, Sequence[Item]], list[Tensor]]


def execute(plan: Plan, metric: Any, *, resume: str | Path | Resume | None = None) -> Outcome:
    """The metric of every patch of a plan, exactly as a hooked forward pass a patch would give it."""
    settings, file = current(), None if resume is None else Resume.of(resume)
    with torch.no_grad(), pinned(None) if file is None else file.products(), packed_linears(rows=1024):
        reason = "asked for" if settings.plain else why_plain(plan.model)
        # before the metric is called for the first time, which may change what it refers to
        key = "" if file is None else key_of(plan, metric, file)
        reader = Reader(plan.model, metric, plan.base.streams[-1])
        values = reader.base.repeat(len(plan.patches), 1)
        kept = None if file is None else progressed(plan, file, key, reader.base, values)
        resumed = set() if kept is None else kept.finished()
        if reason is None:
            items = live_items(plan, reader)
            run_bins(plan, reader, items=items, values=values, kept=kept, settings=settings)
            worked, computed, how = {item.patch for item in items}, _share(plan, items), "engine"
            resumed &= worked
        else:
            _run_plain(plan, reader, values, kept, settings)
            worked, computed, how = set(), 1.0, f"plain loop: {reason}"
            resumed = set() if drops_out(plan.model) else resumed  # no two passes with dropout agree
        refuse_nonfinite(plan, values, reader.base)
        error, n = float("nan"), 0
        if reason is None or resumed:
            error, n = verify(plan, reader, worked, values, plain_values, resumed=resumed, file=file and file.path)
        return Outcome(
            values=values,
            base=reader.base,
            computed=computed,
            largest_error=error,
            n_verified=n,
            how=how,
            kernel=kernel_of(plan.model),
        )


def live_items(plan: Plan, reader: Reader) -> list[Item]:
    """Every (patch, pair) that can move the metric; the others' answer is the base run's."""
    n_pos, last = plan.tokens.shape[1], plan.model.cfg.n_layers - 1
    reach = None if reader.read is None else reader.read.amax(1)
    same, items = _Same(plan), []
    for number, patch in enumerate(plan.patches):
        starts = plan.start(patch)
        dead = same(patch) | (starts >= n_pos)
        if plan.causal:
            dead = dead | (plan.first_change >= n_pos)
            if patch.pos is not None:
                dead = dead | (plan.first_change > patch.pos)
            dead = dead if reach is None else dead | (starts > reach)
            stays = patch.layer == last and patch.pos is not None and plan.local
            if stays and reader.read is not None:
                dead = dead | reader.read.ne(patch.pos or 0).all(1)
        for pair in (~dead).nonzero().flatten().tolist():
            items.append(Item(number, pair, int(starts[pair])))
    return items


class _Same:
    """For which pairs a patch writes what is there already; compared once a layer, looked up a patch."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.tables: dict[tuple, Tensor] = {}

    def __call__(self, patch: Patch) -> Tensor:
        region = self.plan.region(patch)
        kept = tuple(axis for axis, index in enumerate(region) if not isinstance(index, slice))
        key = (patch.layer, kept)
        if key not in self.tables:
            equal = self.plan.base.acts[patch.layer] == self.plan.values[patch.layer]
            others = [axis + 1 for axis in range(len(region)) if axis not in kept]
            for axis in reversed(others):
                equal = equal.all(axis)
            self.tables[key] = equal
        return self.tables[key][(slice(None), *(region[axis] for axis in kept))]


def _run_plain(plan: Plan, reader: Reader, values: Tensor, kept: Progressed | None, settings: Settings) -> None:
    todo = [i for i in range(len(plan.patches)) if kept is None or not kept.done[i]]
    with progress(f"patching {plan.site}", len(todo), unit="patches") as advance:
        for i in todo:
            values[i] = plain_values(plan, [plan.patches[i]], reader)[0]
            advance()
            if kept is not None:
                kept.save([i])


def run_bins(
    plan: Any,
    reader: Reader,
    items: list[Item],
    values: Tensor,
    kept: Progressed | None,
    settings: Settings,
    walk: Walk | None = None,
) -> None:
    """The values of all items, a bin at a time; `walk` takes their rows through the layers in place of `_propagate`."""
    rows = max(1, settings.memory // _bytes_per_row(plan))
    # Every bin is made, then those that are finished are left out: what is left runs in the company it would have had.
    finished = set() if kept is None else kept.finished()
    bins = [one for one in make_bins(plan, items, rows) if not finished.issuperset(item.patch for item in one)]
    n = sum(len({item.patch for item in one}) for one in bins)
    run_one = _run_bin if walk is None else partial(_run_bin, walk=walk)
    with progress(f"patching {plan.site}", n, unit="patches") as advance:
        for one in bins:
            patches = {item.patch for item in one}
            with within(advance, len(patches), _rows_of_layers(plan, one)):
                run_one(plan, reader, one, values, rows)
            if kept is not None:
                kept.save(patches)


def _rows_of_layers(plan: Any, items: Sequence[Item]) -> int:
    """How many rows pass a layer, summed over the layers that each item passes."""
    n_layers, n_pos = plan.model.cfg.n_layers, plan.tokens.shape[1]
    return sum((n_layers - max(0, plan.patches[item.patch].layer)) * (n_pos - item.start) for item in items)


def _bytes_per_row(plan: Any) -> int:
    """What one token position of one row needs at its widest: a few streams, q k v, the MLP's hidden layer."""
    cfg = plan.model.cfg
    hidden = (3 if cfg.gated_mlp else 2) * cfg.d_mlp
    heads = 2 * (cfg.n_heads + cfg.n_key_value_heads) * cfg.d_head
    return plan.base.streams[0].element_size() * (4 * cfg.d_model + max(hidden, heads))


def make_bins(plan: Any, items: list[Item], rows: int) -> list[list[Item]]:
    """Items in bins of about `rows` token rows. A bin holds whole patches, near in position and then in layer."""
    n_pos = plan.tokens.shape[1]
    by_patch: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        by_patch[item.patch].append(item)
    order = sorted(by_patch, key=lambda i: (min(x.start for x in by_patch[i]), plan.patches[i].layer, i))
    total = sum(n_pos - item.start for item in items)
    size = total / max(1, -(-total // rows))  # balanced: no small bin is left over
    bins: list[list[Item]] = [[]]
    filled = 0
    for patch in order:
        weight = sum(n_pos - item.start for item in by_patch[patch])
        if bins[-1] and filled + weight / 2 > size:
            bins.append([])
            filled = 0
        bins[-1] += by_patch[patch]
        filled += weight
    return [one for one in bins if one]


def _run_bin(plan: Any, reader: Reader, items: list[Item], values: Tensor, rows: int, walk: Walk | None = None) -> None:
    """Values of a bin's patches; one patch with more rows than fit is pushed through in pieces."""
    n_pos, filled = plan.tokens.shape[1], 0
    pieces: list[list[Item]] = [[]]
    for item in items:
        if pieces[-1] and filled > 1.5 * rows:
            pieces.append([])
            filled = 0
        pieces[-1].append(item)
        filled += n_pos - item.start
    finals = [x for piece in pieces for x in (walk or _propagate)(plan, reader, piece)]
    if reader.rowwise():
        pair = torch.tensor([item.pair for item in items], device=values.device)
        start = torch.tensor([item.start for item in items], device=values.device)
        found = reader.values_of_rows(torch.stack(finals), pair, start)
        values[[i.patch for i in items], [i.pair for i in items]] = found
        return
    by_patch: dict[int, list[tuple[int, int, Tensor]]] = defaultdict(list)
    for item, x in zip(items, finals, strict=True):
        by_patch[item.patch].append((item.pair, item.start, x))
    for patch, rows_of in by_patch.items():
        values[patch] = reader.values_of_patch(rows_of)


def _propagate(plan: Plan, reader: Reader, items: Sequence[Item]) -> list[Tensor]:
    """Walk the layers once: rows enter where their patch is, and pass through every block above."""
    joining = _joining(plan, items)
    n_layers, n_pos = plan.model.cfg.n_layers, plan.tokens.shape[1]
    before = plan.swept.before_block  # enters before its block, every other site after it
    groups: list[Group] = []
    out: dict[int, Tensor] = {}
    for layer in range(min(layer for layer, _ in joining), n_layers):
        new = [entering(plan, layer, start, one) for (at, (start, *_)), one in joining.items() if at == layer]
        if before:
            groups = merge(groups + new)
        last = layer == n_layers - 1
        if groups:
            read = reader.read if last and plan.causal else None
            ctx = PackedContext(plan.base.past, n_pos, groups, read)
            packed = pack(groups)
            flat = plan.model.blocks[layer](packed, ctx)
            step(packed.shape[1])
            groups = unpack(flat, groups, None if read is None else read.shape[1])
            if last:
                _collect(out, groups, reader, read is not None)
                groups = []
        if not before:
            groups = merge(groups + new)
    _collect(out, groups, reader, False)
    return [out[i] for i in range(len(items))]


def _joining(plan: Plan, items: Sequence[Item]) -> dict[tuple, list[tuple[int, Patch, int]]]:
    """Items that enter together: one layer, one start, regions of one kind."""
    joining: dict[tuple, list[tuple[int, Patch, int]]] = defaultdict(list)
    for number, item in enumerate(items):
        patch = plan.patches[item.patch]
        kind = (item.start, patch.pos, patch.head is None, patch.neuron is None)
        joining[patch.layer, kind].append((number, patch, item.pair))
    return joining


def _collect(out: dict[int, Tensor], groups: list[Group], reader: Reader, read_only: bool) -> None:
    for group in groups:
        finals = reader.finals(group, read_only)
        for row, item in enumerate(group.item.tolist()):
            out[item] = finals[row]


def _share(plan: Plan, items: list[Item]) -> float:
    n_layers, n_pos = plan.model.cfg.n_layers, plan.tokens.shape[1]
    return _rows_of_layers(plan, items) / max(1, len(plan.patches) * len(plan.tokens) * n_layers * n_pos)

"""The patches of sites as the engine runs them: only the rows that can change, only the layers above."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooklens.core.hooks import HookFn
from hooklens.core.progress_bar import step
from hooklens.sweeps.entry import entering
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import first_nonfinite, under_hooks
from hooklens.sweeps.planning import Patch, Plan
from hooklens.sweeps.protocol import Item, Sweep
from hooklens.sweeps.rows import Group, PackedContext, merge, pack, unpack


class SitePatches(Sweep):
    """Overwritten sites: rows enter where their patch is, and pass through every block above."""

    def __init__(self, plan: Plan):
        self.plan, self.model, self.tokens = plan, plan.model, plan.tokens
        self.title = f"patching {plan.site}"

    def __len__(self) -> int:
        return len(self.plan.patches)

    @property
    def stream(self) -> Float[Tensor, "pair pos d_model"]:
        return self.plan.base.streams[-1]

    def name_of(self, number: int) -> str:
        cell = self.plan.patches[number]._asdict()
        at = ", ".join(f"{axis} {index}" for axis, index in cell.items() if index is not None)
        return f"the patch of {self.plan.site} at {at}"

    def layer_of(self, number: int) -> int:
        return self.plan.patches[number].layer

    def live(self, reader: Reader) -> list[Item]:
        plan = self.plan
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

    def walk(self, reader: Reader, items: Sequence[Item]) -> list[Tensor]:
        return _propagate(self.plan, reader, items)

    def plain(self, numbers: Sequence[int], reader: Reader) -> Float[Tensor, "patch pair"]:
        n = len(self.tokens)
        hooks = [self.writing(number, slice(i * n, (i + 1) * n)) for i, number in enumerate(numbers)]
        return under_hooks(reader, self.tokens, hooks, len(numbers))

    def writing(self, number: int, rows: slice = slice(None)) -> tuple[str, HookFn]:
        """The patch as a hook, in those rows of the batch."""
        patch = self.plan.patches[number]
        region, value = self.plan.region(patch), self.plan.values[patch.layer]

        def write(act: Tensor, hook: Any) -> Tensor:
            act[(rows, *region)] = value[(slice(None), *region)]
            return act

        return self.plan.point(patch.layer), write

    def asked(self) -> tuple[Any, Mapping[str, Any]]:
        plan = self.plan
        source = dict(plan.source) if isinstance(plan.source, Mapping) else plan.source
        return (plan.site, plan.by, plan.shape, plan.patches, plan.tokens), {"the value to write": source}

    def sketch(self) -> Sequence[Float[Tensor, "..."]]:
        return [value for _, value in sorted(self.plan.values.items())]

    def fault(self, said: str, values: Float[Tensor, "patch pair"]) -> str:
        plan, more = self.plan, "; hooklens check shows more"
        if (point := first_nonfinite(plan.model, plan.tokens)) is not None:
            return f"the metric is {said}: the model's own activations are not finite from {point} on{more}"
        for layer, value in plan.values.items():
            if not bool(value.isfinite().all()):
                return f"the metric is {said}: the values to write at {plan.point(layer)} are not finite"
        bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
        where = f"the metric is {said} for {len(bad)} of {len(values)} patches"
        point = first_nonfinite(plan.model, plan.tokens, self.writing(bad[0])) if bad else None
        if point is None:
            return (
                f"{where}, though every activation is finite: look at the metric, and whether the model forbids a "
                "token that it reads (a logit of -inf)"
            )
        first = plan.patches[bad[0]]
        return f"{where}, the first of them {first}: with it written, activations are not finite from {point} on"


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

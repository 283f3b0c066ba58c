"""One batch of exact edge patching, pairs of one length: as the engine runs it, and by hooks on the model."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooklens.core.hooks import HookFn
from hooklens.core.names import Where
from hooklens.data.prompts import Pairs, same_inputs
from hooklens.model.kv_cache import Context, KVCache
from hooklens.model.linear import is_plain
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.graph import CircuitGraph, Slot
from hooklens.plugins.circuits.node_runs import AblatedOf, Wanted, head_outputs, mlp_output
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.protocol import Item, Patches
from hooklens.sweeps.settings import Settings, current

Kept = Bool[Tensor, "mask edge"] | Float[Tensor, "mask edge"]
Moved = Float[Tensor, "mask source pair pos d_model"]
_FEW = 16  # circuits of which one is verified
_POSITIONS = 512  # of one batch of rows: products are efficient from there on, and fewer circuits share more idle nodes


def in_play(graph: CircuitGraph, masks: Kept, *, rooted: bool) -> Kept:
    """The masks without the edges that can change nothing: they carry the ablated value anyway, or lead nowhere.

    `rooted`: the ablated run is one of the model. With zeros or means for inputs a node writes something of its own.
    """
    path = graph.on_a_path(masks.ne(0), rooted=rooted)
    return masks & path if masks.dtype == torch.bool else masks * path


def sources_of(graph: CircuitGraph, masks: Kept) -> Bool[Tensor, "source"]:
    """The nodes that some kept edge leaves."""
    wanted = torch.zeros(graph.n_sources, dtype=torch.bool)
    wanted[graph.ends[0][masks.ne(0).any(0).cpu()]] = True
    return wanted


class EdgeRunner:
    """The streams of any circuits on some pairs of a group; the ablated run has the nodes `held` (None: all)."""

    def __init__(
        self,
        model: HookedTransformer,
        graph: CircuitGraph,
        group: Pairs,
        rows: slice,
        *,
        metric: Any,
        ablated_of: AblatedOf,
        held: Wanted,
    ):
        self.model, self.graph, self.rows, self.ablated_of = model, graph, rows, ablated_of
        self.clean = clean = group.clean[rows]
        self.n_pairs, ablated = len(clean), ablated_of(rows, held)
        first = first_difference(clean, ablated.tokens) if model.cfg.causal else 0
        streams = [stream.expand(self.n_pairs, -1, -1) for stream in ablated.streams]
        self.reader = Reader(model, metric, streams[-1])
        self.start = first if self.reader.read is None else min(first, int(self.reader.read.min()))
        self.bases = [stream[:, self.start :] for stream in streams]
        self.held = torch.arange(graph.n_sources) if held is None else held.nonzero().flatten()
        self.written = ablated.nodes[:, :, self.start :]
        self.ctx = _AfterPrefix(clean.shape[1], self.start, ablated.past, clean.device)
        with torch.no_grad():
            self.embedded = model(clean, stop_at_layer=0)[:, self.start :]

    def ablated(self, some: slice) -> Float[Tensor, "source _pair pos d_model"]:
        """What every node writes in the ablated run of some of these pairs, from `start` on."""
        if len(self.held) == self.graph.n_sources:
            return self.written if self.written.shape[1] == 1 else self.written[:, some]
        start = self.rows.start
        return self.ablated_of(slice(start + some.start, start + some.stop), None).nodes[:, :, self.start :]

    def prefix(self, some: slice) -> KVCache | None:
        """The keys and values before `start`, where the prompts of these pairs are still the same."""
        if not self.start:
            return None
        past = KVCache()
        past.length, past.step = self.start, 1
        past._layers = {layer: (keys[some], values[some]) for layer, (keys, values) in enumerate(self.ctx.past)}
        return past

    def streams(self, masks: Kept) -> Float[Tensor, "mask pair some d_model"]:
        """The stream behind the last block in each circuit, where the metric reads it, or from `start` on."""
        batch = _Batch(self, masks)
        for slot, base in zip(self.graph.slots[:-1], self.bases[:-1], strict=True):
            if slot.kind == "mlp":
                batch.mlp(slot, base)
            else:
                batch.heads(slot, base)
        last, base, read = self.graph.slots[-1], self.bases[-1], self.reader.read
        if read is None:
            return batch.read(last, base)[:, 0]
        at = torch.arange(self.n_pairs, device=base.device)[:, None], read - self.start
        return batch.read(last, base[at], moved=batch.moved[:, :, *at])[:, 0]


def first_difference(clean: Tensor, other: Tensor | None) -> int:
    """The first position at which any pair's prompts differ; the last one where none does, 0 without another run."""
    if other is None:
        return 0
    differs = ~same_inputs(clean, other).all(0)
    return int(differs.long().argmax()) if bool(differs.any()) else clean.shape[1] - 1


class _Batch:
    """Circuits on their way through the model. `moved`: what each node writes beyond the ablated run."""

    def __init__(self, runner: EdgeRunner, masks: Kept):
        self.runner, self.graph, self.blocks = runner, runner.graph, runner.model.blocks
        self.kept = masks.to(runner.embedded)
        wanted = sources_of(self.graph, masks)
        self.sources = wanted.nonzero().flatten()
        self.column = torch.where(wanted, wanted.cumsum(0) - 1, -1).tolist()
        at = torch.searchsorted(runner.held, self.sources)
        self.written = runner.written if len(at) == len(runner.held) else runner.written[at.to(runner.written.device)]
        shape = len(masks), len(self.sources), *runner.embedded.shape
        self.moved: Moved = runner.embedded.new_empty(shape)
        if wanted[0]:
            self.moved[:, 0] = runner.embedded - self.written[0]

    def read(
        self, slot: Slot, base: Tensor, rows: Tensor | None = None, moved: Moved | None = None
    ) -> Float[Tensor, "mask receiver pair pos d_model"]:
        """What each receiver reads: the ablated stream plus what its kept edges carry beyond it."""
        n = int((self.sources < slot.columns).sum())
        block = self.graph.block(self.kept, slot)
        block = block if rows is None else block[:, rows]
        block = block if n == slot.columns else block[:, :, self.sources[:n]]
        carried = torch.bmm(block, (self.moved if moved is None else moved)[:, :n].flatten(2))
        return carried.view(*block.shape[:2], *base.shape).add_(base)

    def mlp(self, slot: Slot, base: Tensor) -> None:
        column = self.column[self.graph.mlp_at(slot.layer)]
        if column >= 0:
            read = self.read(slot, base)
            wrote = mlp_output(self.blocks[slot.layer], read.flatten(0, 2))
            self.moved[:, column] = wrote.view_as(read[:, 0]) - self.written[column]

    def heads(self, slot: Slot, base: Tensor) -> None:
        graph, block = self.graph, self.blocks[slot.layer]
        columns = self.column[graph.heads_at(slot.layer)]
        wrote = torch.tensor([h for h, column in enumerate(columns) if column >= 0], dtype=torch.long)
        if not len(wrote):
            return
        # the scale of a norm behind attention depends on every head of the layer
        heads = torch.arange(graph.n_heads) if graph.shared_scale else wrote
        keyed = (heads // graph.group).unique()
        rows = torch.cat((heads, graph.n_heads + keyed, graph.n_heads + graph.n_kv_heads + keyed))
        read = self.read(slot, base, rows)
        parts = block.quiet_norm(read.flatten(0, 1)).view_as(read).split([len(heads), len(keyed), len(keyed)], dim=1)
        attn = block.attn
        q, k, v = (
            _projected(attn, linear, part, which).flatten(0, 1)
            for linear, part, which in zip((attn.q, attn.k, attn.v), parts, (heads, keyed, keyed), strict=True)
        )
        q, k = attn.place(q, k, self.runner.ctx)
        z = self.runner.ctx.attend(attn, q, k, v)
        out = head_outputs(block, z, wrote).unflatten(1, (len(self.kept), self.runner.n_pairs)).transpose(0, 1)
        at = slice(columns[int(wrote[0])], columns[int(wrote[-1])] + 1)
        self.moved[:, at] = out - self.written[at]


class _AfterPrefix(Context):
    """Positions from `start` on; before it every row has the ablated run's keys and values."""

    def __init__(self, n_pos: int, start: int, past: list[tuple[Tensor, Tensor]], device: torch.device):
        super().__init__(torch.arange(start, n_pos, device=device), start)
        self.past = [tuple(x[:, :start] for x in both) for both in past] if start else []

    def attend(self, attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.past:
            before = [x.repeat(len(k) // len(x), 1, 1, 1) for x in self.past[attn.layer]]
            k, v = torch.cat((before[0], k), 1), torch.cat((before[1], v), 1)
        return attn.mix(q, attn.see_keys(k), v, self.view(attn.mask))


def _projected(
    attn: Any, linear: nn.Module, x: Float[Tensor, "mask row pair pos d_model"], heads: Int[Tensor, "row"]
) -> Float[Tensor, "mask pair pos head d_head"]:
    """Each receiver's own input through its own part of the projection; 0 for heads that are not run."""
    n, d = (attn.n_heads if linear is attn.q else attn.n_kv_heads), attn.d_head
    if is_plain(linear):
        out = torch.einsum("mrbpk,rdk->mbprd", x, linear.weight.unflatten(0, (n, d))[heads])
        out = out if linear.bias is None else out + linear.bias.view(n, d)[heads]
    else:
        parts = [linear(x[:, i]).unflatten(-1, (n, d))[..., h, :] for i, h in enumerate(heads.tolist())]
        out = torch.stack(parts, dim=3)
    return out if len(heads) == n else out.new_zeros(*out.shape[:3], n, d).index_copy_(3, heads.to(x.device), out)


class EdgePatches(Patches):
    """One patch a circuit: all edges that are not kept carry the ablated run.

    `asked` are the circuits as given; `masks` leave out the edges that cannot change anything.
    """

    title, unit, together = "circuits", "circuits", True

    def __init__(self, runner: EdgeRunner, masks: Kept, asked: Kept, positions: int):
        self.runner, self.model, self.tokens = runner, runner.model, runner.clean
        self.masks, self.asked, self.positions = masks, asked, positions

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def stream(self) -> Float[Tensor, "pair pos d_model"]:
        return self.runner.reader.stream

    def name_of(self, number: int) -> str:
        return f"circuit {number}"

    def layer_of(self, number: int) -> int:
        return 0

    def checks(self, drawn: Sequence[int], n: int, reader: Reader) -> list[list[int]]:
        """Of few circuits one, unless more are asked for than by default: a plain pass costs as much as theirs."""
        few = n <= Settings.verify and len(drawn) <= _FEW
        return super().checks(drawn, min(n, 1) if few else n, reader)

    def live(self, reader: Reader) -> list[Item]:
        lives = self.masks.ne(0).any(1).nonzero().flatten().tolist()
        return [Item(number, pair, self.runner.start) for number in lives for pair in range(len(self.tokens))]

    def rows_at_once(self, memory: int) -> int:
        return max(1, min(_POSITIONS, self.positions))

    def walk(self, reader: Reader, items: Sequence[Item]) -> list[Tensor]:
        numbers = [item.patch for item in items[:: len(self.tokens)]]  # items are all pairs of one patch after another
        return list(self.runner.streams(self.masks[numbers]).flatten(0, 1))

    def plain(self, numbers: Sequence[int], reader: Reader) -> Float[Tensor, "mask pair"]:
        """The clean run with hooks that exchange the live value of every cut edge for the ablated one at its reader."""
        runner, n_pairs, n_layers = self.runner, len(self.tokens), self.model.cfg.n_layers
        # two tensors with every node's output: the ablated one, and its difference from the live one
        position = 3 * runner.graph.n_sources * self.model.cfg.d_model * self.stream.element_size()
        at_once = max(1, current().memory // position // self.tokens.shape[1])
        streams: list[list[Tensor]] = [[] for _ in numbers]
        for rows in (slice(i, min(i + at_once, n_pairs)) for i in range(0, n_pairs, at_once)):
            ablated, before = runner.ablated(rows), reader.stream[rows, : runner.start]
            for parts, number in zip(streams, numbers, strict=True):
                hooks = _exchanging(runner, self.asked[number], ablated, rows.stop - rows.start)
                past, tokens = runner.prefix(rows), self.tokens[rows, runner.start :]
                with self.model.hooks(hooks):
                    parts.append(torch.cat((before, self.model(tokens, stop_at_layer=n_layers, kv_cache=past)), 1))
        return reader.on_streams(torch.cat([part for parts in streams for part in parts]))

    def fault(self, said: str, values: Float[Tensor, "mask pair"]) -> str:
        return f"the metric of the ablated run or of a circuit is not finite ({said}), though the model's own is"


def _exchanging(
    runner: EdgeRunner, kept: Tensor, ablated: Float[Tensor, "source _pair pos d_model"], n_pairs: int
) -> list[tuple[Where, HookFn]]:
    """Hooks on a clean run that exchange what cut edges carry. `moves`: each node, ablated minus live."""
    graph, cut = runner.graph, 1 - kept.to(ablated)
    moves = ablated.new_empty(len(ablated), n_pairs, *ablated.shape[2:])

    def reading(of_receivers: Float[Tensor, "*row source"]) -> HookFn:
        def exchange(act: Tensor, hook: Any) -> Tensor:
            moved = moves[: of_receivers.shape[-1]]
            change = (of_receivers @ moved.flatten(1)).view(-1, *moved.shape[1:])  # receiver pair pos d_model
            return act + change.permute(1, 2, 0, 3).reshape(act.shape)

        return exchange

    def writing(at: int | slice, block: Any = None) -> HookFn:
        def record(act: Tensor, hook: Any) -> None:
            live = act if block is None else head_outputs(block, act, torch.arange(graph.n_heads))
            moves[at] = ablated[at] - live

        return record

    hooks: list[tuple[Where, HookFn]] = [(("resid_pre", 0), writing(0))]
    for slot in graph.slots:
        edges, layer = graph.block(cut, slot), slot.layer
        if slot.kind == "logits":
            hooks.append((("resid_post", layer - 1), reading(edges[0])))
        elif slot.kind == "mlp":
            hooks += [(("mlp_in", layer), reading(edges[0])), (("mlp_out", layer), writing(graph.mlp_at(layer)))]
        else:
            parts = zip("qkv", edges.split([graph.n_heads, graph.n_kv_heads, graph.n_kv_heads]), strict=True)
            hooks += [((f"{name}_input", layer), reading(part)) for name, part in parts]
            hooks.append((("z", layer), writing(graph.heads_at(layer), runner.model.blocks[layer])))
    return hooks

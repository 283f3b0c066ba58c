"""Circuits on a batch of pairs as the engine runs them, and once more by hooks on the model's own forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.hooks import HookFn
from hooklens.core.names import Where
from hooklens.plugins.circuits.graph import Slot
from hooklens.plugins.circuits.node_runs import head_outputs
from hooklens.plugins.circuits.runner import EdgeRunner, Kept
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.protocol import Item, Patches
from hooklens.sweeps.settings import current

_POSITIONS = 512  # of one batch of rows: products are efficient from there on, and fewer circuits share more idle nodes


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
        runner, n_pairs = self.runner, len(self.tokens)
        # two tensors with every node's output: the ablated one, and its difference from the live one
        position = 3 * runner.graph.n_sources * self.model.cfg.d_model * self.stream.element_size()
        at_once = max(1, current().memory // position // self.tokens.shape[1])
        streams: list[list[Tensor]] = [[] for _ in numbers]
        for rows in (slice(i, min(i + at_once, n_pairs)) for i in range(0, n_pairs, at_once)):
            ablated = runner.ablated(rows)
            for parts, number in zip(streams, numbers, strict=True):
                hooks = _Exchanging(runner, self.asked[number], ablated).hooks()
                n = self.model.cfg.n_layers
                parts.append(self.model.run_with_hooks(self.tokens[rows], fwd_hooks=hooks, stop_at_layer=n))
        return torch.stack([reader.on_stream(torch.cat(parts)) for parts in streams])

    def fault(self, said: str, values: Float[Tensor, "mask pair"]) -> str:
        return f"the metric of the ablated run or of a circuit is not finite ({said}), though the model's own is"


class _Exchanging:
    """Hooks on a clean run that exchange what cut edges carry. `moves`: each node, ablated minus live."""

    def __init__(self, runner: EdgeRunner, kept: Tensor, ablated: Float[Tensor, "source pair pos d_model"]):
        self.graph, self.blocks, self.ablated = runner.graph, runner.model.blocks, ablated
        self.cut = 1 - kept.to(ablated)
        self.moves: Float[Tensor, "source pair pos d_model"] | None = None

    def hooks(self) -> list[tuple[Where, HookFn]]:
        hooks: list[tuple[Where, HookFn]] = [(("resid_pre", 0), self._writing(0))]
        for slot in self.graph.slots:
            hooks += self._slot(slot)
        return hooks

    def _slot(self, slot: Slot) -> list[tuple[Where, HookFn]]:
        block, layer, n, g = self.graph.block(self.cut, slot), slot.layer, self.graph.n_heads, self.graph.n_kv_heads
        if slot.kind == "logits":
            return [(("resid_post", layer - 1), self._reading(block[0]))]
        if slot.kind == "mlp":
            return [
                (("mlp_in", layer), self._reading(block[0])),
                (("mlp_out", layer), self._writing(self.graph.mlp_at(layer))),
            ]
        parts = zip("qkv", block.split([n, g, g]), strict=True)
        reads = [((f"{name}_input", layer), self._reading(part)) for name, part in parts]
        return [*reads, (("z", layer), self._heads(layer))]

    def _reading(self, cut: Float[Tensor, "*row source"]) -> HookFn:
        def exchange(act: Tensor, hook: Any) -> Tensor:
            assert self.moves is not None
            moved = self.moves[: cut.shape[-1]]
            change = (cut @ moved.flatten(1)).view(-1, *moved.shape[1:])  # receiver pair pos d_model
            return act + change.permute(1, 2, 0, 3).reshape(act.shape)

        return exchange

    def _writing(self, source: int) -> HookFn:
        def record(act: Tensor, hook: Any) -> None:
            if self.moves is None:
                self.moves = act.new_empty(len(self.ablated), *act.shape)
            self.moves[source] = self.ablated[source] - act

        return record

    def _heads(self, layer: int) -> HookFn:
        at = self.graph.heads_at(layer)

        def record(z: Tensor, hook: Any) -> None:
            assert self.moves is not None
            live = head_outputs(self.blocks[layer], z, torch.arange(self.graph.n_heads))
            self.moves[at] = self.ablated[at] - live

        return record

"""Where a path begins and where it ends: senders write to the residual stream, receivers read from it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hooklens.core.component import Component, no_component
from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.core.names import Site
from hooklens.model.transformer import HookedTransformer

#: What stands before a layer's number in a tuple or a Site: the kind of component.
_KINDS = {"z": "head", "head": "head", "mlp_out": "mlp", "post": "neuron"}
_KINDS |= {kind: kind for kind in ("q", "k", "v", "mlp", "mlp_in", "neuron", "layer")}
#: What a method asks for: the kinds of components that it takes, and how they are written.
_TAKES = {
    "sender": (("head", "mlp", "embed"), 'senders write to the residual stream: "L9H6", "MLP9", "embed"'),
    "receiver": (
        ("q", "k", "v", "mlp_in", "final"),
        'receivers read from the residual stream: "L9H6.q" (or .k, .v), "MLP9", "final"',
    ),
    "head": (("head",), 'heads are written (9, 6) or "L9H6"'),
    "layer of neurons": (("mlp",), 'MLPs are written 9 or "MLP9"'),
}

Sender = Component  # at the beginning of a path: it writes to the stream
Receiver = Component  # at its end: it reads from the stream


@dataclass(frozen=True, eq=False)
class At:
    """Senders or receivers at one position of each pair: `At("L9H6.q", -1)`, `At("heads", s2, "S2")`.

    `node` is whatever names senders or receivers. `pos` is a number, negative from the prompt's last token, or a tensor
    or list of one a pair. `name` is what the position is called in names of nodes, such as `L9H6.q@S2`.
    """

    node: Any
    pos: Any
    name: str = ""


def of_pairs(nodes: Sequence[Component], index: Sequence[int], n: int) -> tuple[Component, ...]:
    """The same nodes for some of n pairs: positions given one a pair are those pairs' own."""
    chosen = []
    for node in nodes:
        if isinstance(node.pos, tuple):
            if len(node.pos) != n:
                raise InputError(f"{len(node.pos)} positions ({node.at[1:]}) were given for {n} pairs; give one a pair")
            node = replace(node, pos=tuple(node.pos[i] for i in index))
        chosen.append(node)
    return tuple(chosen)


def on_tokens(nodes: Sequence[Component], n: int, n_pos: int) -> tuple[Component, ...]:
    """The same nodes with positions counted from the start, one a pair, for n pairs of n_pos tokens."""
    placed = []
    for node in nodes:
        positions = (node.pos,) * n if isinstance(node.pos, int) else node.pos or ()
        for pos in positions:
            if not -n_pos <= pos < n_pos:
                raise InputError(f"position {pos} was asked for ({node.at[1:]}) in a prompt of {n_pos} tokens")
        placed.append(replace(node, pos=tuple(pos % n_pos for pos in positions) or None))
    return tuple(placed)


class Order:
    """The order in which components read and write.

    Stage 2 l is the attention of layer l, 2 l + 1 its MLP, 2 n_layers the final norm. In blocks whose attention reads
    the MLP, these two change places.
    """

    def __init__(self, model: HookedTransformer):
        self.end = 2 * model.cfg.n_layers
        block = model.blocks[0]
        self.within = block.mlp is not None and block.mlp_reads_attn
        self.first = "mlp" if block.mlp is not None and block.attn_reads_mlp else "head"
        self.follows = self.within or self.first == "mlp"  # does one part read what the other of its block wrote?

    def reads_at(self, receiver: Component) -> int:
        """The stage at which a receiver reads."""
        if receiver.kind == "final":
            return self.end
        return 2 * receiver.layer + (("mlp" if receiver.kind == "mlp_in" else "head") != self.first)

    def feeds_from(self, sender: Component) -> int:
        """The first stage that reads what a sender writes; the MLP of a parallel block reads no head of its layer."""
        if sender.kind == "embed":
            return 0
        return 2 * sender.layer + (1 if sender.kind == self.first and self.follows else 2)


def read_components(model: HookedTransformer, asked: Any, what: str = "component") -> list[Component]:
    """The components that a name, a tuple or a Site selects in this model; one that does not exist raises.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> [one.name for asked in ("L1H0@-1", ("q", -1), ("mlp", 0)) for one in read_components(model, asked)]
    ['L1H0@-1', 'L1H0.q', 'L1H1.q', 'MLP0']
    """
    if isinstance(asked, Component):
        return [_check(model, asked, what)]
    if isinstance(asked, str):
        named = _parsed(model, asked, what)
        if named.kind == "head" and named.keyed:  # keys and values are shared, the head is not
            raise no_component(asked, what)
        if named.kind in ("k", "v") and not named.keyed and (named.head or 0) < model.cfg.n_heads:
            group = model.cfg.n_heads // model.cfg.n_key_value_heads
            named = replace(named, head=(named.head or 0) // group)  # the keys that this head reads
        return [_check(model, named, what)]
    parts: tuple = tuple(asked) if _is_tuple(asked) else ()
    if isinstance(asked, Site):
        parts = (asked.name, asked.layer)
    if len(parts) == 2 and _is_number(parts[0]):
        parts = ("head", *parts)
    kind = _KINDS.get(parts[0]) if parts and isinstance(parts[0], str) else None
    if kind is None or len(parts) > 3 or not all(map(_is_number, parts[1:])) or len(parts) < 2:
        raise no_component(asked, what)
    layer, *rest = (int(number) for number in parts[1:])
    if kind in ("mlp", "mlp_in", "layer", "neuron"):
        return [_check(model, Component(kind, layer, neuron=rest[0] if rest else None), what)]
    heads = rest or range(_n_heads(model, kind))
    return [_check(model, Component(kind, layer, head), what) for head in heads]


def _parsed(model: HookedTransformer, name: str, what: str) -> Component:
    try:
        return Component.parse(name, what)
    except InputError as error:
        if "; closest: " in str(error):
            raise
        names = dict.fromkeys(node.name for node in (*_heads(model), *_mlps(model), *_receivers(model)))
        closest = str(did_you_mean(what, name, names)).rpartition("; ")[2]
        raise InputError(f"{error}; {closest}") from error


def read_senders(model: HookedTransformer, asked: Any) -> tuple[Component, ...]:
    """Senders from what a user writes: (9, 6) or "L9H6", ("mlp", 9) or "MLP9", "embed", "heads", "mlps"; None: all.

    "L9H6@-1", or any of them within `At(..., pos)`: at that position only.

    >>> from hooklens.testing import tiny_model
    >>> [sender.name for sender in read_senders(tiny_model(), ["heads", "MLP1", "embed"])]
    ['L0H0', 'L0H1', 'L1H0', 'L1H1', 'MLP1', 'embed']
    """
    if asked is None:
        asked = ["heads"] if model.cfg.attn_only else ["heads", "mlps"]
    return tuple(dict.fromkeys(_read(model, asked, "sender", {"heads": _heads(model), "mlps": _mlps(model)})))


def read_receivers(model: HookedTransformer, asked: Any) -> tuple[Component, ...]:
    """Receivers from what a user writes: ("q", 9, 6) or "L9H6.q", ("k", 9): every head, ("mlp", 9), "final", "all".

    >>> from hooklens.testing import tiny_model
    >>> [receiver.name for receiver in read_receivers(tiny_model(), [("q", 1), "MLP1", "final"])]
    ['L1H0.q', 'L1H1.q', 'MLP1', 'final']
    """
    return tuple(dict.fromkeys(_read(model, asked, "receiver", {"all": _receivers(model)})))


def read_heads(model: HookedTransformer, heads: Any) -> list[tuple[int, int]]:
    """(layer, head) of every head asked for, all of them for None; at least one, none twice, all of them there.

    >>> from hooklens.testing import tiny_model
    >>> read_heads(tiny_model(), ["L0H1", (-1, 0)])
    [(0, 1), (1, 0)]
    """
    nodes = _read(model, "heads" if heads is None else heads, "head", {"heads": _heads(model)})
    if len(set(nodes)) < len(nodes):
        raise InputError(f"heads= holds one twice: {', '.join(head.name for head in nodes)}")
    return [node.place for node in nodes]


def _read(model: HookedTransformer, asked: Any, what: str, sets: dict[str, list[Component]]) -> list[Component]:
    """The components that a user asks for as `what`; the words in `sets` stand for several."""
    nodes: list[Component] = []
    for item in listed(asked, f"{what}s"):
        if isinstance(item, At) and what != "head":
            nodes += _placed(_read(model, item.node, what, sets), item)
        elif isinstance(item, str) and item in sets:
            nodes += sets[item]
        else:
            nodes += of_kinds(read_components(model, item, what), what)
    if not nodes:
        raise InputError(f"{what}s= names none; give at least one: {_TAKES[what][1]}")
    return nodes


def of_kinds(nodes: Sequence[Component], what: str) -> list[Component]:
    """The components, if a method takes them as `what`; an MLP as a receiver stands for what it reads."""
    if what == "receiver":
        nodes = [replace(node, kind="mlp_in") if node.kind == "mlp" else node for node in nodes]
    kinds, written = _TAKES[what]
    for node in nodes:
        if node.kind not in kinds:
            raise InputError(f"{node.name} was asked for as a {what}; {written}")
        if node.pos is not None and what in ("head", "layer of neurons"):
            raise InputError(f"{node.name} was asked for as a {what}, taken at all positions here; leave out @")
    return list(nodes)


def _placed(nodes: Sequence[Component], at: At) -> list[Component]:
    try:
        pos = torch.as_tensor(at.pos)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(f"At(node, pos) has a whole number or one a pair, got {at.pos!r:.60}") from error
    if pos.is_floating_point() or pos.is_complex() or pos.dtype == torch.bool or pos.ndim > 1 or not pos.numel():
        raise WrongType(f"At(node, pos) has a whole number or one a pair, got {pos.dtype} {list(pos.shape)}")
    for node in nodes:
        if node.pos is not None:
            raise InputError(f"{node.at[1:]} was given a second position; give each node one At")
    ends = sorted({int(pos.min()), int(pos.max())})
    name = f"@{at.name or '..'.join(map(str, ends))}"
    return [replace(node, pos=tuple(pos.tolist()) if pos.ndim else int(pos), at=name) for node in nodes]


def listed(asked: Any, what: str) -> Iterable[Any]:
    """One thing or several: a tuple such as ("q", 9, 6) or (9, 6) is one."""
    if isinstance(asked, str | Site | Component | At) or (isinstance(asked, tuple) and asked and _plain(asked)):
        return [asked]
    if isinstance(asked, Iterable):
        return asked.tolist() if isinstance(asked, Tensor) else asked
    raise WrongType(f"{what} are a list of names or tuples, got {asked!r:.80}")


def _plain(selector: tuple) -> bool:
    return (
        len(selector) > 1 and all(map(_is_number, selector[1:])) and (_is_number(selector[0]) or selector[0] in _KINDS)
    )


def _is_tuple(asked: Any) -> bool:
    return isinstance(asked, tuple | list) or hasattr(asked, "tolist")


def _is_number(x: Any) -> bool:
    return hasattr(x, "__index__") and not isinstance(x, bool)


def _n_heads(model: HookedTransformer, kind: str) -> int:
    return model.cfg.n_key_value_heads if kind in ("k", "v") else model.cfg.n_heads


def _heads(model: HookedTransformer) -> list[Component]:
    cfg = model.cfg
    return [Component("head", layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]


def _mlps(model: HookedTransformer) -> list[Component]:
    return [] if model.cfg.attn_only else [Component("mlp", layer) for layer in range(model.cfg.n_layers)]


def _receivers(model: HookedTransformer) -> list[Component]:
    """Everything that reads the stream."""
    nodes: list[Component] = []
    for layer in range(model.cfg.n_layers):
        nodes += [Component(kind, layer, head) for kind in "qkv" for head in range(_n_heads(model, kind))]
        nodes += [] if model.cfg.attn_only else [Component("mlp_in", layer)]
    return [*(_check(model, node, "receiver") for node in nodes), Component("final")]


def _check(model: HookedTransformer, node: Component, what: str) -> Component:
    """The component, its layer counted from the first; one that does not exist raises with those that do."""
    cfg = model.cfg
    if node.kind in ("embed", "final"):
        return node
    if node.kind in ("mlp", "mlp_in", "neuron") and cfg.attn_only:
        raise InputError(f"the MLP of layer {node.layer} was asked for as a {what}; this model is attention-only")
    layer = node.layer + cfg.n_layers if -cfg.n_layers <= node.layer < 0 else node.layer
    if not 0 <= layer < cfg.n_layers:
        raise InputError(f"layer {node.layer} was asked for as a {what}; there are layers 0 to {cfg.n_layers - 1}")
    shared = cfg.n_heads != cfg.n_key_value_heads and node.kind in ("k", "v")
    numbers = {"head": (node.head, _n_heads(model, node.kind)), "neuron": (node.neuron, cfg.d_mlp)}
    for name, (number, n) in numbers.items():
        if number is not None and not 0 <= number < n:
            which = "key/value heads" if name == "head" and shared else f"{name}s"
            raise InputError(
                f"{name} {number} of layer {layer} was asked for as a {what}; there are {which} 0 to {n - 1}"
            )
    return replace(node, layer=layer, keyed=shared)

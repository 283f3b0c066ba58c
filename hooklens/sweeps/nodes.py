"""Where a path begins and where it ends: senders write to the residual stream, receivers read from it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from hooklens.core.errors import InputError, WrongType
from hooklens.core.names import Site

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_PARTS = {"q": "q", "k": "k", "v": "v", "mlp": "mlp_in", "mlp_in": "mlp_in"}
_SENDER = re.compile(r"^L(?P<layer>\d+)H(?P<head>\d+)$|^MLP(?P<mlp>\d+)$")
_RECEIVER = re.compile(r"^L(?P<layer>\d+)[HG](?P<head>\d+)\.(?P<part>[qkv])$|^MLP(?P<mlp>\d+)$")


Pos = int | tuple[int, ...] | None  # one position of every pair, one a pair, or all


@dataclass(frozen=True, eq=False)
class At:
    """Senders or receivers at one position of each pair: `At("L9H6.q", -1)`, `At("heads", s2, "S2")`.

    `node` is whatever names senders or receivers. `pos` is a number, negative from the prompt's last token, or a tensor
    or list of one a pair. `name` is what the position is called in names of nodes, such as `L9H6.q@S2`.
    """

    node: Any
    pos: Any
    name: str = ""


class Sender(NamedTuple):
    """A head, an MLP or the embedding. `turned`: what it sends is turned into a random direction drawn by that seed."""

    kind: str  # "head", "mlp", "embed"
    layer: int = -1
    head: int | None = None
    turned: int | None = None
    pos: Pos = None
    at: str = ""

    @property
    def name(self) -> str:
        """L5H3, MLP5, embed."""
        name = {"head": f"L{self.layer}H{self.head}", "mlp": f"MLP{self.layer}", "embed": "embed"}[self.kind] + self.at
        return name if self.turned is None else f"{name} turned {self.turned}"


class Receiver(NamedTuple):
    """What reads the stream: the q, k or v of a head (k, v: of a key/value head), an MLP, or the final norm."""

    kind: str  # "q", "k", "v", "mlp_in", "final"
    layer: int = -1
    head: int | None = None
    pos: Pos = None
    at: str = ""

    def name(self, *, grouped: bool = False) -> str:
        """L9H6.q, MLP9, final; the key/value heads of a grouped model are called G."""
        if self.kind == "final":
            return f"final{self.at}"
        if self.kind == "mlp_in":
            return f"MLP{self.layer}{self.at}"
        return f"L{self.layer}{'G' if grouped and self.kind != 'q' else 'H'}{self.head}.{self.kind}{self.at}"


Node = TypeVar("Node", Sender, Receiver)


def of_pairs(nodes: Sequence[Node], index: Sequence[int], n: int) -> tuple[Node, ...]:
    """The same nodes for some of n pairs: positions given one a pair are those pairs' own."""
    found = []
    for node in nodes:
        if isinstance(node.pos, tuple) and len(node.pos) != n:
            raise InputError(f"{len(node.pos)} positions ({node.at[1:]}) were given for {n} pairs; give one a pair")
        found.append(node._replace(pos=tuple(node.pos[i] for i in index)) if isinstance(node.pos, tuple) else node)
    return tuple(found)


def on_tokens(nodes: Sequence[Node], n: int, n_pos: int) -> tuple[Node, ...]:
    """The same nodes with positions counted from the start, one a pair, for n pairs of n_pos tokens."""
    found = []
    for node in nodes:
        pos = (node.pos,) * n if isinstance(node.pos, int) else node.pos
        for one in pos or ():
            if not -n_pos <= one < n_pos:
                raise InputError(f"position {one} was asked for ({node.at[1:]}) in a prompt of {n_pos} tokens")
        found.append(node if pos is None else node._replace(pos=tuple(one % n_pos for one in pos)))
    return tuple(found)


class Order:
    """Who comes before whom. Stage 2 l is the attention of layer l, 2 l + 1 its MLP, 2 n_layers the final norm.

    In blocks whose attention reads the MLP, these two change places.
    """

    def __init__(self, model: "HookedTransformer"):
        self.end = 2 * model.cfg.n_layers
        block = model.blocks[0]
        self.within = block.mlp is not None and block.mlp_reads_attn
        self.first = "mlp" if block.mlp is not None and block.attn_reads_mlp else "head"
        self.follows = self.within or self.first == "mlp"  # does one part read what the other of its block wrote?

    def reads_at(self, receiver: Receiver) -> int:
        """The stage at which a receiver reads."""
        if receiver.kind == "final":
            return self.end
        return 2 * receiver.layer + (("mlp" if receiver.kind == "mlp_in" else "head") != self.first)

    def feeds_from(self, sender: Sender) -> int:
        """The first stage that reads what a sender writes; the MLP of a parallel block reads no head of its layer."""
        if sender.kind == "embed":
            return 0
        return 2 * sender.layer + (1 if sender.kind == self.first and self.follows else 2)


def read_senders(model: "HookedTransformer", asked: Any) -> tuple[Sender, ...]:
    """Senders from what a user writes: (9, 6) or "L9H6", ("mlp", 9) or "MLP9", "embed", "heads", "mlps"; None: all.

    Any of them within `At(..., pos)`: at that position only.

    >>> from hooklens.testing import tiny_model
    >>> [sender.name for sender in read_senders(tiny_model(), ["heads", "MLP1", "embed"])]
    ['L0H0', 'L0H1', 'L1H0', 'L1H1', 'MLP1', 'embed']
    """
    cfg = model.cfg
    heads = [Sender("head", layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    mlps = [] if cfg.attn_only else [Sender("mlp", layer) for layer in range(cfg.n_layers)]
    if asked is None:
        return (*heads, *mlps)
    found: list[Sender] = []
    for one in _listed(asked, "senders"):
        if isinstance(one, At):
            found += _placed(read_senders(model, one.node), one)
        elif one in ("heads", "mlps"):
            found += heads if one == "heads" else mlps
        else:
            found.append(_check(model, _sender(one), "sender"))
    if not found:
        raise InputError("senders= names none; give at least one, or leave it out for all heads and MLPs")
    return tuple(dict.fromkeys(found))


def read_receivers(model: "HookedTransformer", asked: Any) -> tuple[Receiver, ...]:
    """Receivers from what a user writes: ("q", 9, 6) or "L9H6.q", ("k", 9): every head, ("mlp", 9), "final", "all".

    >>> from hooklens.testing import tiny_model
    >>> [receiver.name() for receiver in read_receivers(tiny_model(), [("q", 1), "MLP1", "final"])]
    ['L1H0.q', 'L1H1.q', 'MLP1', 'final']
    """
    found: list[Receiver] = []
    for one in _listed(asked, "receivers"):
        if isinstance(one, At):
            found += _placed(read_receivers(model, one.node), one)
        else:
            found += _all(model) if one == "all" else _receivers(model, one)
    if not found:
        raise InputError('receivers= names none; give at least one such as ("q", 9, 6), "L9H6.q" or "final"')
    return tuple(dict.fromkeys(_check(model, one, "receiver") for one in found))


def _placed(nodes: Sequence[Node], at: At) -> list[Node]:
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
    return [node._replace(pos=tuple(pos.tolist()) if pos.ndim else int(pos), at=name) for node in nodes]


def _listed(asked: Any, what: str) -> Iterable[Any]:
    """One thing or several: a tuple such as ("q", 9, 6) or (9, 6) is one."""
    if isinstance(asked, str | Site | Sender | Receiver | At) or (isinstance(asked, tuple) and asked and _plain(asked)):
        return [asked]
    if isinstance(asked, Sequence | set | frozenset):
        return asked
    raise WrongType(f"{what} are a list of names or tuples, got {asked!r:.80}")


def _plain(one: tuple) -> bool:
    numbers = [hasattr(x, "__index__") for x in one]
    return all(numbers[1:]) and (numbers[0] or (one[0] in _PARTS and len(one) > 1))


def _sender(one: Any) -> Sender:
    if isinstance(one, Sender):
        return one
    if one == "embed":
        return Sender("embed")
    match = _SENDER.match(one) if isinstance(one, str) else None
    if match:
        return Sender("mlp", int(match["mlp"])) if match["mlp"] else Sender("head", int(match[1]), int(match[2]))
    if isinstance(one, tuple | list) and len(one) == 2 and hasattr(one[1], "__index__"):
        if one[0] in ("mlp", "mlp_out"):
            return Sender("mlp", int(one[1]))
        if hasattr(one[0], "__index__"):
            return Sender("head", int(one[0]), int(one[1]))
    raise InputError(
        f'no sender is called {one!r:.60}; a head is (9, 6) or "L9H6", an MLP ("mlp", 9) or "MLP9", and there are '
        '"embed", "heads" and "mlps"'
    )


def _receivers(model: "HookedTransformer", one: Any) -> list[Receiver]:
    if isinstance(one, Receiver):
        return [one]
    if one in ("final", "logits"):  # the final norm reads for the logits, which is what circuits call it
        return [Receiver("final")]
    match = _RECEIVER.match(one) if isinstance(one, str) else None
    if match:
        at = (match["layer"], match["head"]) if match["mlp"] is None else (match["mlp"], None)
        return [Receiver(match["part"] or "mlp_in", int(at[0]), None if at[1] is None else int(at[1]))]
    parts = (one.name, one.layer, one.part) if isinstance(one, Site) else tuple(one) if isinstance(one, tuple) else ()
    numbers = [int(x) for x in parts[1:] if hasattr(x, "__index__")]
    kind = _PARTS.get(parts[0]) if parts and isinstance(parts[0], str) else None
    if kind == "mlp_in" and len(numbers) == 1:
        return [Receiver(kind, numbers[0])]
    if kind in ("q", "k", "v") and len(numbers) == 2:
        return [Receiver(kind, numbers[0], numbers[1])]
    if kind in ("q", "k", "v") and len(numbers) == 1:
        return [Receiver(kind, numbers[0], head) for head in range(_n_heads(model, kind))]
    raise InputError(
        f'no receiver is called {one!r:.60}; the query of a head is ("q", 9, 6) or "L9H6.q", that of every head of a '
        'layer ("q", 9), and so for k and v; an MLP is ("mlp", 9) or "MLP9", and there are "final" and "all"'
    )


def _n_heads(model: "HookedTransformer", kind: str) -> int:
    return model.cfg.n_key_value_heads if kind in ("k", "v") else model.cfg.n_heads


def _all(model: "HookedTransformer") -> list[Receiver]:
    """Everything that reads the stream."""
    found = []
    for layer in range(model.cfg.n_layers):
        found += [Receiver(kind, layer, head) for kind in "qkv" for head in range(_n_heads(model, kind))]
        found += [] if model.cfg.attn_only else [Receiver("mlp_in", layer)]
    return [*found, Receiver("final")]


def _check(model: "HookedTransformer", node: Any, what: str) -> Any:
    """Layers may count from the last; one that does not exist raises with what does."""
    cfg = model.cfg
    if node.kind in ("embed", "final"):
        return node
    if node.kind in ("mlp", "mlp_in") and cfg.attn_only:
        raise InputError(f"the MLP of layer {node.layer} was asked for as a {what}; this model is attention-only")
    layer = node.layer + cfg.n_layers if -cfg.n_layers <= node.layer < 0 else node.layer
    if not 0 <= layer < cfg.n_layers:
        raise InputError(f"layer {node.layer} was asked for as a {what}; there are layers 0 to {cfg.n_layers - 1}")
    heads = _n_heads(model, node.kind)
    if node.head is not None and not 0 <= node.head < heads:
        which = "key/value heads" if node.kind in ("k", "v") else "heads"
        raise InputError(
            f"head {node.head} of layer {layer} was asked for as a {what}; there are {which} 0 to {heads - 1}"
        )
    return node._replace(layer=layer)

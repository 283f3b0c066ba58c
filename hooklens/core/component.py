"""Components by name: "L5H1" is head 1 of layer 5, "L5H1.q" its queries, "MLP3", the neuron "L2N17", "embed"."""

import re
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from hooklens.core.errors import InputError, WrongType, did_you_mean

_NAME = re.compile(
    r"(?:L(?P<layer>-?\d+)(?:(?P<of>[HGN])(?P<number>\d+))?(?:\.(?P<part>[qkv]))?|MLP(?P<mlp>-?\d+)"
    r"|(?P<end>embed|final|logits))(?:@(?P<pos>-?\d+))?"
)
_EXAMPLES = (
    'a head is (9, 6) or "L9H6", its query ("q", 9, 6) or "L9H6.q", and so for k and v; an MLP is ("mlp", 9) or '
    '"MLP9", a neuron "L2N17", a layer "L5", and there are "embed" and "final"; "L9H6@-1" is a head at one position'
)

Pos = int | tuple[int, ...] | None  # one position of every pair, one for each pair, or all
# Every kind, and whether its head or neuron has a number.
_NUMBERED = {**dict.fromkeys(("head", "q", "k", "v"), "head"), "neuron": "neuron"}
_NUMBERED |= dict.fromkeys(("mlp", "mlp_in", "layer", "embed", "final"), "")


@dataclass(frozen=True)
class Component:
    """A part of a model: a head, its q, k or v, an MLP, a neuron, a layer, the embedding, or the final stream.

    >>> Component.parse("L5H1.q@-1")
    Component(kind='q', layer=5, head=1, neuron=None, pos=-1, at='@-1', keyed=False, turned=None)
    >>> [str(Component.parse(name)) for name in ("L5H1", "MLP3", "L2N17", "L0G2.k", "embed", "logits")]
    ['L5H1', 'MLP3', 'L2N17', 'L0G2.k', 'embed', 'final']

    `kind` is head, q, k, v, mlp (its output), mlp_in (its input), neuron, layer, embed or final (the input of the final
    norm). `keyed` marks a key/value head that several heads share, named G. `at` is the name of the position.
    `turned` is the seed of a random direction that replaces that of its output.
    """

    kind: str
    layer: int = -1
    head: int | None = None
    neuron: int | None = None
    pos: Pos = None
    at: str = ""
    keyed: bool = False
    turned: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _NUMBERED:
            raise did_you_mean("kind of component", self.kind, _NUMBERED)
        if not _is_whole(self.layer):
            raise WrongType(f"the layer of a component is a whole number, got {self.layer!r:.80}")
        if self.kind in ("embed", "final") and self.layer != -1:
            raise InputError(f"a component of kind {self.kind!r} has no layer, got layer={self.layer}")
        numbers: dict[str, Any] = {"head": self.head, "neuron": self.neuron}
        for what, number in numbers.items():
            asked = f"a component of kind {self.kind!r}"
            if _NUMBERED[self.kind] != what and number is not None:
                raise InputError(f"{asked} has no {what}, got {what}={number!r:.80}")
            if _NUMBERED[self.kind] == what and not (_is_whole(number) and number >= 0):
                raise InputError(f"{asked} needs the number of its {what}, got {what}={number!r:.80}; {_EXAMPLES}")
        if self.pos is not None and not all(map(_is_whole, self.pos if isinstance(self.pos, tuple) else (self.pos,))):
            raise WrongType(f"pos is a whole number, or a tuple of one for each pair; got {self.pos!r:.80}")

    @property
    def name(self) -> str:
        """L5H1, L9H6.q, MLP5, embed; with its position if it has one."""
        if self.kind in ("embed", "final"):
            name = self.kind
        elif self.kind in ("mlp", "mlp_in"):
            name = f"MLP{self.layer}"
        elif self.kind in ("q", "k", "v"):
            name = f"L{self.layer}{'G' if self.keyed else 'H'}{self.head}.{self.kind}"
        else:
            name = f"L{self.layer}"
            if self.head is not None:
                name += f"{'G' if self.keyed else 'H'}{self.head}"
            if self.neuron is not None:
                name += f"N{self.neuron}"
        at = self.at or (f"@{self.pos}" if isinstance(self.pos, int) else "")
        return name + at + ("" if self.turned is None else f" turned {self.turned}")

    @property
    def place(self) -> tuple[int, int]:
        """(layer, head), for a component of a head."""
        if self.head is None:
            raise InputError(f"{self.name} is not a head")
        return self.layer, self.head

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str, what: str = "component") -> "Component":
        """The component with this name. `what` is its role in error messages; `read_components` checks the model."""
        if isinstance(name, Component):
            raise InputError(f"no {what} is called {name!r:.60}: this is a Component already, {name}; use it as it is")
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        of, part = (match["of"], match["part"]) if match else (None, None)
        if match is None or (of, part) == ("G", "q") or (part is not None and of not in ("H", "G")):
            raise no_component(name, what)
        pos = None if match["pos"] is None else int(match["pos"])
        at = "" if pos is None else f"@{pos}"
        if match["end"]:
            return cls("embed" if match["end"] == "embed" else "final", pos=pos, at=at)
        if match["mlp"]:
            return cls("mlp", int(match["mlp"]), pos=pos, at=at)
        number = None if of is None else int(match["number"])
        kind = part or {"H": "head", "G": "head", "N": "neuron", None: "layer"}[of]
        head, neuron = (None, number) if of == "N" else (number, None)
        return cls(kind, int(match["layer"]), head, neuron=neuron, pos=pos, at=at, keyed=of == "G")


def no_component(asked: Any, what: str = "component") -> InputError:
    """The error for an argument that names no component.

    >>> print(no_component("l1h0"))
    no component is called 'l1h0'; closest: L1H0
    """
    if isinstance(asked, str):
        raised = re.sub(r"\.[QKV]", lambda part: part[0].lower(), asked.upper())
        for near in (raised, asked.lower()):
            if near != asked and _NAME.fullmatch(near):
                return InputError(f"no {what} is called {asked!r}; closest: {near}")
    return InputError(f"no {what} is called {asked!r:.60}; {_EXAMPLES}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def head_name(layer: int, head: int, *, keyed: bool = False) -> str:
    """L5H1; a key/value head that several heads share is L5G1.

    >>> head_name(5, 1), head_name(5, 1, keyed=True)
    ('L5H1', 'L5G1')
    """
    return Component("head", layer, head, keyed=keyed).name


def head_names(n_layers: int, n_heads: int) -> list[str]:
    """Every head's name, layer by layer."""
    return [head_name(layer, head) for layer in range(n_layers) for head in range(n_heads)]


def neuron_name(layer: int, neuron: int) -> str:
    """L2N17.

    >>> neuron_name(2, 17)
    'L2N17'
    """
    return Component("neuron", layer, neuron=neuron).name


def layer_name(layer: int) -> str:
    """L2."""
    return Component("layer", layer).name


def layer_names(n: int) -> list[str]:
    """The names of the first n layers.

    >>> layer_names(2)
    ['L0', 'L1']
    """
    return [layer_name(layer) for layer in range(n)]

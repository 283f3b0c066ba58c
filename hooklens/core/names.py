"""Names of sites: "blocks.5.attn.hook_z" is the point, ("z", 5) the short form; both parse to `site("z", 5)`."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import SupportsIndex, Union

from hooklens.core.errors import InputError, NameNotFound, WrongType, did_you_mean

_POINT = re.compile(r"^(?:blocks\.(?P<layer>\d+)\.)?(?:(?P<part>.+)\.)?hook_(?P<name>\w+)(?:#\d+)?$")

_STREAM = ("batch", "pos", "d_model")
_HEAD = ("batch", "pos", "head", "d_head")
_SCORES = ("batch", "head", "query_pos", "key_pos")
_PER_HEAD = ("batch", "pos", "head", "d_model")
_NEURON = ("batch", "pos", "d_mlp")

#: The axes of every site, by short name; norms inside attention have an additional head axis.
AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), _STREAM),
    **dict.fromkeys(("mlp_in", "normalized", "in"), _STREAM),
    **dict.fromkeys(("q", "z"), _HEAD),
    **dict.fromkeys(("k", "v"), ("batch", "pos", "kv_head", "d_head")),
    "rot_q": ("batch", "query_pos", "head", "d_head"),
    "rot_k": ("batch", "key_pos", "kv_head", "d_head"),
    **dict.fromkeys(("attn_scores", "pattern"), _SCORES),
    **dict.fromkeys(("attn_in", "q_input", "result"), _PER_HEAD),
    **dict.fromkeys(("k_input", "v_input"), ("batch", "pos", "kv_head", "d_model")),
    **dict.fromkeys(("pre", "pre_linear", "post"), _NEURON),
    "scale": ("batch", "pos", "one"),
    "out": ("batch", "pos", "d_vocab"),
}

#: Points that cost extra and are left out of a cache that is requested without names.
LAZY = frozenset({"attn_in", "q_input", "k_input", "v_input", "mlp_in", "result"})

_ALIASES = {"attn": "pattern", "attn_logits": "attn_scores"}


@dataclass(frozen=True)
class Site:
    """A kind of activation, at one layer or at all; `part` distinguishes points of one name: ("scale", 4, "ln1")."""

    name: str
    layer: int | None = None
    part: str | None = None

    def matches(self, point: "Site") -> bool:
        """Whether this site includes the point."""
        if self.name != point.name or (self.layer is not None and self.layer != point.layer):
            return False
        return self.part is None or point.part == self.part or (point.part or "").split(".")[-1] == self.part

    def __str__(self) -> str:
        where = "" if self.layer is None else f" at {self.layer}"
        return f"{f'{self.part}.' if self.part else ''}{self.name}{where}"


#: The values that select points: a full name, a short name (every layer), a tuple ("z", 5), a Site, a predicate on full
#: names, or a list of these.
Where = Union[str, tuple, Site, Callable[[str], bool], Sequence["Where"], set, frozenset]  # noqa: UP007 (it names itself)


def site(name: str, layer: SupportsIndex | None = None, part: str | None = None) -> Site:
    """The site with this short name, at one layer (negative counts from the last) or, without layer, at every layer.

    >>> site("z", 5)
    Site(name='z', layer=5, part=None)
    >>> site("blocks.3.ln1.hook_scale")
    Site(name='scale', layer=3, part='ln1')
    """
    if not isinstance(name, str):
        raise WrongType(f"a site's name must be a string such as 'resid_pre' or 'z', got {name!r}")
    parsed = parse(name)
    if parsed is not None:
        if layer is not None or part is not None:
            raise InputError(f"{name!r} is the full name of a point; give it alone, or site({parsed.name!r}, {layer})")
        return parsed
    if layer is not None and (isinstance(layer, bool) or not hasattr(layer, "__index__")):
        raise WrongType(f"site({name!r}) needs an integer layer, got {layer!r}")
    if part is not None and not isinstance(part, str):
        raise WrongType(f"the part of site({name!r}, {layer}) must be a string such as 'ln1', got {part!r:.60}")
    return Site(_ALIASES.get(name, name), None if layer is None else int(layer), part)


@lru_cache(maxsize=10_000)
def parse(name: str) -> Site | None:
    """Parse a full point name; None if it is not one.

    >>> parse("blocks.5.attn.hook_z")
    Site(name='z', layer=5, part='attn')
    >>> parse("z") is None
    True
    """
    match = _POINT.match(name)
    if match is None:
        return None
    layer = match["layer"]
    return Site(match["name"], None if layer is None else int(layer), match["part"])


def axes(name: str) -> tuple[str, ...]:
    """The axes of the activation at a point or site, in order.

    >>> axes("blocks.0.attn.hook_pattern")
    ('batch', 'head', 'query_pos', 'key_pos')
    >>> axes("resid_post")
    ('batch', 'pos', 'd_model')
    """
    asked = parse(name) or site(name)
    if asked.name not in AXES:
        raise did_you_mean("site", asked.name, AXES)
    axes_of_site = AXES[asked.name]
    in_head = (asked.part or "").split(".")[-1]
    if asked.name in ("in", "out") and in_head not in ("", "unembed"):
        raise NameNotFound(f"the axes of {name!r} are unknown: it is a point of a wrapped module")
    if in_head in ("q_norm", "k_norm"):
        head = "head" if in_head == "q_norm" else "kv_head"
        return ("batch", "pos", head, "one" if asked.name == "scale" else "d_head")
    return axes_of_site


def resolve(where: Where, names: Sequence[str]) -> list[str]:
    """The full names, in firing order, of all points that `where` selects; unknown names raise with the closest ones.

    >>> resolve(("z", -1), ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"])
    ['blocks.1.attn.hook_z']
    """
    chosen: set[str] = set()
    for selector in flatten(where):
        try:
            chosen.update(_resolve_one(selector, names))
        except NameNotFound as error:
            if not isinstance(where, tuple) or selector in (where, where[0]):
                raise
            raise NameNotFound(
                f"{error}. {where!r:.80} is read as a list of names, because the layer in ('z', 5) must be a number"
            ) from None
    return [name for name in names if name in chosen]


def flatten(where: Where) -> Iterable:
    """The elements of nested lists in `where`, one by one.

    >>> list(flatten(["z", ("q", 5), ["k", "v"]]))
    ['z', ('q', 5), 'k', 'v']
    """
    if (
        isinstance(where, tuple)
        and len(where) in (2, 3)
        and isinstance(where[0], str)
        and all(x is None or hasattr(x, "__index__") or i == 2 for i, x in enumerate(where) if i)
    ):
        yield where
    elif isinstance(where, list | tuple | set | frozenset):
        for selector in where:
            yield from flatten(selector)
    else:
        yield where


def _resolve_one(where, names: Sequence[str]) -> list[str]:
    if isinstance(where, str) and where in names:
        return [where]
    if callable(where) and not isinstance(where, Site):
        chosen = [name for name in names if where(name)]
        if not chosen:
            raise InputError(f"the predicate {where!r} is true for none of the {len(names)} hook points")
        return chosen
    if isinstance(where, str) and (parse(where) is not None or "." in where):
        raise did_you_mean("hook point", where, names)
    if isinstance(where, str | tuple):
        where = site(*((where,) if isinstance(where, str) else where))
    if not isinstance(where, Site):
        raise WrongType(f"hook points are selected by name, ('z', 5), site('z', 5) or a predicate; got {where!r}")
    return _resolve_site(where, names)


def _resolve_site(asked: Site, names: Sequence[str]) -> list[str]:
    points = {name: parse(name) for name in names}
    layers = {p.layer for p in points.values() if p is not None and p.layer is not None}
    n_layers = 1 + max(layers, default=-1)
    if asked.layer is not None and asked.layer < 0 and asked.layer >= -n_layers:
        asked = replace(asked, layer=asked.layer % n_layers)
    matching = [name for name, p in points.items() if p is not None and asked.matches(p)]
    if matching:
        return matching
    kinds = dict.fromkeys(p.name for p in points.values() if p is not None)
    if asked.name not in kinds:
        raise did_you_mean("site", asked.name, kinds)
    has = sorted({str(replace(p, layer=None)) for p in points.values() if p is not None and p.name == asked.name})
    raise NameNotFound(
        f"no site {asked}: this model has {', '.join(has)} and layers 0 to {n_layers - 1} (or -{n_layers} to -1)"
    )

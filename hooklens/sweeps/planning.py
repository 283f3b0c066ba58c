"""What a sweep overwrites: a list of patches on a grid, the run they go into, and the values they write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.component import Component
from hooklens.core.errors import ArgumentError, InputError, WrongType, did_you_mean
from hooklens.core.names import Site, axes, site
from hooklens.data.prompts import same_inputs
from hooklens.model.kv_cache import KVCache
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.sweeps.replacement import Written, activations_of, are_prompts
from hooklens.sweeps.sites import SITES, SweptSite

_ALIASES = {"mlp_post": "post", "mlp.post": "post", "attn": "pattern"}
_HEAD_AXES = ("head", "kv_head")


class Patch(NamedTuple):
    """One overwritten region: a layer, and one position, head or neuron of it (None: all)."""

    layer: int
    pos: int | None = None
    head: int | None = None
    neuron: int | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a sweep needs before it knows its metric: see `plan`."""

    model: HookedTransformer
    site: str
    by: tuple[str, ...]
    shape: tuple[int, ...]
    patches: tuple[Patch, ...]
    tokens: Shaped[Tensor, "pair pos *d_in"]
    base: "BaseRun"
    values: dict[int, Tensor]
    first_change: Int[Tensor, "pair"]
    donor: Float[Tensor, "pair pos d_model"] | None = None  # the last stream of the run that the values come from
    source: Any = None  # what was asked to be written, which identifies the sweep

    @cached_property
    def causal(self) -> bool:
        """Can a patch at a position change nothing before it?"""
        return self.model.cfg.causal

    @property
    def swept(self) -> SweptSite:
        """The site that this sweep overwrites."""
        return SITES[self.site]

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes of its activation."""
        return axes(self.swept.at(0))

    @cached_property
    def pos_name(self) -> str:
        """Which of them a position narrows."""
        return self.axes[self.swept.pos_axis]

    @cached_property
    def local(self) -> bool:
        """Does what is written at a position change there only what leaves the block?"""
        return self.causal and self.swept.point not in self.model.blocks[0].early

    def start(self, patch: Patch) -> Int[Tensor, "pair"]:
        """The first position at which a patch can change anything, for every pair."""
        if not self.causal:
            return torch.zeros_like(self.first_change)
        if patch.pos is not None:
            return torch.full_like(self.first_change, patch.pos)
        return self.first_change

    def region(self, patch: Patch) -> tuple:
        """The index, behind the pair axis, of what the patch overwrites in its point's activation."""
        chosen = {self.pos_name: patch.pos, "d_mlp": patch.neuron}
        chosen |= dict.fromkeys(_HEAD_AXES, patch.head)
        index = [slice(None) if chosen.get(name) is None else chosen[name] for name in self.axes[1:]]
        return tuple(index)


@dataclass(eq=False)
class BaseRun:
    """The run that is patched: streams between blocks, keys and values, and the site's own activations.

    `reads` has, by point, what else the site needs to enter a block.
    """

    streams: list[Tensor]
    past: KVCache
    acts: dict[int, Tensor]
    reads: Mapping[str, Tensor]


def site_kind(asked: str | tuple | Site) -> str:
    """The canonical name of a site that is swept at every layer; unknown ones raise with the nearest.

    >>> site_kind("mlp_post"), site_kind(site("z"))
    ('post', 'z')
    """
    swept = _read(asked)
    if swept.layer is not None:
        name, given = swept.name, str(asked)
        raise ArgumentError("{site} is swept at every layer, and {1!r} is one layer's; give {0!r}", name, given)
    return swept.name


def site_and_layer(model: HookedTransformer, asked: str | tuple | Site) -> tuple[str, int | None]:
    """The canonical name of a site that can be swept, and its layer where one is named.

    >>> from hooklens.testing import tiny_model
    >>> site_and_layer(tiny_model(), "z"), site_and_layer(tiny_model(), site("z", -1))
    (('z', None), ('z', 1))
    """
    need_hooked(model, "a sweep")
    swept, n = _read(asked), model.cfg.n_layers
    if swept.layer is None:
        return swept.name, None
    if not -n <= swept.layer < n:
        raise InputError(f"{swept} asked for; there are layers 0 to {n - 1} (or -{n} to -1)")
    return swept.name, swept.layer % n


def _read(asked: str | tuple | Site) -> Site:
    if isinstance(asked, list | set) or asked == ():
        raise WrongType(
            f"one site is swept at a time, such as 'z' or hl.site('z', 5); sweep each of {asked!r:.60} alone"
        )
    if not isinstance(asked, Site):
        asked = site(*asked) if isinstance(asked, tuple) else site(asked)
    name = _ALIASES.get(asked.name, asked.name)
    if name not in SITES:
        raise did_you_mean("site to sweep", name, SITES)
    return replace(asked, name=name)


def has_site(model: HookedTransformer, site: str) -> str:
    """The site, if the model's blocks have its point."""
    need_hooked(model, "a sweep")
    missing, points = SITES[site].at(0), model.hook_points()
    if missing not in points:
        there = [name for name, kind in SITES.items() if kind.at(0) in points]
        raise ArgumentError(
            "{site}: this model has no {0} (no point {1}), which is not in every kind of block; it has {2}",
            *(site, missing, ", ".join(there)),
        )
    return site


def points_of(model: HookedTransformer, site: str) -> list[str]:
    """The hook points of a site that the model has, layer by layer."""
    swept = SITES[has_site(model, site)]
    return [swept.at(layer) for layer in range(model.cfg.n_layers)]


def grid_axes(site: str, by: str | Sequence[str] | None) -> tuple[str, ...]:
    """The axes of a sweep's grid, layer first; checked against what the site has.

    >>> grid_axes("z", "layer x head x pos"), grid_axes("resid_pre", "layer")
    (('layer', 'head', 'pos'), ('layer',))
    """
    if by is None:
        return SITES[site].default_by
    asked = by.replace("×", "x").split(" x ") if isinstance(by, str) else by
    if not isinstance(asked, Sequence) or not all(isinstance(part, str) for part in asked):
        raise WrongType(f"by is the grid as a text or a sequence of axes, for example 'layer x pos'; got {by!r:.80}")
    names = tuple(part.strip() for part in asked)
    names = tuple({"position": "pos", "kv_head": "head", "d_mlp": "neuron"}.get(name, name) for name in names)
    has = parts_of(site)
    wrong = [name for name in names if name not in has]
    if wrong or names[:1] != ("layer",) or len(set(names)) != len(names):
        others = sorted(has - {"layer"})
        raise ArgumentError(
            "{by} is the grid: {0} can be swept by layer and any of {1}, for example 'layer x {2}'; got {3!r}",
            site,
            ", ".join(others),
            others[0],
            by,
        )
    return names


def sizes_of(model: HookedTransformer, site: str, n_pos: int) -> dict[str, int]:
    """How many cells a grid of this site can have along each axis.

    >>> from hooklens.testing import tiny_model
    >>> sizes_of(tiny_model(), "z", 5)
    {'layer': 2, 'pos': 5, 'head': 2, 'neuron': 32}
    """
    cfg = model.cfg
    heads = cfg.n_key_value_heads if "kv_head" in axes(SITES[site].at(0)) else cfg.n_heads
    return {"layer": cfg.n_layers, "pos": n_pos, "head": heads, "neuron": cfg.d_mlp}


def grid(
    model: HookedTransformer, site: str, by: tuple[str, ...], n_pos: int, layer: int | None = None
) -> tuple[tuple[int, ...], list[Patch]]:
    """The shape of a sweep's grid and its patches in order; one layer high where that layer is asked for."""
    sizes = sizes_of(model, site, n_pos)
    along = [range(sizes[name]) for name in by]
    if layer is not None:
        along[0] = range(layer, layer + 1)
    return tuple(map(len, along)), [Patch(**dict(zip(by, index, strict=True))) for index in product(*along)]


def checked_patches(model: HookedTransformer, site: str, patches: Sequence[Patch], n_pos: int) -> list[Patch]:
    """The patches, positions counted from the start; what does not exist raises with what does."""
    sizes, has = sizes_of(model, site, n_pos), parts_of(site)
    if not patches:
        raise InputError("patches= is empty; give at least one Patch, or leave it out to sweep the whole grid")
    for patch in patches:
        for name, size in sizes.items():
            value, least = getattr(patch, name), -size if name == "pos" else 0
            if value is not None and name not in has:
                raise InputError(f"{name} {value} of {site} asked for; {site} has {', '.join(sorted(has))}")
            if (value is None and name == "layer") or (value is not None and not least <= value < size):
                kind = "key/value head" if name == "head" and size < model.cfg.n_heads else name
                many = f"positions 0 to {size - 1} (or -{size} to -1)" if name == "pos" else f"{kind}s 0 to {size - 1}"
                raise InputError(f"{name} {value} of {site} asked for; there are {many}")
    return [patch if patch.pos is None else patch._replace(pos=patch.pos % n_pos) for patch in patches]


def parts_of(site: str) -> set[str]:
    """What a patch of this site can be narrowed to."""
    names = axes(SITES[site].at(0))
    has = {"layer", "pos"} | ({"head"} if any(axis in names for axis in _HEAD_AXES) else set())
    return has | ({"neuron"} if "d_mlp" in names else set())


def component_of(model: HookedTransformer, site: str, patch: Patch) -> Component:
    """The component that a patch of this site overwrites, whose name stands in tables and figures.

    >>> from hooklens.testing import tiny_model
    >>> model, patch = tiny_model(n_heads=4, n_key_value_heads=2), Patch(0, head=1)
    >>> [component_of(model, site, patch).name for site in ("z", "q", "k")], component_of(model, "z", Patch(1, -1)).name
    (['L0H1', 'L0H1.q', 'L0G1.k'], 'L1@-1')
    """
    if patch.neuron is not None:
        return Component("neuron", patch.layer, neuron=patch.neuron, pos=patch.pos)
    if patch.head is None:
        return Component("mlp" if site == "mlp_out" else "layer", patch.layer, pos=patch.pos)
    shared = sizes_of(model, site, 0)["head"] < model.cfg.n_heads
    return Component(site if site in ("q", "k", "v") else "head", patch.layer, patch.head, pos=patch.pos, keyed=shared)


@torch.no_grad()
def plan(
    model: HookedTransformer,
    tokens: Shaped[Tensor, "pair pos *d_in"],
    site: str,
    value: Written,
    *,
    by: str | Sequence[str] | None = None,
    layer: int | None = None,
    patches: Sequence[Patch] | None = None,
) -> Plan:
    """Prepare to overwrite a site of the run on `tokens`, everywhere on a grid, in one layer, or at the patches given.

    `value` is what a replacement returns: other prompts (their run's activations), activations by point name, or a
    function of (activation, point name).
    """
    swept = SITES[has_site(model, site_kind(site))]
    names, n_pos = grid_axes(swept.name, by), tokens.shape[1]
    if patches is None:
        shape, patches = grid(model, swept.name, names, n_pos, layer)
    else:
        names, shape, patches = ("patch",), (len(patches),), checked_patches(model, swept.name, patches, n_pos)
    points = {layer: swept.at(layer) for layer in sorted({patch.layer for patch in patches})}
    base = base_run(model, tokens, swept, list(points))
    donor, written = None, value
    first_change = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    if are_prompts(value, tokens):
        first_change = first_difference(tokens, value)
        donor, written = model.run_with_cache(value, names=list(points.values()), stop_at_layer=model.cfg.n_layers)
    values = activations_of(written, {name: base.acts[layer] for layer, name in points.items()})
    return Plan(
        model=model,
        site=swept.name,
        by=names,
        shape=shape,
        patches=tuple(patches),
        tokens=tokens,
        base=base,
        values={layer: values[name] for layer, name in points.items()},
        first_change=first_change,
        donor=donor,
        source=value,
    )


def base_run(model: HookedTransformer, tokens: Tensor, swept: SweptSite, layers: Sequence[int]) -> BaseRun:
    """Run the model once and keep what patches of this site start from."""
    past, n = KVCache(), model.cfg.n_layers
    points = [f"blocks.{layer}.hook_resid_pre" for layer in range(n)]
    reads = swept.reads if all(getattr(block, "in_steps", False) for block in model.blocks) else ()
    needed = [f"blocks.{layer}.{point}" for layer in layers for point in (swept.point, *reads)]
    last, cache = model.run_with_cache(tokens, names=points + needed, stop_at_layer=n, kv_cache=past)
    acts = {layer: cache[swept.at(layer)] for layer in layers}
    return BaseRun([*(cache[name] for name in points), last], past, acts, reads=cache)


def first_difference(
    tokens: Shaped[Tensor, "pair pos *d_in"], other: Shaped[Tensor, "pair pos *d_in"]
) -> Int[Tensor, "pair"]:
    """The first position at which two prompts of a pair differ; their length where they do not.

    >>> first_difference(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 9, 3], [4, 5, 6]])).tolist()
    [1, 3]
    """
    differs = ~same_inputs(tokens, other)
    return torch.where(differs.any(1), differs.long().argmax(1), tokens.shape[1])

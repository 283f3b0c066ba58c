"""The sites that a sweep can overwrite: their points, their grids, and how a written activation enters a block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.core.names import AXES, axes, parse
from hooklens.model.kv_cache import Context

if TYPE_CHECKING:
    from hooklens.sweeps.planning import BaseRun

Rows = Float[Tensor, "row pos d_model"]
_BY_HEAD = ("layer", "head")


@dataclass(frozen=True)
class SweptSite:
    """A site that a sweep can overwrite in every block that has its point; `add_site` makes it known by its name.

    `point` is the point's name within a block, and `axes` those of its activation, needed where the point is new.
    `enter` gives the stream that leaves the block, from the written activation; it saves work in blocks that run
    attention and then the MLP (`Block.in_steps`). Without it, and in every other block, the block is run from its
    beginning with the activation written at its point.
    """

    name: str
    point: str
    default_by: tuple[str, ...] = ("layer", "pos")
    axes: tuple[str, ...] = ()
    words: str = ""  # what it is, for reports; the name if not given
    enter: Callable[["Entry"], Rows] | None = None
    reads: tuple[str, ...] = ()  # points of the base run, beside the stream that enters, that `enter` needs
    whole: bool = False  # does `enter` need the written activation at every position?

    def __post_init__(self) -> None:
        for name in ("name", "point"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise WrongType(f"a site has a {name}, such as 'z' at 'attn.hook_z'; got {getattr(self, name)!r:.60}")
        axes = self.default_by
        if not isinstance(axes, tuple) or axes[:1] != ("layer",) or not {*axes[1:]} <= {"pos", "head", "neuron"}:
            raise InputError(
                f"default_by of the site {self.name!r} is a tuple of axes such as ('layer', 'head'), layer first; got "
                f"{axes!r:.60}"
            )

    def at(self, layer: int) -> str:
        """The full name of the point in a layer."""
        return f"blocks.{layer}.{self.point}"

    @property
    def before_block(self) -> bool:
        """Is it the stream that enters the block?"""
        return self.point == "hook_resid_pre"

    @property
    def pos_axis(self) -> int:
        """Which axis of its activation a position narrows: the query's, where there are two."""
        names = axes(self.at(0))
        return next(names.index(name) for name in ("pos", "query_pos", "key_pos") if name in names)


@dataclass(frozen=True, eq=False)
class Entry:
    """Rows of a sweep at the block where they join it: the base run's, and the site's activation with patches written.

    Only positions `start` to `end` can change here.
    """

    site: SweptSite
    block: Any
    layer: int
    base: "BaseRun"
    pair: Int[Tensor, "row"]
    start: int
    end: int
    written: Shaped[Tensor, "row ..."]

    @property
    def stream(self) -> Rows:
        """The stream that enters the block."""
        return self.base.streams[self.layer][self.pair, self.start : self.end]

    def at(self, point: str) -> Shaped[Tensor, "row pos ..."]:
        """The base run's activation at one of the site's `reads`."""
        return self.base.reads[f"blocks.{self.layer}.{point}"][self.pair, self.start : self.end]

    def everywhere(self, point: str) -> Shaped[Tensor, "row every_pos ..."]:
        """The same at all positions."""
        return self.base.reads[f"blocks.{self.layer}.{point}"][self.pair]


#: Every site that a sweep can overwrite, by name.
SITES: dict[str, SweptSite] = {}


def add_site(site: SweptSite) -> SweptSite:
    """Make a site known to sweeps, ablations and attribution patching, by its name.

    >>> _ = add_site(SweptSite("rotated q", "attn.hook_rot_q", default_by=("layer", "head")))
    >>> SITES.pop("rotated q").pos_axis
    1
    """
    point = parse(site.at(0))
    if point is None:
        raise InputError(f"a point is named such as 'attn.hook_z' within its block; got {site.point!r:.60}")
    known = AXES.get(point.name)
    if known is None and not site.axes:
        raise InputError(f"the axes of the point {site.point} are unknown; give axes=('batch', 'pos', ...)")
    taken = SITES.get(site.name)
    if (known is not None and site.axes not in ((), known)) or (taken is not None and taken.point != site.point):
        there = taken.point if taken is not None else " ".join(known or ())
        raise InputError(f"cannot add the site {site.name!r} at {site.point}: it is known already, as {there}")
    if known is None:
        AXES[point.name] = site.axes
    SITES[site.name] = site
    return site


# -- how the sites of every model enter a block


def _attn(entry: Entry, z: Float[Tensor, "row pos head d_head"]) -> Rows:
    return entry.block.finish(entry.stream, entry.block.attn_adds(entry.block.attn.output(z)))


def _mlp(entry: Entry, mlp_out: Rows) -> Rows:
    return entry.block.leave(entry.block.mlp_base(entry.stream, entry.at("hook_attn_out")) + mlp_out)


def _of_qkv(entry: Entry) -> Rows:
    attn, n_pos = entry.block.attn, entry.written.shape[1]
    points = ("attn.hook_q", "attn.hook_k", "attn.hook_v")
    q, k, v = (entry.written if point == entry.site.point else entry.everywhere(point) for point in points)
    ctx = Context(torch.arange(n_pos, device=entry.pair.device))
    q, k = attn.place(q, k, ctx)
    return _attn(entry, attn.mix(q, attn.see_keys(k), v, ctx.view(attn.mask))[:, entry.start : entry.end])


def _of_pattern(entry: Entry) -> Rows:
    values = entry.base.past.of_layer(entry.layer)[1]
    return _attn(entry, entry.block.attn.weigh(entry.written, values[entry.pair]))


def _of_result(entry: Entry) -> Rows:
    raw = entry.block.attn.output(entry.at("attn.hook_z")) + (entry.written - entry.at(entry.site.point)).sum(2)
    return entry.block.finish(entry.stream, entry.block.attn_adds(raw))


_QKV = ("attn.hook_q", "attn.hook_k", "attn.hook_v")
_ATTN_OUT = ("hook_attn_out",)
for _site in (
    SweptSite("resid_pre", "hook_resid_pre", words="the residual stream before each layer"),
    SweptSite(
        "resid_mid",
        "hook_resid_mid",
        words="the residual stream between attention and MLP",
        enter=lambda entry: entry.block.finish_mid(entry.written),
    ),
    SweptSite(
        "resid_post",
        "hook_resid_post",
        words="the residual stream after each layer",
        enter=lambda entry: entry.block.leave(entry.written),
    ),
    SweptSite(
        "attn_out",
        "hook_attn_out",
        words="what attention adds to the residual stream",
        enter=lambda entry: entry.block.finish(entry.stream, entry.written),
    ),
    SweptSite(
        "mlp_out",
        "hook_mlp_out",
        words="what the MLP adds to the residual stream",
        enter=lambda entry: _mlp(entry, entry.written),
        reads=_ATTN_OUT,
    ),
    SweptSite(
        "post",
        "mlp.hook_post",
        words="the MLP's neurons after their activation function",
        enter=lambda entry: _mlp(entry, entry.block.mlp_adds(entry.block.mlp.out(entry.written))),
        reads=_ATTN_OUT,
    ),
    SweptSite("q", "attn.hook_q", _BY_HEAD, words="the heads' queries", enter=_of_qkv, reads=_QKV, whole=True),
    SweptSite("k", "attn.hook_k", _BY_HEAD, words="the heads' keys", enter=_of_qkv, reads=_QKV, whole=True),
    SweptSite("v", "attn.hook_v", _BY_HEAD, words="the heads' values", enter=_of_qkv, reads=_QKV, whole=True),
    SweptSite("z", "attn.hook_z", _BY_HEAD, words="the heads' output", enter=lambda entry: _attn(entry, entry.written)),
    SweptSite("pattern", "attn.hook_pattern", _BY_HEAD, words="the heads' attention patterns", enter=_of_pattern),
    SweptSite(
        "result",
        "attn.hook_result",
        _BY_HEAD,
        words="what the heads write to the residual stream",
        enter=_of_result,
        reads=("attn.hook_z", "attn.hook_result"),
    ),
):
    add_site(_site)
#: Those of the library itself.
OURS = frozenset(SITES)

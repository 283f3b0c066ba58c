"""The components of a model and their costs: parameters, shapes, operations and memory, as formulas and as numbers."""

import html
import math
import re
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.anatomy.diagram import draw
from hooklens.core.arguments import several, whole
from hooklens.core.errors import InputError
from hooklens.core.names import LAZY, axes, parse
from hooklens.model.config import HookedTransformerConfig, VectorEmbed
from hooklens.model.embed import SinusoidalPositions
from hooklens.model.kv_cache import Context
from hooklens.model.norms import Norm
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.results.result import Result
from hooklens.results.table import Table, visible

Lengths = int | Sequence[int] | None
_WIDTH = 80  # columns of a terminal
_DENOMINATOR = 99  # a coefficient with more digits is written as a decimal number
# Floating-point operations of each matrix product, a multiplication and an addition counted as two, over all layers.
# Elementwise work (norms, softmax, activations) is left out, as in torch.utils.flop_counter.
_WORK = {
    "attn.q": "2 L n d h e",
    "attn.k": "2 L n d g e",
    "attn.v": "2 L n d g e",
    "attn.scores": "2 L n n h e",
    "attn.z": "2 L n n h e",
    "attn.o": "2 L n d h e",
    "mlp.in_": "2 L n d m",
    "mlp.gate": "2 L n d m",
    "mlp.out": "2 L n d m",
    "unembed.linear": "2 n d V",
}
# The component that each hook point belongs to. The stream between components is a component without parameters.
_OWNER = {
    "hook_embed": "embed",
    "hook_pos_embed": "pos_embed",
    **dict.fromkeys(("hook_resid_pre", "hook_resid_mid", "hook_resid_post"), "stream"),
    **dict.fromkeys(("attn.hook_q", "attn.hook_rot_q"), "attn.q"),
    **dict.fromkeys(("attn.hook_k", "attn.hook_rot_k"), "attn.k"),
    "attn.hook_v": "attn.v",
    **dict.fromkeys(("attn.hook_attn_scores", "attn.hook_pattern"), "attn.scores"),
    "attn.hook_z": "attn.z",
    "hook_attn_out": "attn.o",
    "mlp.hook_pre_linear": "mlp.in_",
    "mlp.hook_post": "mlp.act",
    "hook_mlp_out": "mlp.out",
    **dict.fromkeys(("unembed.hook_in", "unembed.hook_out"), "unembed.linear"),
}
_AXES = {
    "head": "h",
    "kv_head": "g",
    "d_model": "d",
    "d_head": "e",
    "d_mlp": "m",
    "d_vocab": "V",
    "one": "1",
    "batch": "1",
    **dict.fromkeys(("pos", "query_pos", "key_pos"), "n"),
}


@dataclass(frozen=True, eq=False)
class Component(Result):
    """One kind of component, all layers together. `flops` and `bytes` are for one sequence of n tokens.

    `bytes` is the size of a cache of all points except the lazy ones, with each tensor counted once.
    """

    name: str
    parameters: int
    flops_formula: str
    flops: int
    memory_formula: str
    bytes: int


@dataclass(frozen=True, eq=False)
class Stage(Result):
    """The tensor at one hook point: its axes, and their sizes for one sequence of n tokens."""

    point: str
    axes: str
    shape: list[int]
    lazy: bool


@dataclass(frozen=True, eq=False)
class Timing(Result):
    """Seconds of one layer's attention at each length: the four projections, and the scores with the mixing."""

    lengths: Int[Tensor, "length"]
    projections: Float[Tensor, "length"]
    scores: Float[Tensor, "length"]
    projections_formula: Float[Tensor, "length"]
    scores_formula: Float[Tensor, "length"]

    def table(self, n: int | None = None) -> Table:
        """Measured seconds and those of the formula, at the rate (operations per second) that fits best."""
        columns = ("n", "projections ms", "by formula", "scores ms", "by formula")
        parts = (self.projections, self.projections_formula, self.scores, self.scores_formula)
        rows = zip(self.lengths.tolist(), *((part * 1e3).tolist() for part in parts), strict=True)
        return Table(columns, list(rows)).head(n)

    def figure(self) -> Any:
        """Measured and computed milliseconds against length."""
        from hooklens import viz

        curves = {
            "projections, measured": self.projections * 1e3,
            "projections, formula": self.projections_formula * 1e3,
            "scores, measured": self.scores * 1e3,
            "scores, formula": self.scores_formula * 1e3,
        }
        return viz.lines(curves, x=self.lengths, x_title="n", y_title="ms a layer")


@dataclass(frozen=True, eq=False)
class Description(Result):
    """The result of `describe`. `sizes` gives the meaning of each letter in the formulas.

    `crossover` is the length from which a layer's attention scores cost more operations than its q, k, v and o
    projections; `crossover_layer` is the length from which they cost more than projections and MLP together.
    """

    model_name: str
    n: int
    sizes: dict[str, int]
    components: list[Component]
    stages: list[Stage]
    crossover: float
    crossover_layer: float
    timing: Timing | None

    @property
    def parameters(self) -> int:
        """The number of parameters; a weight shared by two components counts once."""
        return sum(c.parameters for c in self.components)

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward pass over one sequence of n tokens."""
        return sum(c.flops for c in self.components)

    def table(self, n: int | None = None) -> Table:
        """One row per component, and their sum: formulas, and their values at this n in millions and in MiB."""
        columns = ("component", "parameters", "FLOPs", "MFLOPs", "activations", "MiB")
        rows = [
            (c.name, c.parameters, c.flops_formula, c.flops / 1e6, c.memory_formula, c.bytes / 2**20)
            for c in self.components
        ]
        rows.append(("total", self.parameters, "", self.flops / 1e6, "", sum(c.bytes for c in self.components) / 2**20))
        return Table(columns, rows).head(n)

    def stage_table(self) -> Table:
        """One row per hook point: axes and sizes. Lazy points are computed only while something listens to them."""
        rows = [(s.point, s.axes, " x ".join(map(str, s.shape)), "lazy" if s.lazy else "") for s in self.stages]
        return Table(("point", "axes", f"shape at n={self.n}", ""), rows)

    def figure(self) -> Any:
        """The measured times with the formula, if times were measured."""
        if self.timing is None:
            raise InputError("figure() draws measured times; measure them with describe(model, lengths=(64, 128, 256))")
        return self.timing.figure()

    def diagram(self) -> str:
        """The stages from tokens to logits, as SVG."""
        return draw(self.model_name, [(s.point, s.axes, s.shape) for s in self.stages], self.sizes["L"])

    def to_html(self) -> str:
        """Diagram and tables as a piece of HTML that loads nothing from the network."""
        tables = [self.table(), self.stage_table()] + ([] if self.timing is None else [self.timing.table()])
        note = (
            f"{html.escape(self._legend)}. Scores cost more than the projections from n = {self.crossover:.0f}, and "
            f"more than projections and MLP together from n = {self.crossover_layer:.0f}."
        )
        return f"<div>{self.diagram()}<p>{note}</p>{''.join(table.to_html() for table in tables)}</div>"

    _repr_html_ = to_html

    @property
    def _legend(self) -> str:
        return ", ".join(f"{letter} = {size}" for letter, size in self.sizes.items())

    def __str__(self) -> str:
        title = f"{visible(self.model_name)}: {self.parameters:,} parameters. One sequence of n tokens: {self._legend}"
        return f"{textwrap.fill(title, _WIDTH)}\n{self.table()}"


def describe(
    model: HookedTransformer | HookedTransformerConfig,
    *,
    n: int | None = None,
    lengths: int | Sequence[int] | None = None,
) -> Description:
    """What are the components of this model, and what does each cost on a sequence of `n` tokens?

    A configuration is described without creating weights. With `lengths`, attention is also timed on this machine.

    >>> from hooklens.testing import tiny_model
    >>> description = describe(tiny_model(), n=16)
    >>> description.parameters == sum(p.numel() for p in tiny_model().parameters()), description.crossover
    (True, 16.0)
    >>> print(description.table(5))
    component  parameters  FLOPs     MFLOPs  activations       MiB
    embed              88            0.0000  n d            0.0005
    pos_embed         256            0.0000  n d            0.0005
    stream              0            0.0000  2 L n d + n d  0.0024
    ln1                32            0.0000  L n + L n d    0.0011
    attn.q            144  2 L n d²  0.0041  L n d          0.0010
    """
    built = HookedTransformer(model, device="meta") if isinstance(model, HookedTransformerConfig) else model
    need_hooked(built, "describe")
    cfg = built.cfg
    length = min(cfg.n_ctx, 128) if n is None else whole("n", n, 1)
    groups, d_mlp = cfg.n_key_value_heads or cfg.n_heads, cfg.d_mlp or 0
    sizes = {"L": cfg.n_layers, "n": length, "d": cfg.d_model, "h": cfg.n_heads, "g": groups, "e": cfg.d_head}
    sizes |= {"m": d_mlp, "V": cfg.d_vocab_out}
    if isinstance(cfg.embed, VectorEmbed):
        sizes["i"] = cfg.embed.d_in
    return Description(
        model_name=cfg.model_name,
        n=length,
        sizes=sizes,
        components=_components(built, sizes),
        stages=_stages(built, sizes),
        crossover=_crossover(cfg),
        crossover_layer=_crossover(cfg, mlp=True),
        timing=None
        if lengths is None
        else _timed(built, [whole("lengths", n, 1) for n in several("lengths", lengths)]),
    )


def position_figure(model: HookedTransformer, *, n: int | None = None) -> Any:
    """The position embedding as a heat map, position by dimension: learned, or sines and cosines."""
    from hooklens import viz

    title = f"position embedding of {model.cfg.model_name}"
    return viz.heatmap(model.W_pos.detach()[:n], x_title="dimension", y_title="position", title=title)


def _components(model: HookedTransformer, sizes: dict[str, int]) -> list[Component]:
    activations, components = _activations(model), []
    for name, parameters in _counts(model).items():
        work = "2 n i d" if name == "embed" and "i" in sizes else _WORK.get(name, "")
        products = activations.get(name, [])
        components.append(
            Component(
                name=name,
                parameters=parameters,
                flops_formula=formula([work] if work else [], sizes),
                flops=_value(work, sizes),
                memory_formula=formula(products, sizes),
                bytes=sum(_value(product, sizes) for product in products) * model.dtype.itemsize,
            )
        )
    return components


def _counts(model: HookedTransformer) -> dict[str, int]:
    """Parameters per component, in forward order; the stream, scores, z and activations have none."""
    counts: dict[str, int] = {}
    owned = {id(p): p.numel() for p in model.parameters()}
    before = {
        "attn.o": ("attn.scores", "attn.z"),
        "mlp.in_": ("mlp.gate",) * model.cfg.gated_mlp,
        "mlp.out": ("mlp.act",),
    }
    for name, module in model.named_modules():
        kind = re.sub(r"^blocks\.\d+\.", "", name)
        for earlier in before.get(kind, ()):
            counts.setdefault(earlier, 0)
        own = [owned.pop(id(p), 0) for p in module.parameters(recurse=False)]
        if own or isinstance(module, Norm | SinusoidalPositions):
            counts[kind] = counts.get(kind, 0) + sum(own)
        if kind in ("embed", "pos_embed"):
            counts = {key: n for key, n in counts.items() if key != "stream"} | {"stream": 0}
    return counts


def _activations(model: HookedTransformer) -> dict[str, list[str]]:
    """The tensors of each component's points, each tensor once, as products."""
    activations: dict[str, list[str]] = {}
    same = model.reads_through(model.cfg.n_layers).norm is None  # the unembedding reads the last block's output itself
    for point in dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.0.", name) for name in model.hook_names()):
        kind, known = point.removeprefix("blocks.0."), parse(point)
        if known is None or known.name in LAZY or kind == "hook_resid_pre" or (kind == "unembed.hook_in" and same):
            continue
        owner = _OWNER.get(kind) or ("mlp.gate" if model.cfg.gated_mlp else "mlp.in_")
        owner = kind.rpartition(".hook_")[0] if kind.endswith((".hook_scale", ".hook_normalized")) else owner
        letters = [_AXES[axis] for axis in axes(point) if _AXES[axis] != "1"]
        activations.setdefault(owner, []).append(" ".join((["L"] if point != kind else []) + letters))
    # The input of a block is the output of the previous one, unless a norm stands between or positions are added.
    if model.blocks[0].leaves_through().norm is not None:
        activations["stream"].append("L n d")
    elif model.pos_embed is not None:
        activations["stream"].append("n d")
    return activations


def formula(products: Sequence[str], sizes: dict[str, int]) -> str:
    """A sum of products in L, n, d, h and V: h e, g e and m are written as multiples of d.

    >>> formula(["2 L n d m"], {"d": 8, "m": 32, "h": 2, "g": 2, "e": 4})
    '8 L n d²'
    >>> formula(["L n h e", "L n h e", "L n"], {"d": 8, "m": 32, "h": 2, "g": 1, "e": 3})
    '3/2 L n d + L n'
    """
    terms: dict[str, Fraction] = {}
    for product in products:
        factor, letters = Fraction(1), list[str]()
        for symbol in product.split():
            if symbol.isdigit():
                factor *= int(symbol)
            elif symbol == "m":
                factor, letters = factor * Fraction(sizes["m"], sizes["d"]), [*letters, "d"]
            elif symbol == "g":
                factor, letters = factor * Fraction(sizes["g"], sizes["h"]), [*letters, "h"]
            else:
                letters.append(symbol)
        if "e" in letters:
            factor *= Fraction(sizes["h"] * sizes["e"], sizes["d"])
            letters = [*(letter for letter in letters if letter not in "he"), "d"]
        powers = {letter: letters.count(letter) for letter in "LnihdV" if letter in letters}
        name = " ".join(letter + ("", "²", "³")[power - 1] for letter, power in powers.items())
        terms[name] = terms.get(name, Fraction(0)) + factor
    parts = []
    for name, factor in terms.items():
        number = str(factor) if factor.denominator <= _DENOMINATOR else f"{float(factor):.4g}"
        parts.append(name if factor == 1 else f"{number} {name}")
    return " + ".join(parts)


def _value(product: str, sizes: dict[str, int]) -> int:
    if not product:
        return 0
    factors = [int(factor) if factor.isdigit() else sizes[factor] for factor in product.split()]
    return math.prod(factors)


def _crossover(cfg: HookedTransformerConfig, *, mlp: bool = False) -> float:
    """The n from which scores and mixing cost more than the projections (and the MLP).

    Per layer, scores and mixing cost 2 n² h e each; q and o 2 n d h e each, k and v 2 n d g e, each matrix of the MLP
    2 n d m. So 4 n² h e > 4 n d e (h + g) from n = d (h + g) / h on: 2 d for as many key heads as query heads. With k
    MLP matrices it is n = d (h + g) / h + k d m / (2 h e). The whole square is counted; for a kernel that skips the
    causal half, n is twice as large.
    """
    heads, groups = cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads
    projections = cfg.d_model * (heads + groups) / heads
    matrices = 0
    if mlp and not cfg.attn_only:
        matrices = 3 if cfg.gated_mlp else 2
    return projections + matrices * cfg.d_model * (cfg.d_mlp or 0) / (2 * heads * cfg.d_head)


def _stages(model: HookedTransformer, sizes: dict[str, int]) -> list[Stage]:
    sizes, stages = {"1": 1} | sizes, []
    for point in dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.0.", name) for name in model.hook_names()):
        names, known = axes(point), parse(point)
        shape, name = [sizes[_AXES[axis]] for axis in names], point.replace("blocks.0.", "blocks.N.")
        stages.append(Stage(name, " ".join(names), shape, known is not None and known.name in LAZY))
    return stages


def _timed(model: HookedTransformer, asked: Lengths) -> Timing | None:
    if asked is None:
        return None
    lengths = [whole("lengths", n, 1) for n in several("lengths", asked)]
    if model.device.type == "meta":
        raise InputError("lengths= times attention, which needs weights; pass a model instead of its configuration")
    cfg = model.cfg
    measured = torch.tensor([_attention_seconds(model, n) for n in lengths], dtype=torch.float64)
    at = torch.tensor(lengths)
    per_token = 4 * cfg.d_model * cfg.d_head * (cfg.n_heads + (cfg.n_key_value_heads or cfg.n_heads))
    work = torch.stack((at * per_token, 4 * at**2 * cfg.n_heads * cfg.d_head), dim=1).double()
    # One rate per part: the one at which formula and measurement agree over all lengths, as ratios.
    rate = (work / measured).log().mean(0).exp()
    return Timing(at, *(column.clone() for column in (*measured.T, *(work / rate).T)))


def _attention_seconds(model: HookedTransformer, n: int) -> tuple[float, float]:
    attn: Any = model.blocks[0].attn
    x = torch.randn(1, n, model.cfg.d_model, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    ctx = Context(torch.arange(n, device=model.device))
    with torch.no_grad():
        q, k, v = attn.project(x, ctx, (None, None, None))
        view = ctx.view(attn.mask)
        z = attn.mix(q, k, v, view)

        def project() -> None:
            for linear in (attn.q, attn.k, attn.v):
                linear(x)
            attn.o(z.flatten(2))

        return _seconds(project), _seconds(lambda: attn.mix(q, k, v, view))


def _seconds(work: Callable[[], Any]) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(7))

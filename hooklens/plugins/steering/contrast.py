"""Contrast directions: the difference of two kinds of prompts at each layer, tested on held-out prompts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.component import layer_name
from hooklens.core.errors import InputError
from hooklens.core.names import AXES, site
from hooklens.core.progress_bar import progress
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompts import Prompts, rows_of
from hooklens.model.linear import packed_linears
from hooklens.plugins.steering.held_out_steering import cross_fit, made_splits
from hooklens.results.result import Result, Table
from hooklens.results.statistics import null_p, q_values, quantiles

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_DRAWS = 200  # shuffled labellings: a direction is fitted to each on every split
_TOKENS_AT_ONCE = 2048
_KEPT = 32  # shuffled directions kept for use as controls


@dataclass(frozen=True, eq=False)
class ContrastDirections(Result):
    """The difference of the two means at every layer, and how well it separates held-out prompts.

    `separation` is the probability that a held-out positive prompt lies further along the direction than a held-out
    negative one (area under the ROC curve: 0.5 is chance). `gap` is the distance of the held-out means along the
    direction, in units of the training difference: 1 if it generalises fully. `null` is the separation with shuffled
    labels, and `shuffled` contains the differences of means for some of these shuffles: directions as large as chance
    produces. `norm` is the mean norm of an activation.
    """

    terms = {
        "shuffled": "the mean separation with shuffled labels; 0.5 is chance",
    }

    direction: Float[Tensor, "layer width"]
    separation: Float[Tensor, "layer"]
    gap: Float[Tensor, "layer"]
    null: Float[Tensor, "draw layer"]
    shuffled: Float[Tensor, "kept layer width"]
    score: Float[Tensor, "layer prompt"]
    positive: Int[Tensor, "prompt"]
    norm: Float[Tensor, "layer"]
    site: str
    pos: str
    paired: bool
    folds: int

    def at(self, layer: int) -> Float[Tensor, "width"]:
        """The direction of one layer: coefficient 1 moves a negative prompt to the mean of the positive ones."""
        return self.direction[layer]

    @property
    def p(self) -> Float[Tensor, "layer"]:
        """How often shuffled labels separate as well, at each layer."""
        return null_p(self.separation, self.null)

    @property
    def q(self) -> Float[Tensor, "layer"]:
        """`p` of the layers, as false discovery rates."""
        return q_values(self.p)

    @property
    def best(self) -> int:
        """The layer with the best held-out separation; the first one if several tie."""
        return int((self.separation == self.separation.max()).long().argmax())

    @property
    def best_p(self) -> float:
        """How often the best layer under shuffled labels does as well as `best`: corrected for choosing the layer."""
        return float(null_p(self.separation.max(), self.null.max(1).values))

    def table(self, n: int | None = None) -> Table:
        """One row per layer."""
        columns = ("layer", "held-out separation", "shuffled", "p", "q", "gap carried over", "norm", "activation norm")
        sizes = self.direction.norm(dim=1)
        parts = (self.separation, self.null.mean(0), self.p, self.q, self.gap, sizes, self.norm)
        rows = zip(*(part.tolist() for part in parts), strict=True)
        return Table(columns, [(layer_name(i), *row) for i, row in enumerate(rows)]).head(n)

    def top(self, k: int = 10) -> Table:
        """The `k` layers of the best held-out separation, of equal ones the first."""
        rows = self.table().rows
        order = sorted(range(len(rows)), key=lambda i: -float(self.separation[i]))
        return Table(self.table().columns, [rows[i] for i in order[:k]])

    def figure(self) -> Any:
        """Held-out separation by layer, with the band of shuffled labels."""
        from hooklens.viz.curves import lines

        values = {"held out": self.separation, "shuffled labels": self.null.mean(0), "gap carried over": self.gap}
        ends = quantiles(self.null, (0.025, 0.975))
        axes: dict[str, Any] = {"x_title": f"layer of {self.site}", "y_title": "area under the ROC curve"}
        title = "At which layer can the two kinds of prompts be separated?"
        return lines(values, bands={"shuffled labels": (ends[0], ends[1])}, title=title, **axes)


def find_direction(
    model: "HookedTransformer",
    positive: Prompts,
    negative: Prompts,
    *,
    site: str = "resid_post",
    pos: int | None = -1,
    group: Int[Tensor, "pair"] | None = None,
    draws: int = _DRAWS,
    seed: int = 0,
) -> ContrastDirections:
    """Which direction separates positive from negative prompts at each layer, and does it generalise to other prompts?

    The direction is the difference of the two mean activations, at one position (negative: from the end) or, for None,
    averaged over all positions of a prompt. It is cross-validated: computed from four fifths of the prompts and tested
    on the rest. If there are as many positive as negative prompts, they form pairs, in order: a pair goes to one fold,
    and the null swaps labels within pairs. `group` has one label per pair: pairs of one group share a fold and are
    swapped together.

    >>> from hooklens.testing import tiny_model
    >>> found = find_direction(tiny_model(), [[i, 1] for i in range(10)], [[i, 2] for i in range(10)], draws=99)
    >>> found.direction.shape, found.separation[0].item(), found.p[0].item()      # layer width
    (torch.Size([2, 8]), 1.0, 0.01)

    Reference: Marks and Tegmark (2023), "The Geometry of Truth"; Arditi et al. (2024), "Refusal in Language Models Is
    Mediated by a Single Direction", section 2.3.
    """
    if draws < 1:
        raise InputError(f"draws is the number of shuffled labellings, at least 1, got {draws}")
    kind = _vector_site(site)
    both = [rows_of(model, prompts, name) for prompts, name in ((positive, "positive"), (negative, "negative"))]
    n_positive, n_negative = (len(rows) for rows in both)
    acts = _gathered(model, [*both[0], *both[1]], kind, pos)  # layer prompt width
    split = made_splits(n_positive, n_negative, group, seed)
    found = cross_fit(acts, split, draws, seed, keep=_KEPT)
    label = torch.arange(n_positive + n_negative) < n_positive
    direction = (acts[:, label].double().mean(1) - acts[:, ~label].double().mean(1)).to(acts)
    norm = acts.norm(dim=2).mean(1)
    where = "mean over positions" if pos is None else f"position {pos}"
    return ContrastDirections(
        direction=direction,
        **found._asdict(),
        positive=label.long(),
        norm=norm,
        site=kind,
        pos=where,
        paired=split.paired,
        folds=len(split.folds),
    )


def _vector_site(name: str) -> str:
    found = site(name).name
    if AXES.get(found, ())[:2] != ("batch", "pos") or len(AXES[found]) != 3 or found in ("scale", "embed", "pos_embed"):
        raise InputError(
            f"a direction needs one vector per position at every layer, such as resid_post, attn_out, mlp_out or post; "
            f"got {name!r}"
        )
    return found


def _gathered(
    model: "HookedTransformer", rows: list[Int[Tensor, "_pos"]], site: str, pos: int | None
) -> Float[Tensor, "layer prompt width"]:
    """The activation of every prompt at every layer, in float32 or wider, at the position or averaged over all."""
    _check_position(rows, pos)
    points, kind = [point.name for point in model.resolve(site)], torch.promote_types(model.dtype, torch.float32)
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row), []).append(i)
    found: dict[int, Tensor] = {}
    with torch.no_grad(), packed_linears(rows=1024), progress("activations", len(rows), unit="prompt") as advance:
        for length, members in lengths.items():
            at_once = max(1, _TOKENS_AT_ONCE // length)
            for start in range(0, len(members), at_once):
                index = members[start : start + at_once]
                tokens = torch.stack([rows[i] for i in index])
                _, cache = model.run_with_cache(tokens, names=points, stop_at_layer=model.cfg.n_layers)
                each = (cache[name].to(kind) for name in points)
                acts = torch.stack([act.mean(1) if pos is None else act[:, pos] for act in each])
                found |= dict(zip(index, acts.unbind(1), strict=True))
                advance(len(index))
    return torch.stack([found[i] for i in range(len(rows))], 1).cpu()


def _check_position(rows: list[Int[Tensor, "_pos"]], pos: int | None) -> None:
    shortest = min(map(len, rows))
    if pos is not None and not -shortest <= pos < shortest:
        raise InputError(f"position {pos} is out of range: the shortest prompt has {shortest} tokens")


def demo(model: "HookedTransformer") -> ContrastDirections:
    """Prompts that end in the right answer against the same ones that end in a wrong one."""
    pairs = demo_pairs(model, 12, min(4, model.cfg.n_ctx - 1))
    start, ends = pairs.clean, (pairs.answer, pairs.wrong_answer)
    positive, negative = (torch.cat([start, torch.tensor(end).to(start)[:, None]], 1) for end in ends)
    return find_direction(model, positive, negative, draws=99)

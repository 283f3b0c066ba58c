"""Contrast directions: the difference of two kinds of prompts at each layer, tested on held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.component import layer_name
from hooklens.core.errors import ArgumentError, InputError, OutOfRange, WrongType
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts, reads_vectors, rows_of
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.probing.gathering import gather
from hooklens.plugins.steering.held_out_steering import cross_fit, make_splits
from hooklens.results.result import Result, Table
from hooklens.results.statistics import Tested, middle, null_p

_DRAWS = 200  # shuffled labellings: a direction is fitted to each on every split
_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in", "pre", "pre_linear", "post")
_KEPT = 32  # shuffled directions kept for use as controls


@dataclass(frozen=True, eq=False)
class ContrastDirections(Tested, Result):
    """The difference of the two means at every layer, and how well it separates held-out prompts.

    `separation` is the probability that a held-out positive prompt lies further along the direction than a held-out
    negative one (area under the ROC curve: 0.5 is chance). `gap` is the distance of the held-out means along the
    direction, in units of the training difference: 1 if it generalises fully. `null` is the separation with shuffled
    labels, and `shuffled` contains the differences of means for some of these shuffles: directions as large as chance
    produces. `norm` is the mean norm of an activation.
    """

    ranked_by = "held-out separation"
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
        if layer not in range(-len(self.direction), len(self.direction)):
            raise OutOfRange(f"layer is from 0 to {len(self.direction) - 1}, got {layer!r:.40}")
        return self.direction[layer]

    @property
    def p(self) -> Float[Tensor, "layer"]:
        """How often shuffled labels separate as well, at each layer."""
        return null_p(self.separation, self.null)

    @property
    def best(self) -> int:
        """The layer with the best held-out separation; the first one if several tie."""
        return int(self.separation.argmax())

    @property
    def best_p(self) -> float:
        """How often the best layer under shuffled labels does as well as `best`: corrected for choosing the layer."""
        return float(null_p(self.separation.max(), self.null.max(1).values))

    def table(self, n: int | None = None) -> Table:
        """One row per layer, the best held-out separation first."""
        names = ("layer", "held-out separation", "shuffled", "p", "q", "gap carried over", "norm", "activation norm")
        sizes = self.direction.norm(dim=1)
        columns = (self.separation, self.null.mean(0), self.p, self.q, self.gap, sizes, self.norm)
        order = self.separation.argsort(descending=True, stable=True).tolist()
        return Table(names, [(layer_name(i), *(column[i] for column in columns)) for i in order]).head(n)

    def figure(self) -> Any:
        """Held-out separation by layer, with the band of shuffled labels."""
        from hooklens.viz.curves import lines

        values = {"held out": self.separation, "shuffled labels": self.null.mean(0), "gap carried over": self.gap}
        axes: dict[str, Any] = {"x_title": f"layer of {self.site}", "y_title": "area under the ROC curve"}
        title = "At which layer can the two kinds of prompts be separated?"
        return lines(values, bands={"shuffled labels": middle(self.null)}, title=title, **axes)


def find_direction(
    model: HookedTransformer,
    positive: Prompts | PromptPairs,
    negative: Prompts | None = None,
    *,
    site: str = "resid_post",
    pos: int | None = -1,
    group: Int[Tensor, "pair"] | Sequence[Any] | None = None,
    draws: int = _DRAWS,
    seed: int = 0,
) -> ContrastDirections:
    """Which direction separates positive from negative prompts at each layer, and does it generalise to other prompts?

    The direction is the difference of the two mean activations, at one position (negative: from the end) or, for None,
    averaged over all positions of a prompt. It is cross-validated: computed from four fifths of the prompts and tested
    on the rest. If there are as many positive as negative prompts, they form pairs, in order: a pair goes to one fold,
    and the null swaps labels within pairs. `group` has one label per pair: pairs of one group share a fold and are
    swapped together. Of `PromptPairs` the clean prompts are positive and the corrupted ones negative.

    >>> from hooklens.testing import tiny_model
    >>> contrast = find_direction(tiny_model(), [[i, 1] for i in range(10)], [[i, 2] for i in range(10)], draws=99)
    >>> contrast.direction.shape, contrast.separation[0].item(), contrast.p[0].item()      # layer width
    (torch.Size([2, 8]), 1.0, 0.01)

    Reference: Marks and Tegmark (2023), "The Geometry of Truth"; Arditi et al. (2024), "Refusal in Language Models Is
    Mediated by a Single Direction", section 2.3.
    """
    prompts: Any = positive
    if isinstance(positive, PromptPairs):
        if negative is not None:
            raise ArgumentError("{positive} is PromptPairs, which hold their corrupted prompts; leave {negative} out")
        prompts, negative = positive.clean, positive.corrupted
        group = positive.group if group is None else group
    if negative is None:
        raise ArgumentError("{negative} prompts are missing; give prompts of both kinds, or PromptPairs with both")
    if group is not None and not isinstance(group, Tensor):
        group = torch.from_numpy(np.unique(list(group), return_inverse=True)[1])
    whole("draws", draws, 1)
    if site not in _SITES:
        raise InputError(f"a direction needs one vector per position at every layer: {', '.join(_SITES)}; got {site!r}")
    if pos is not None and (isinstance(pos, bool) or not isinstance(pos, int)):
        raise WrongType(f"pos is a whole number, or None for the mean over all positions; got {pos!r:.40}")
    rows, others = rows_of(model, prompts, "positive"), rows_of(model, negative, "negative")
    split = make_splits(len(rows), len(others), group, seed)
    # layer prompt width
    acts = gather(model, [*rows, *others], site=site, pos=-1 if pos is None else pos, average=pos is None).x
    label = torch.arange(len(rows) + len(others)) < len(rows)
    return ContrastDirections(
        direction=(acts[:, label].double().mean(1) - acts[:, ~label].double().mean(1)).to(acts),
        **cross_fit(acts, split, draws, seed, keep=_KEPT)._asdict(),
        positive=label.long(),
        norm=acts.norm(dim=2).mean(1),
        site=site,
        pos="mean over positions" if pos is None else f"position {pos}",
        paired=split.paired,
        folds=len(split.folds),
    )


def demo(model: HookedTransformer) -> ContrastDirections:
    """The same prompts with the right answer and with a wrong answer at their end, or vectors and others."""
    pairs = demo_pairs(model, 12, min(4, model.cfg.n_ctx - 1))
    if reads_vectors(model):
        return find_direction(model, pairs, draws=99)
    start, ends = pairs.clean, (pairs.answer, pairs.wrong_answer)
    positive, negative = (torch.cat([start, torch.tensor(end).to(start)[:, None]], 1) for end in ends)
    return find_direction(model, positive, negative, draws=99)

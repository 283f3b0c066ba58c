"""The largest of many effects is too large: choose on one half of the prompts, report on the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.result import Result, Table
from hooklens.statistics import group_numbers, halves, mean_interval, q_values, sign_flip_p

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True, eq=False)
class HeldOutTop(Result):
    """The components with the largest mean effect on the half that chose, and their effect on the half that did not.

    `chosen_mean` is what they were chosen by, and so biased away from 0; `mean` is not. p and q values are those of
    the reported half, q over the components reported.
    """

    names: list[str]
    chosen_mean: Float[Tensor, "component"]
    mean: Float[Tensor, "component"]
    low: Float[Tensor, "component"]
    high: Float[Tensor, "component"]
    p: Float[Tensor, "component"]
    q: Float[Tensor, "component"]
    chosen_on: Int[Tensor, "prompt"]
    reported_on: Int[Tensor, "prompt"]
    n_components: int

    @property
    def shrinkage(self) -> float:
        """The reported effects as a share of those they were chosen by: below 1 where the choice picked luck."""
        return float(self.mean.abs().sum() / self.chosen_mean.abs().sum())

    def table(self, n: int | None = None) -> Table:
        """One row a component."""
        columns = ("component", "effect", "low", "high", "q", "where chosen")
        parts = (self.mean, self.low, self.high, self.q, self.chosen_mean)
        return Table(columns, list(zip(self.names, *(part.tolist() for part in parts), strict=True))).head(n)

    def top(self, k: int = 10) -> Table:
        """The first `k` that were chosen."""
        return self.table(k)

    def figure(self) -> Any:
        """The effects on the half that did not choose, with intervals."""
        from hooklens import viz

        title = f"Chosen among {self.n_components} on one half of the prompts, measured on the other"
        return viz.bars(self.mean, self.low, self.high, self.names, title, y_title="effect")


def held_out_top(
    model: "HookedTransformer",
    per_prompt: Float[Tensor, "prompt *grid"],
    names: Sequence[str],
    *,
    k: int = 10,
    group: Int[Tensor, "prompt"] | None = None,
    seed: int = 0,
) -> HeldOutTop:
    """Which `k` components matter most, and how much on prompts that had no say in the choice?

    `per_prompt` holds each prompt's effect of each component, flattened in the order of `names`. Prompts of one `group`
    go to one half.

    >>> from hooklens.testing import tiny_model
    >>> noise = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    >>> found = held_out_top(tiny_model(), noise, [f"c{i}" for i in range(200)], k=5)
    >>> found.shrinkage < 0.5, bool((found.q < 0.05).any())
    (True, False)

    Reference: Kriegeskorte et al. (2009), "Circular analysis in systems neuroscience".
    """
    flat = per_prompt.detach().reshape(len(per_prompt), -1)
    if flat.shape[1] != len(names):
        raise InputError(f"one name a component is needed, got {len(names)} for {flat.shape[1]} components")
    if not 1 <= k <= len(names):
        raise InputError(f"k is between 1 and the {len(names)} components, got {k}")
    choose, report = (index.to(flat.device) for index in halves(len(flat), group=group, seed=seed))
    by = flat[choose].mean(0)
    best = by.abs().argsort(descending=True, stable=True)[:k]
    kept, of = flat[report][:, best], group_numbers(len(flat), group)[report.cpu()]
    low, high = mean_interval(kept, group=of)
    p = sign_flip_p(kept, group=of)
    chosen = [names[i] for i in best.tolist()]
    ends = (kept.mean(0), low, high, p, q_values(p))
    return HeldOutTop(chosen, by[best], *ends, choose, report, len(names))


def demo(model: "HookedTransformer") -> HeldOutTop:
    """Which head's zeroing changes the loss most? Chosen on half of twelve short prompts, reported on the rest."""
    from hooklens.metrics import loss
    from hooklens.plugins.patching.activation import patch
    from hooklens.sweeps.settings import engine

    n = min(8, model.cfg.n_ctx)
    tokens = torch.randint(model.cfg.d_vocab, (12, n), generator=torch.Generator().manual_seed(0)).to(model.device)
    with engine(progress=False, verify=0):
        sweep = patch(model, tokens, tokens, loss(model, tokens), site="z", value="zero")
    rose = sweep.clean_per_pair[:, None, None] - sweep.per_pair
    names = [f"L{i}H{j}" for i in range(model.cfg.n_layers) for j in range(model.cfg.n_heads)]
    return held_out_top(model, rose, names, k=min(4, len(names)))

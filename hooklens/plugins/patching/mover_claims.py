"""What may be claimed of name movers: heads named on one half of the pairs, their direct effect shown on the other."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.plugins.claims.claim import Claim, ClaimFamily, Measured, claim, family
from hooklens.plugins.patching.name_movers import NameMovers
from hooklens.statistics import halves

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

LEAST_GROUPS = 4  # two a half: fewer leave no interval


def mover_claims(model: "HookedTransformer", movers: NameMovers, *, seed: int = 0) -> ClaimFamily | None:
    """A claim for each head that one half of the pairs calls a name mover, measured on the other half.

    The intervention is the exact direct effect, as a share of the clean-corrupted difference; its control is the mean
    of the same over all heads that were not called, what a head drawn at random does. None where no head was called.
    """
    n_groups = len(movers.group.unique())
    if n_groups < LEAST_GROUPS:
        raise InputError(f"two halves with an interval each need {LEAST_GROUPS} groups of pairs, got {n_groups}")
    first, second = halves(len(movers.group), group=movers.group, seed=seed)
    called, shown = of_pairs(movers, first).name_movers, of_pairs(movers, second)
    made = [_claim(model, shown, head, called) for head in called]
    return family(model, made) if made else None


def of_pairs(movers: NameMovers, index: Int[Tensor, "some"]) -> NameMovers:
    """The same measurements of some of the pairs."""
    per_pair = ("attention", "margin", "direct", "gap", "group")
    index = index.to(movers.gap.device)
    assert set(per_pair) < {field.name for field in fields(movers)}
    return replace(movers, **{name: getattr(movers, name)[index] for name in per_pair})


def _claim(
    model: "HookedTransformer", movers: NameMovers, head: tuple[int, int], called: list[tuple[int, int]]
) -> Claim:
    layer, number = head
    share = movers.direct / movers.gap.mean()
    other = torch.ones(share.shape[1:], dtype=torch.bool, device=share.device)
    for one in called:
        other[one] = False
    control = share[:, other].mean(1) if bool(other.any()) else None
    group = movers.group
    return claim(
        model,
        f"L{layer}H{number} moves the name",
        observation=Measured.of("attention to the indirect object", movers.attention[:, layer, number].cpu(), group),
        intervention=Measured.of("share restored directly", share[:, layer, number].cpu(), group),
        control=None if control is None else Measured.of("the same, mean of all other heads", control.cpu(), group),
    )


def demo_movers(n: int = 8, heads: int = 2) -> NameMovers:
    """Made-up measurements in which L0H0 is a name mover, for tests and examples.

    >>> demo_movers().name_movers
    [(0, 0)]
    """
    from hooklens.plugins.patching.name_movers import Criteria

    noise = torch.randn(n, 1, heads, generator=torch.Generator().manual_seed(0)) * 0.02
    is_mover = torch.tensor([1.0] + [0.0] * (heads - 1))
    return NameMovers(
        attention=0.6 * is_mover + noise.abs(),
        margin=0.5 * is_mover + noise,
        rank=(90 * (1 - is_mover)).long().expand(3, 1, heads).clone(),
        direct=0.3 * is_mover + noise,
        gap=torch.ones(n),
        group=torch.arange(n),
        d_vocab=100,
        criteria=Criteria(),
    )

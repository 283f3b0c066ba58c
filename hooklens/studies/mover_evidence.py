"""Claims about name movers: heads are labelled on one half of the pairs, and tested on the other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hooklens.core.component import head_name
from hooklens.core.errors import InputError
from hooklens.plugins.heads.mover_result import NameMovers, of_pairs
from hooklens.results.claims import Claim, ClaimFamily, Measured, Registration, claim, family
from hooklens.results.statistics import LEAST_GROUPS as _A_HALF

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

LEAST_GROUPS = 2 * _A_HALF  # with fewer, no head could be called causal on the reported half
_METRIC = "logit_diff"  # the metric of NameMovers.direct
_CONTROL = "the same head's output from a pair with other names"


def mover_claims(
    model: "HookedTransformer", movers: NameMovers, *, registered: Sequence[Registration] = (), seed: int = 0
) -> ClaimFamily | None:
    """One claim for each head that one half of the pairs labels a name mover, measured on the other half.

    The intervention is the exact direct effect, as a share of the clean-corrupted difference. Its control uses the same
    head's clean output from another pair with other names: the effect of no longer writing the wrong name, or of
    writing any name. None if no head was labelled.

    Registrations in `registered` are compared with the claim of the same hypothesis, such as "L5H1 moves the name".
    """
    n_groups = len(movers.group.unique())
    if n_groups < LEAST_GROUPS:
        raise InputError(
            f"two halves of {_A_HALF} groups of pairs need {LEAST_GROUPS}, got {n_groups}; with fewer, no p can reach "
            "0.05. A group is four pairs that share names and sentence"
        )
    named, reported = (of_pairs(movers, one) for one in movers.halves(seed=seed))
    made = [_claim(model, reported, head) for head in named.name_movers]
    return family(model, made, registered=registered) if made else None


def _claim(model: "HookedTransformer", movers: NameMovers, head: tuple[int, int]) -> Claim:
    layer, number = head
    share, control = ((moved / movers.gap.mean())[:, layer, number].cpu() for moved in (movers.direct, movers.placebo))
    group = movers.group
    return claim(
        model,
        f"{head_name(layer, number)} moves the name",
        observation=Measured.of("attention to the indirect object", movers.attention[:, layer, number].cpu(), group),
        intervention=Measured.of("share restored directly", share, group, metric=_METRIC),
        control=Measured.of(_CONTROL, control, group, metric=_METRIC),
        side="above",
    )


def demo_movers(n: int = 8, heads: int = 2) -> NameMovers:
    """Synthetic measurements in which L0H0 is a name mover, for tests and examples.

    >>> demo_movers().name_movers
    [(0, 0)]
    """
    from hooklens.plugins.heads.mover_result import Criteria

    noise = torch.randn(n, 1, heads, generator=torch.Generator().manual_seed(0)) * 0.02
    is_mover = torch.tensor([1.0] + [0.0] * (heads - 1))
    return NameMovers(
        attention=0.6 * is_mover + noise.abs(),
        margin=0.5 * is_mover + noise,
        rank=(90 * (1 - is_mover)).long().expand(3, 1, heads).clone(),
        written=torch.eye(3)[:, None, None] * is_mover[:, None],
        direct=0.3 * is_mover + noise,
        placebo=noise.flip(0),
        gap=torch.ones(n),
        name=torch.arange(n) % 3,
        group=torch.arange(n),
        d_vocab=100,
        criteria=Criteria(),
    )

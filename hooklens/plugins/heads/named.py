"""Name movers for the taxonomy: the measurements of `name_movers`, each with its own p-value."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.data.indirect_object import ioi
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import Head, PerHead, head_table
from hooklens.plugins.heads.mover_result import NameMovers, of_pairs
from hooklens.plugins.heads.name_movers import find_name_movers
from hooklens.plugins.heads.rotations import above
from hooklens.results.result import Result, Table
from hooklens.results.statistics import Tested, sign_flip_p

#: The labels that these prompts can give; the second one reverses copying and direct effect.
NAME_LABELS = ("name mover", "negative name mover")
_FLIPS = 2**16  # two-sided, with 270 heads: the smallest q-value of a single head is below 0.05
_PERMUTED = 1000  # pooled over heads


@dataclass(frozen=True, eq=False)
class NameEvidence(Tested, Result):
    """Evidence from indirect-object prompts: does a head attend to the name, copy it and write it? `p` is the largest.

    Heads are labelled by the pairs `chosen_on` (`p` is theirs), and the numbers come from `reported_on`: the other half
    of the groups of pairs, or the same pairs if there is only one group.

    Attention margin and direct effect are tested by sign flips over groups of prompts that share names. Copying is
    tested by permuting which name was read: a head that raises all names alike copies none. For a negative name mover
    the last two are reversed: it lowers the name that it attends to, and the logit difference.
    """

    movers: NameMovers
    p: Float[Tensor, "label layer head"]
    chosen_on: Int[Tensor, "chosen"]
    reported_on: Int[Tensor, "reported"]

    @cached_property
    def named(self) -> NameMovers:
        """The measurements that label the heads."""
        return of_pairs(self.movers, self.chosen_on)

    @cached_property
    def reported(self) -> NameMovers:
        """The measurements that are reported."""
        return of_pairs(self.movers, self.reported_on)

    def note(self, alpha: float) -> str:
        """On which pairs heads were labelled and measured, and whether these are enough for a label."""
        n_named, n_reported = len(self.chosen_on), len(self.reported_on)
        note = f"Name movers: labelled by {n_named} pairs, measured on {n_reported} others, from other groups"
        if bool(torch.isin(self.reported_on, self.chosen_on).any()):
            note = f"Name movers: labelled and measured on the same {n_named} pairs, as all of them are of one group"
        groups, needed = len(self.named.group.unique()), math.ceil(math.log2(self.p.numel() / alpha))
        if groups < needed:
            note += (
                f". With so few (groups to label by: {groups}) one head alone cannot reach q {alpha:g} over "
                f"{self.p[0].numel()} heads and both labels; {8 * needed} pairs are enough"
            )
        return f"{note}."

    def labelled(self, alpha: float) -> dict[str, list[Head]]:
        """Heads by label, whose three tests all pass at that false discovery rate, where the model does the task."""
        low, high = self.named.share_interval()
        passes = (self.q <= alpha) & torch.stack([low > 0, high < 0]) & self.named.defined
        return {
            label: [(layer, head) for layer, head in heads.nonzero().tolist()]
            for label, heads in zip(NAME_LABELS, passes, strict=True)
        }

    def table(self, n: int | None = 12) -> Table:
        """One row per head, ranked and labelled (q) by one half of the pairs; margin and direct effect on the other."""
        low, high = self.reported.share_interval()
        mover, negative = self.q
        columns = {"margin": self.reported.margin.mean(0), "direct effect": self.reported.share}
        columns |= {"low": low, "high": high, "q name mover": mover, "q negative": negative}
        return head_table(self.named.share.abs(), columns, n)


def name_evidence(
    model: HookedTransformer, n: int = 128, *, alpha: float = 0.05, seed: int = 0
) -> tuple[NameEvidence | None, str]:
    """Evidence from `n` prompt pairs, with `NameEvidence.note`; or None and the reason why there is none.

    >>> from hooklens.testing import tiny_model
    >>> name_evidence(tiny_model())
    (None, 'no name movers: prompt pairs are made of words, and this model has no tokenizer; load it with tokenizer=')
    """
    try:
        pairs = ioi(model, n, seed=seed)
        if int(pairs["end"][0]) >= model.cfg.n_ctx:
            raise InputError(f"the prompts do not fit n_ctx {model.cfg.n_ctx}")
        movers = find_name_movers(model, pairs)
    except InputError as error:
        return None, f"no name movers: {error}"
    evidence = evidence_of(movers, seed)
    return evidence, evidence.note(alpha)


def evidence_of(movers: NameMovers, seed: int = 0) -> NameEvidence:
    """The p-values of one half of these measurements."""
    chosen_on, reported_on = movers.halves(seed=seed)
    named = of_pairs(movers, chosen_on)
    margin, up, down = (_one_sided(x, named.group) for x in (named.margin, named.direct, -named.direct))
    copies, suppresses = copying_p(named.written, seed)
    both = torch.stack([up.maximum(copies.to(up)), down.maximum(suppresses.to(up))])
    return NameEvidence(movers, both.maximum(margin.to(both)), chosen_on, reported_on)


def _one_sided(values: Float[Tensor, "pair layer head"], group: Tensor) -> PerHead:
    two_sided = sign_flip_p(values, group=group, draws=_FLIPS)
    return torch.where(values.mean(0) > 0, two_sided / 2, 1 - two_sided / 2)


def copying_p(written: Float[Tensor, "name layer head other"], seed: int = 0) -> tuple[PerHead, PerHead]:
    """How often names paired at random are raised (lowered) as much as each name is by reading itself.

    The mean of each source over names, and of each name over sources, is subtracted first. The sum over the pairs of a
    random pairing then has a known deviation (Hoeffding), in which the permutations of all heads are pooled.

    >>> own = torch.eye(8)[:, None, None] * torch.tensor([1.0, 0.0])[:, None]
    >>> copies, suppresses = copying_p(own + torch.randn(8, generator=torch.Generator().manual_seed(0)))
    >>> bool(copies[0, 0] < 0.01), copies[0, 1].item(), bool(suppresses[0, 0] > 0.99)
    (True, 1.0, True)

    Reference: Hoeffding (1951), "A Combinatorial Central Limit Theorem"; Fisher (1935), "The Design of Experiments",
    section 21.
    """
    n, W = len(written), written.permute(1, 2, 0, 3).double()
    left = W - W.mean(-1, keepdim=True)
    left = left - left.mean(-2, keepdim=True)
    spread = (left.square().sum((-1, -2)) / max(1, n - 1)).sqrt()
    safe = torch.where(spread > 1e-5 * W.abs().amax((-1, -2)), spread, torch.nan)  # less is rounding
    seen = left.diagonal(dim1=-2, dim2=-1).sum(-1) / safe
    orders = torch.rand(_PERMUTED, n, generator=seeded(seed)).argsort(1).to(W.device)
    rows = torch.arange(n, device=W.device)
    null = torch.stack([left[:, :, rows, order].sum(-1) for order in orders]) / safe
    return above(seen, null), above(-seen, -null)

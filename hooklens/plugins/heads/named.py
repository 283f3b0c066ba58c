"""Name movers for the taxonomy: the measurements of `name_movers`, each with a p-value of its own."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.ioi import ioi
from hooklens.plugins.heads.rotations import PerHead
from hooklens.plugins.patching.name_movers import NameMovers, name_movers
from hooklens.result import Result
from hooklens.statistics import q_values, sign_flip_p

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_FLIPS = 2**16  # two-sided, with 270 heads: the smallest q-value of a single head lies below 0.05


@dataclass(frozen=True, eq=False)
class NameEvidence(Result):
    """Indirect-object prompts: does a head look at the name, copy it and write it? `p` is the largest of the three.

    Attention margin and direct effect are tested by flipping signs over groups of prompts that share names; copying by
    the names' mean rank, which is uniform for a head that treats names like any other token.
    """

    found: NameMovers
    p: PerHead

    @property
    def q(self) -> PerHead:
        """Benjamini-Hochberg over heads."""
        return q_values(self.p)

    def movers(self, level: float) -> list[tuple[int, int]]:
        """Heads whose three tests all pass at that false discovery rate, where the model does the task at all."""
        low, _ = self.found.share_interval()
        good = (self.q <= level) & (low > 0) & self.found.defined
        return [(int(a), int(b)) for a, b in good.nonzero()]


def name_evidence(model: "HookedTransformer", n: int = 64, *, seed: int = 0) -> tuple[NameEvidence | None, str]:
    """The evidence of `n` prompt pairs; None, and why, where the model cannot be asked.

    >>> from hooklens.testing import tiny_model
    >>> name_evidence(tiny_model())
    (None, 'no name movers: prompt pairs are made of words, and this model has no tokenizer; load it with tokenizer=')
    """
    try:
        pairs = ioi(model, n, seed=seed)
        if pairs.clean_tokens.shape[1] > model.cfg.n_ctx:
            raise InputError(f"the prompts do not fit n_ctx {model.cfg.n_ctx}")
        found = name_movers(model, pairs)
    except InputError as error:
        return None, f"no name movers: {error}"
    margin, direct = (_one_sided(x, found.group) for x in (found.margin, found.direct))
    return NameEvidence(found, torch.stack([margin, direct, _rank_p(found).to(margin)]).amax(0)), ""


def _one_sided(values: Float[Tensor, "pair layer head"], group: Tensor) -> PerHead:
    two = sign_flip_p(values, group=group, draws=_FLIPS)
    return torch.where(values.mean(0) > 0, two / 2, 1 - two / 2)


def _rank_p(found: NameMovers) -> PerHead:
    """P(the mean rank is as low) for ranks uniform over the vocabulary: normal, as the mean of many uniform numbers."""
    share = (found.rank.double() + 0.5) / found.d_vocab
    deviation = (share.mean(0) - 0.5) * (12 * len(share)) ** 0.5
    return torch.special.ndtr(deviation)

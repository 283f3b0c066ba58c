"""Attention entropy: how widely does each head look, beside a head that looks everywhere equally?"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens import HookedTransformer, Result, Table


@dataclass(frozen=True, eq=False)
class AttentionEntropy(Result):
    """Entropy in nats of each head's pattern, a mean over queries, and that of uniform attention to read it by."""

    ranked_by = "narrowness"
    baselines = ("uniform",)

    entropy: Float[Tensor, "layer head"]
    uniform: float

    @property
    def width(self) -> Float[Tensor, "layer head"]:
        """The share of the largest possible entropy: 0 looks at one key, 1 at all keys equally."""
        return self.entropy / self.uniform

    def table(self, n: int | None = None) -> Table:
        """Every head, the narrowest first."""
        n_heads = self.entropy.shape[1]
        order = self.entropy.flatten().argsort(stable=True)[:n].tolist()
        rows = [(f"L{i // n_heads}H{i % n_heads}", self.entropy.flatten()[i], self.width.flatten()[i]) for i in order]
        return Table(("head", "entropy (nats)", "of uniform"), rows)

    def figure(self) -> Any:
        """Layer by head, as a share of uniform attention."""
        from hooklens.viz import heatmap

        return heatmap(
            self.width,
            title="Attention entropy",
            x_title="head",
            y_title="layer",
            diverging=False,
            colourbar="of uniform",
        )


def attention_entropy(model: HookedTransformer, tokens: Int[Tensor, "batch pos"]) -> AttentionEntropy:
    """How widely does each head look on these tokens?

    >>> from hooklens.testing import induction_model
    >>> result = attention_entropy(induction_model(), torch.tensor([[3, 1, 4, 3, 1]]))
    >>> result.top(1).rows[0][0]              # the previous-token head looks at one key
    'L0H0'

    The first query sees one key only, so it is left out. A small entropy says that a head looks at few keys, not that
    what it does there matters: patch it to know that.
    """
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names="pattern")
    pattern = cache.stack("pattern")[..., 1:, :]
    entropy = torch.special.entr(pattern).sum(-1).mean((1, 3))
    n_keys = torch.arange(2, tokens.shape[1] + 1, dtype=torch.float64)
    return AttentionEntropy(entropy, float(n_keys.log().mean()))


def demo(model: HookedTransformer) -> AttentionEntropy:
    """The entropy of every head on eight tokens."""
    tokens = torch.arange(min(8, model.cfg.n_ctx), device=model.device)[None] % model.cfg.d_vocab
    return attention_entropy(model, tokens)

"""A demo's result on a model that its method does not support."""

from dataclasses import dataclass
from typing import Any

import torch

from hooklens.model.config import TokenEmbed
from hooklens.model.transformer import HookedTransformer
from hooklens.results.result import Result


@dataclass(frozen=True, eq=False)
class Needs(Result):
    """What the method needs, in words."""

    what: str

    def figure(self) -> Any:
        """An empty figure: there is nothing to draw."""
        from hooklens.viz.figures import bars

        return bars(torch.zeros(1), labels=[self.what], title=f"Needs {self.what}")


def lacking(model: HookedTransformer, *, mlp: bool = False, tokens: bool = True) -> Needs | None:
    """What the model lacks for a method that reads weights in the stream; None if nothing.

    >>> from hooklens.testing import tiny_model
    >>> lacking(tiny_model()) is None, lacking(tiny_model(attn_only=True), mlp=True)
    (True, Needs(what='MLPs'))
    """
    if model.blocks[0].not_a_sum is not None:
        return Needs(f"a stream that components add to ({model.blocks[0].not_a_sum})")
    if mlp and model.cfg.attn_only:
        return Needs("MLPs")
    return needs_tokens(model) if tokens else None


def needs_tokens(model: HookedTransformer) -> Needs | None:
    """What a model that reads vectors lacks for a method about tokens; None for one that reads tokens.

    >>> from hooklens.testing import tiny_model
    >>> needs_tokens(tiny_model()) is None, needs_tokens(tiny_model(embed={"part": "vectors", "d_in": 3}))
    (True, Needs(what='tokens'))
    """
    return None if isinstance(model.cfg.embed, TokenEmbed) else Needs("tokens")

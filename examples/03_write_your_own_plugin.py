# %% [markdown]
# # Write your own plugin
#
# A method is a function that takes the model first and returns a frozen result. This one asks how much each layer
# changes the residual stream. It runs on a small random model.

# %%
import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens import HookedTransformer, Result, Table
from hooklens.testing import check_plugin, induction_model, tiny_model

__doc__ = "Stream change: how much does each layer change the direction of the residual stream?"

# %% [markdown]
# The result contains numbers and what is needed to read them. `figure()` draws and computes nothing.


# %%
@dataclass(frozen=True, eq=False)
class StreamChange(Result):
    """The cosine between the stream before and after each layer: 1 if a layer does not change the direction."""

    cosine: Float[Tensor, "layer"]
    n_tokens: int

    def table(self, n: int | None = None) -> Table:
        """One row per layer."""
        return Table(("layer", "cosine"), list(enumerate(self.cosine.tolist()))).head(n)

    def figure(self) -> Any:
        """One bar per layer."""
        from hooklens.viz import bars

        labels = [f"L{n}" for n in range(len(self.cosine))]
        return bars(self.cosine, labels=labels, title="Stream after against before", y_title="cosine")


# %% [markdown]
# The method requests the points that it needs, and no others. It leaves nothing behind: no hooks, no gradients, no
# change of the random state.


# %%
def stream_change(model: HookedTransformer, tokens: Int[Tensor, "batch pos"]) -> StreamChange:
    """How much does each layer turn the residual stream?"""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names=["resid_pre", "resid_post"])
    before, after = cache.stack("resid_pre"), cache.stack("resid_post")
    cosine = torch.cosine_similarity(before, after, dim=-1).mean((1, 2))
    return StreamChange(cosine, tokens.numel())


def demo(model: HookedTransformer) -> StreamChange:
    """Eight tokens of any model."""
    tokens = torch.arange(min(8, model.cfg.n_ctx), device=model.device)[None] % model.cfg.d_vocab
    return stream_change(model, tokens)


# %% [markdown]
# Test it where the answer is known: the heads of the induction model write to separate dimensions, so no cosine is 1 or
# 0.

# %%
result = demo(tiny_model())
print(result)
print(demo(induction_model()).table())

# %% [markdown]
# The contract checks report which clause is violated. Here it is the last one: a result can be loaded only if its
# module is declared as an entry point, which needs a package. `docs/add_a_plugin.md` shows the few lines.

# %%
try:
    check_plugin(sys.modules[__name__])
except AssertionError as error:
    print(error)

# %%
figure = result.figure()
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-03-change.html", include_plotlyjs=True)
    print("wrote hooklens-03-change.html")

# %% [markdown]
# # Which activations carry the answer to "who gets the drink"?
#
# Indirect objects (Wang et al. 2022): in "When Mary and John went to the store, John gave a drink to" the next word
# is " Mary". If the giver changes, it is " John". Patching finds the activations that carry this difference. Set
# `HOOKLENS_TINY=1` to run on a hand-set induction model, whose answer is known.

# %%
import os
import sys

import torch

import hooklens as hl
from hooklens.testing import induction_model

if os.environ.get("HOOKLENS_TINY"):
    model = induction_model()
    clean, corrupted = torch.tensor([[3, 1, 4, 9, 3]]), torch.tensor([[3, 1, 4, 9, 1]])
    metric = hl.logit_diff(model, answer=1, wrong_answer=4)
else:
    model = hl.load("smollm2-135m-instruct")
    clean = "When Mary and John went to the store, John gave a drink to"
    corrupted = "When Mary and John went to the store, Mary gave a drink to"
    metric = hl.logit_diff(model, answer=" Mary", wrong_answer=" John")

# %% [markdown]
# The metric is the difference of two logits. All other numbers are relative to these two runs.

# %%
sweep = hl.patch(model, clean, corrupted, metric, site="resid_pre")
print(f"clean {sweep.clean:.3f}, corrupted {sweep.corrupted:.3f}")

# %% [markdown]
# Every layer and position of the residual stream: the clean value is written into the corrupted run. In early layers
# the difference is at the changed word; in late layers it is at the last position, where the answer is predicted.

# %%
print(sweep.table(8))
print(f"computed {sweep.computed:.1%} of what the loop would; largest difference from it {sweep.largest_error:.1e}")

# %% [markdown]
# Which layer moves it? The same for all positions at once, with attention and MLP separate.

# %%
for site in ("attn_out", *(["mlp_out"] if model.cfg.d_mlp else [])):
    print(hl.patch(model, clean, corrupted, metric, site=site, by="layer").table(4), "\n")

# %% [markdown]
# And which heads? A head that restores the difference is not yet a name mover: it must also attend to the name, copy
# it, and write it to the logits directly. `hooklens demo` checks all three on many prompts; this is a single pair.

# %%
heads = hl.patch(model, clean, corrupted, metric, site="z")
print(heads.top(5))

# %%
figure = sweep.figure()
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-02-patching.html", include_plotlyjs=True)
    print("wrote hooklens-02-patching.html")

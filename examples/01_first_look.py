# %% [markdown]
# # A first look at activations
#
# Load a model, read its activations between tokens and logits, and edit them. Set `HOOKLENS_TINY=1` to run on a small
# random model instead of downloading one.

# %%
import os
import sys

import torch

import hooklens as hl
from hooklens.testing import tiny_model
from hooklens.viz import attention_heads

tiny = bool(os.environ.get("HOOKLENS_TINY"))
model = tiny_model(n_ctx=64) if tiny else hl.load("smollm2-135m-instruct")
print(model)

# %% [markdown]
# A prompt becomes tokens. A leading space belongs to the word after it.

# %%
prompt = "When Mary and John went to the store, John gave a drink to"
tokens = torch.arange(14)[None] % model.cfg.d_vocab if tiny else model.to_tokens(prompt)
words = [str(int(i)) for i in tokens[0]] if tiny else model.to_str_tokens(prompt)
print(words)

# %% [markdown]
# Run one forward pass and keep the activations at some points. Only the requested points are kept.

# %%
with torch.no_grad():
    logits, cache = model.run_with_cache(tokens, names=["pattern", "resid_pre", "resid_mid", "attn_out"])
print(cache)
print("pattern of layer 0, batch head query_pos key_pos:", list(cache["pattern", 0].shape))

# %% [markdown]
# What does the model expect next?

# %%
chances, ids = logits[0, -1].softmax(-1).topk(5)
said = [str(int(i)) for i in ids] if tiny else [model.to_string(i[None]) for i in ids]
print(hl.Table(("next token", "probability"), list(zip(said, chances.tolist(), strict=True))))

# %% [markdown]
# Attention adds its output to the residual stream; this holds at every layer.

# %%
for n in range(model.cfg.n_layers):
    assert torch.equal(cache["resid_mid", n], cache["resid_pre", n] + cache["attn_out", n])
print("resid_mid = resid_pre + attn_out, at every layer")

# %% [markdown]
# Now edit: how much does the logit of the best guess change without one head? The hook ends with the `with` block.

# %%
layer, head = model.cfg.n_layers - 1, 1


def ablate(z, hook):
    z[:, :, head] = 0
    return z


with torch.no_grad(), model.hooks(fwd_hooks=[(hl.site("z", layer), ablate)]):
    without = model(tokens)
before, after = (float(out[0, -1, ids[0]]) for out in (logits, without))
print(f"logit of {said[0]!r}: {before:.3f}, without L{layer}H{head}: {after:.3f}")

# %% [markdown]
# Where do the heads of this layer attend?

# %%
names = [f"L{layer}H{n}" for n in range(model.cfg.n_heads)]
figure = attention_heads(cache["pattern", layer][0], words, names, title="Attention of the last layer")
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-01-attention.html", include_plotlyjs=True)
    print("wrote hooklens-01-attention.html")

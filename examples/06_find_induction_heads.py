# %% [markdown]
# # Find induction heads
#
# In "A B ... A" an induction head predicts "B": it attends to the token after the last A, and copies it (Olsson et al.
# 2022). We train a model small enough to see the whole circuit, then look for its parts among the 270 heads of SmolLM2.
# Set `HOOKLENS_TINY=1` to use a hand-set model in place of both.

# %%
import math
import os
import sys

import torch

import hooklens as hl
from hooklens.plugins.heads import (
    classify_heads,
    find_induction_heads,
    measure_redundancy,
    score_composition,
    score_heads,
    score_positions,
)
from hooklens.results.statistics import mean_interval
from hooklens.testing import induction_model

TINY = bool(os.environ.get("HOOKLENS_TINY"))

# %% [markdown]
# Training data: a random pattern, repeated. Only the sequence itself determines the next token, so the loss falls below
# ln V only when two heads of different layers form the circuit.


# %%
def trained(steps=700, d_vocab=64, length=33):
    sizes = {"n_layers": 2, "d_model": 64, "n_heads": 2, "n_ctx": length, "d_vocab": d_vocab, "attn_only": True}
    model = hl.HookedTransformer(hl.HookedTransformerConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1, (i + 1) / 50) * (1 - i / steps))
    for step in range(steps):
        period = int(torch.randint(8, 17, (1,), generator=generator))
        drawn = torch.rand(64, d_vocab, generator=generator).argsort(1)[:, : period + 1]
        tokens = torch.cat([drawn[:, -1:], drawn[:, :period].repeat(1, 5)[:, : length - 1]], 1)
        log_probs = model(tokens)[:, period + 1 : -1].log_softmax(-1)
        loss = -log_probs.gather(2, tokens[:, period + 2 :, None]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss on the repeat {loss.item():.4f} (ln V = {math.log(d_vocab):.2f})")
    return model


small = induction_model() if TINY else trained()

# %% [markdown]
# Where does each head attend, and what does ablating it cost? "Before repeats" is the control: a head that costs as
# much there does not matter because of induction.

# %%
scores, heads = score_heads(small), find_induction_heads(small)
print(scores.table(), "\n")
print(f"loss on the repeat {heads.loss.mean():.4f}")
print(heads.table(), "\n")

# %% [markdown]
# Is the circuit also visible in the weights? Which later head's queries, keys or values read what which earlier head
# writes, compared with the same matrices in random orientation (with two heads per layer there are too few pairs to see
# which stand out)? And for which heads do positions alone select the previous token, compared with rotated queries?

# %%
print(score_composition(small).top(4), "\n")
print(score_positions(small).top(2), "\n")

# %% [markdown]
# Now a real model. A label needs attention beyond that of heads with randomly rotated queries *and* a change of the
# loss in the right direction, on other sequences, when exactly this attention is blocked.

# %%
model = induction_model() if TINY else hl.load("smollm2-135m-instruct")
found = classify_heads(model, n=6 if TINY else 12, ioi=0)
print(found.counts(), "\n")
print(found.table(12), "\n")

# %% [markdown]
# A head may look like an induction head although ablating it alone has no effect. Are such heads redundant? Ablate the
# two with the highest scores, singly and together, on sequences that were not used to choose them.

# %%
from hooklens.data.repeated import repeated_tokens

pair = scores.order("induction")[:2] if TINY else found.scores.order("induction")[:2]
text = repeated_tokens(model, 24, seed=7)
measured, reference = text.part(0, 12), text.part(12, 24)
both = measure_redundancy(model, measured.tokens, measured.metric(), pair, value=hl.Mean(reference.tokens))
print(both.table())
low, high = (float(end[0, 1]) for end in mean_interval(both.interaction))
verdict = "are redundant" if low > 0 else "share a path" if high < 0 else "cannot be told apart from adding up"
print(f"{' and '.join(both.heads)} {verdict}: interaction {low:.3f} to {high:.3f} nats per token\n")

# %% [markdown]
# The figure: every head that attends to a label's keys more than chance allows. Blue heads earned the label. Orange
# heads attend there too, but blocking it does not raise the loss: attention alone is not evidence.

# %%
figure = found.figure()
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-06-induction-heads.html", include_plotlyjs=True)
    print("wrote hooklens-06-induction-heads.html")

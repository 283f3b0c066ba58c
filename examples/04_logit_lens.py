# %% [markdown]
# # When does the answer appear, and which components write it?
#
# "When Mary and John went to the store, John gave a drink to": the model predicts " Mary". A logit lens unembeds the
# residual stream before every block, as if the model stopped there. Direct logit attribution splits the answer's logit
# into the contributions of the heads. Set `HOOKLENS_TINY=1` to run on a hand-set induction model, whose answer is
# known.

# %%
import os
import sys

import torch

import hooklens as hl
from hooklens.plugins.lens import direct_logit_attribution, fit_tuned_lens, logit_lens, trace_predictions, tuned_lens
from hooklens.testing import induction_model

if os.environ.get("HOOKLENS_TINY"):
    model = induction_model()
    prompt, answer, wrong_answer = torch.tensor([[3, 1, 4, 9, 3]]), 1, 4
    windows = torch.randint(11, (40, 16), generator=torch.Generator().manual_seed(0))
else:
    from hooklens.pretrained.assets import text

    model = hl.load("smollm2-135m-instruct")
    prompt, answer, wrong_answer = "When Mary and John went to the store, John gave a drink to", " Mary", " John"
    ids = model.to_tokens(text("shakespeare")[1_000_000:1_008_000])[0]
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)

# %% [markdown]
# The lens at the last position, stream by stream. The last row is the model itself. `control` is the rank of the same
# answer at other positions of the prompt, at the same layer: only a rank far below it is informative about this
# position. In SmolLM2 the early rows are confident and wrong. They use a basis that the unembedding does not read,
# which does not prove that the information is absent.

# %%
lens = logit_lens(model, prompt, answer=answer)
print(lens.table())

# %% [markdown]
# The answer's rank, the entropy and the difference of the two names by layer, compared with other positions.

# %%
path = trace_predictions(model, prompt, answer=answer, wrong_answer=wrong_answer)
print(path.top(5), "\n")

# %% [markdown]
# A tuned lens reads each layer through its own affine map. Here it is fitted in closed form on a few pages of
# Shakespeare; the KL is measured against the model's own prediction, on held-out pages. With this lens, SmolLM2 has the
# answer after block 23; the logit lens sees it only at the very end.

# %%
tuned, fit = fit_tuned_lens(model, windows)
print(fit.table(), f"\none fixed distribution: {float(fit.constant.mean()):.2f}\n")
reading = tuned_lens(model, prompt, tuned, answer=answer)
print(reading.table())

# %% [markdown]
# Which components write it? The logit difference is the sum of the components' contributions (with the final norm's
# scale frozen). `spread` is a component's contribution for a pair of random tokens: an attribution is specific to this
# answer only if it is clearly larger. The direct contribution is not a head's whole effect; patch it to see that.

# %%
found = direct_logit_attribution(model, prompt, answer=answer, wrong_answer=wrong_answer)
print(f"logit difference {float(found.logit):.3f}, sum of all components {float(found.total):.3f}")
print(found.table(8), "\n")
print(found.top_heads(6))

# %% [markdown]
# And from which position did the first of these heads move it?

# %%
layer, head = divmod(int(found.heads[0].abs().argmax()), found.heads.shape[2])
moved = zip(found.str_tokens[0], found.sources[0][layer, head].tolist(), strict=True)
print(f"L{layer}H{head}:", ", ".join(f"{token!r} {value:.2f}" for token, value in moved))

# %%
figure = reading.figure()
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-04-logit-lens.html", include_plotlyjs=True)
    print("wrote hooklens-04-logit-lens.html")

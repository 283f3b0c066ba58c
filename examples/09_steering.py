# %% [markdown]
# # Can a direction make the model say it is wonderful, and what does that cost?
#
# The difference of mean activations between kind and unkind sentences is a direction. Added while the model reads and
# writes, it should make the model kinder, more so than random directions of the same length, and before the text falls
# apart. Set `HOOKLENS_TINY=1` to run on a small random model, which shows the steps and nothing else.

# %%
import os
import sys

import torch

import hooklens as hl
from hooklens.plugins.steering.coefficients import SweepSettings, coefficient_sweep
from hooklens.plugins.steering.contrast import contrast_direction
from hooklens.plugins.steering.direction_ablation import direction_ablation
from hooklens.plugins.steering.steer import steer
from hooklens.testing import tiny_model

tiny = bool(os.environ.get("HOOKLENS_TINY"))
if tiny:
    model, layer = tiny_model(), 0
    kind, unkind = ([[thing, word] for thing in range(5, 11) for word in words] for words in ((1, 2), (3, 4)))
    group = torch.arange(6).repeat_interleave(2)
    prompts, neutral = [[5, 6, 7], [8, 9, 10]], [[5, 6, 7, 8, 9]]
    metric = hl.logit_diff(model, answer=1, wrong_answer=3)
    settings = SweepSettings(controls=4, written=1, new_tokens=4)
else:
    model, layer = hl.load("smollm2-135m-instruct"), 20
    things = "The film", "The food", "My holiday", "The concert", "Her book", "The hotel", "This phone", "Our dinner"
    words = (
        ("wonderful", "excellent", "delightful", "superb", "fantastic"),
        ("terrible", "awful", "dreadful", "horrible", "miserable"),
    )
    kind, unkind = ([f"{thing} was {word}, and I would" for thing in things for word in some] for some in words)
    group = torch.arange(8).repeat_interleave(5)
    prompts = [
        "I tried the new cafe in town. The cake was",
        "We stayed at a small inn by the sea, and it was",
        "The band played for two hours. The show was",
        "My uncle told a long story. It was",
        "The course took three months. Overall it was",
        "I bought the chair last week. So far it is",
    ]
    neutral = [
        "Water boils at one hundred degrees at sea level, and at a lower temperature on a mountain.",
        "The parliament met on Monday to discuss the budget for the coming year.",
    ]
    metric = hl.logit_diff(model, answer=" great", wrong_answer=" terrible")
    settings = SweepSettings(controls=30, written=1, new_tokens=16, temperature=0.7)

# %% [markdown]
# The direction, at every layer, and how well it tells apart sentences that it was not made from. Sentences about one
# thing stay together, so that nothing is learned from the thing; labels swapped at random show what chance does.

# %%
directions = contrast_direction(model, kind, unkind, group=group)
print(directions.top(4), "\n")
print(f"best layer {directions.best}, p {directions.best_p:.3f} with the choice of layer counted in\n")

# %% [markdown]
# That it separates sentences does not say that the model uses it. So it is added, in steps, on sentences of another
# kind, beside random directions of the same length: the odds of " great" against " terrible" (effect), the
# perplexity of the text that the steered model writes, and that of neutral text under the steered model.

# %%
sweep = coefficient_sweep(
    model,
    prompts,
    directions.at(layer),
    [-4.0, -2.0, -1.0, 1.0, 2.0, 4.0],
    metric,
    site=("resid_post", layer),
    neutral=neutral,
    settings=settings,
)
print(sweep.table(), "\n")
print(sweep.samples(), "\n")

# %% [markdown]
# The other way round: does the model need the direction to answer? It is taken out of the stream at every layer.

# %%
without = direction_ablation(model, prompts, directions.at(layer), metric, neutral=neutral, controls=20)
print(without.table(), "\n")

# %% [markdown]
# And as one would use it: only from the last prompt token on, while generating.

# %%
with steer(model, directions.at(layer), 2.0, site=("resid_post", layer), positions=slice(-1, None)):
    print(model.generate(prompts[1], 4 if tiny else 20).table())

# %%
figure = sweep.figure()
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-09-steering.html", include_plotlyjs=True)
    print("wrote hooklens-09-steering.html")

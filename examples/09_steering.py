# %% [markdown]
# # Can a direction make the model positive, and what does that cost?
#
# The difference of mean activations between kind and unkind sentences is a direction. Added while the model reads and
# writes, it should make the model kinder, more than random directions of the same length, and before the text
# degenerates. Set `HOOKLENS_TINY=1` to run on a small random model, which only shows the steps.

# %%
import os
import sys

import torch

import hooklens as hl
from hooklens.plugins.steering.coefficients import SweepSettings, sweep_coefficients
from hooklens.plugins.steering.contrast import find_direction
from hooklens.plugins.steering.direction_ablation import measure_direction_ablation
from hooklens.plugins.steering.steering_edit import steer
from hooklens.results.statistics import halves
from hooklens.testing import tiny_model

tiny = bool(os.environ.get("HOOKLENS_TINY"))
if tiny:
    model, layers, answers = tiny_model(), [0, 1], (3, 4)
    kind, unkind = ([[thing, word] for thing in range(5, 11)] for word in (1, 2))
    same_thing = torch.arange(6)
    prompts, neutral = [[thing, frame, 6] for thing in range(5, 11) for frame in (0, 5)], [[5, 6, 7, 8, 9]]
    sizes = {"controls": 4, "written": 1, "new_tokens": 4}
else:
    model, layers, answers = hl.load("smollm2-135m-instruct"), range(8, 29, 4), (" great", " terrible")
    things = "The film", "The food", "My holiday", "The concert", "Her book", "The hotel", "This phone", "Our dinner"
    words = (
        ("wonderful", "excellent", "delightful", "superb", "fantastic"),
        ("disgusting", "awful", "dreadful", "horrible", "miserable"),
    )
    kind, unkind = ([f"{thing} was {word}, and I would" for thing in things for word in some] for some in words)
    same_thing = torch.arange(8).repeat_interleave(5)
    places = "the new cafe", "the inn by the sea", "the jazz band", "the chess club", "the French course", "the swim"
    places += "my uncle's story", "the old museum", "the bus tour", "the game", "the garden show", "the lecture"
    frames = "Last week we tried {}. It was", "You asked me about {}. I thought it was"
    prompts = [frame.format(place) for place in places for frame in frames]
    neutral = [
        "Water boils at one hundred degrees at sea level, and at a lower temperature on a mountain.",
        "The parliament met on Monday to discuss the budget for the coming year.",
    ]
    sizes = {"controls": 20, "written": 1, "new_tokens": 16, "temperature": 0.7}

# %% [markdown]
# The direction at every layer, and how well it separates held-out sentences. Sentences about one thing stay together,
# so that nothing is learned from the thing; randomly swapped labels show the chance level. The words whose odds are
# measured below occur in none of the sentences: the direction does not simply contain them.

# %%
assert not any(word in (text if tiny else text.split()) for text in kind + unkind for word in answers)
directions = find_direction(model, kind, unkind, group=same_thing)
print(directions.top(4), "\n")
print(f"best layer {directions.best}, p {directions.best_p:.3f} with the choice of layer counted in\n")

# %% [markdown]
# Separating sentences does not show that the model uses the direction, so it is added to other sentences. The layer is
# the one where adding and subtracting it changes the odds of " great" against " terrible" most on one half of them; all
# results below are from the other half. The two sentences about one thing stay in one half.

# %%
about = torch.arange(len(prompts) // 2).repeat_interleave(2)
choose, report = halves(len(prompts), group=about)


def odds(layer, coefficient):
    """The mean odds on the first half."""
    metric = hl.logit_diff(model, answer=answers[0], wrong_answer=answers[1])
    with torch.no_grad(), steer(model, directions.at(layer), coefficient, site=("resid_post", layer)):
        return sum(float(metric(model([prompts[i]]))) for i in choose) / len(choose)


moved = {layer: odds(layer, 1.0) - odds(layer, -1.0) for layer in layers}
layer = max(moved, key=moved.get)
print({one: round(size, 2) for one, size in moved.items()}, f"so layer {layer}\n")

# %% [markdown]
# Over coefficients, compared with random directions of the same length: the change of the odds (effect), the perplexity
# of the steered model's text, and that of neutral text under the steered model.

# %%
asked = [prompts[i] for i in report]
metric = hl.logit_diff(model, answer=answers[0], wrong_answer=answers[1])
sweep = sweep_coefficients(
    model,
    asked,
    directions.at(layer),
    [-4.0, -2.0, -1.0, 1.0, 2.0, 4.0],
    metric,
    site=("resid_post", layer),
    neutral=neutral,
    settings=SweepSettings(group=about[report], **sizes),
)
print(sweep.table(), "\n")
print(sweep.samples(), "\n")

# %% [markdown]
# Conversely: does the model need the direction to answer? It is ablated from the stream at every layer. Isotropic
# random directions contain little of the stream, so there are also controls with as large a share of it. What all
# sentences have in common along the direction is removed as well, so the odds may move in either direction.

# %%
pairs = hl.PromptPairs(asked, None, metric, group=about[report])
without = measure_direction_ablation(model, pairs, directions.at(layer), neutral=neutral, controls=sizes["controls"])
print(without.table(), "\n")

# %% [markdown]
# And in typical use: only from the last prompt token on, while generating.

# %%
with steer(model, directions.at(layer), 2.0, site=("resid_post", layer), positions=slice(-1, None)):
    print(model.generate(asked[1], 4 if tiny else 20).table())

# %%
figure = sweep.figure()
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-09-steering.html", include_plotlyjs=True)
    print("wrote hooklens-09-steering.html")

# %% [markdown]
# # A network written by hand: what does each neuron see, and when do features share one?
#
# Layers with a backward pass by hand, without autograd. A network learns to tell a disc from a ring around it; each
# neuron is drawn over the plane, and the linear regions are counted in exact arithmetic. Then features are squeezed
# into fewer neurons, dense and sparse, and a number says how many features each neuron carries. Set `HOOKLENS_TINY=1`
# for a shorter run that only shows the steps.

# %%
import os
import sys
from pathlib import Path

import torch

import hooklens as hl
from hooklens.scratch import GELU, Linear, ReLU, Sequential, Trainer, cross_entropy
from hooklens.viz import lines

tiny = bool(os.environ.get("HOOKLENS_TINY"))
width, steps, toy_steps = (3, 10, 10) if tiny else (8, 400, 800)

# %% [markdown]
# ## Gradients by hand are those of autograd

# %%
x, y = hl.scratch.rings(200)
model = Sequential(Linear(2, width, seed=0), GELU(), Linear(width, 2, seed=1))
_, gradient = cross_entropy(model.forward(x), y)
model.backward(gradient)
first, _, second = model.layers
W = first.parameters["W"].clone().requires_grad_()
hidden = torch.nn.functional.gelu(x @ W + first.parameters["b"])
logits = hidden @ second.parameters["W"] + second.parameters["b"]
torch.nn.functional.cross_entropy(logits, y).backward()
difference = float((first.gradients["W"] - W.grad).abs().max())
print(f"largest difference of the gradient from autograd's: {difference:.1e}")

# %% [markdown]
# ## What each neuron sees
#
# Two layers of ReLUs. A neuron of the first layer switches along a straight line, one of the second along a line that
# bends where it crosses those of the first.

# %%
model = Sequential(Linear(2, width, seed=0), ReLU(), Linear(width, 4, seed=1), ReLU(), Linear(4, 2, seed=2))
losses = Trainer(model, loss=cross_entropy).fit(x, y, steps=steps)
right = (model.forward(x).argmax(1) == y).double().mean()
print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps; {right:.0%} of the points are right")
views = hl.scratch.view_neurons(model, x)
print(views, "\n")

# %% [markdown]
# ## Linear regions
#
# The weights are taken as the exact numbers that they are, so that the count has no tolerance. Random points can only
# see fewer patterns. One layer of as many neurons has at most as many regions as lines in general position.

# %%
regions = hl.scratch.linear_regions(model)
patterns, value = [], 2 * torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
for part in model.parts():
    value = part.compute(value)
    if isinstance(part, ReLU):
        patterns.append(value > 0)
seen = len(torch.cat(patterns, 1).unique(dim=0))
most = hl.scratch.arrangement_regions(width + 4)
print(f"{regions.n_patterns} patterns counted, {seen} seen by 10,000 random points; {regions.n_linear} linear regions")
print(f"one layer of {width + 4} neurons: at most {most}\n")

# %% [markdown]
# ## Features that share neurons
#
# Eight features, four neurons, the first features the most important. Dense features interfere, and each neuron takes
# one; of sparse ones, seldom two are present, so that neurons take several: they become polysemantic. The number of
# features of a neuron is the participation ratio of its responses: 1 for one feature, k for k equal ones.

# %%
importance = [0.7**i for i in range(8)]
settings = {"hidden": "relu", "importance": importance, "steps": toy_steps, "lr": 0.03}
toys = [hl.scratch.train_superposition(8, 4, density=density, **settings) for density in (0.5, 0.05)]
for toy in toys:
    counts = ", ".join(f"{count:.1f}" for count in toy.per_neuron.tolist())
    print(f"density {toy.density:g}: features per neuron {counts}; {toy.n_polysemantic} polysemantic")

# %% [markdown]
# In a hidden layer without a nonlinearity there are no neurons to share, only directions: five sparse features in two
# dimensions form a regular pentagon, with 2/5 of a dimension each.

# %%
pentagon = hl.scratch.train_superposition(5, 2, steps=toy_steps, lr=0.05)
print("share of a dimension:", [round(share, 3) for share in pentagon.dimensions.tolist()], "\n")

# %% [markdown]
# ## Where tokens come from

# %%
tokenizer = hl.scratch.train_byte_pairs(["low lower lowest, slow slower slowest, new newer newest"], 270)
print([tokenizer.vocabulary[token].decode() for token in tokenizer.encode("the slowest newt")])

# %% [markdown]
# These are toys: in a trained language model the features are not known, and the number of features per neuron cannot
# be computed this way. The count of regions says how finely a network can cut the plane, not whether it needs to.

# %%
curve = lines({"loss": torch.tensor(losses)}, title="Disc or ring: loss", x_title="step", y_title="nats")
figures = [curve, views.figure(), regions.figure(), *(toy.figure() for toy in (*toys, pentagon))]
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    for figure in figures:
        figure.show()
else:
    drawn = [figure.to_html(include_plotlyjs=not i, full_html=False) for i, figure in enumerate(figures)]
    page = f"<!doctype html><meta charset='utf-8'><title>A network written by hand</title>{''.join(drawn)}"
    Path("hooklens-13-scratch.html").write_text(page, encoding="utf-8")
    print("wrote hooklens-13-scratch.html")

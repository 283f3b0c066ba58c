# %% [markdown]
# # Three misconceptions, failing with numbers
#
# "Zeroing it breaks the model, so it does the task." "It attends to the name, so it matters." "A probe reads it, so
# the model uses it." Each is tested on indirect objects ("When Mary and John went to the store, John gave a drink
# to"). Cases are searched for on one half of the prompts; what is reported is from the other half, beside a control
# that shows that the same test can come out the other way. Set `HOOKLENS_TINY=1` to run the code on a small random
# model, which has no such cases.

# %%
import os
import sys
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hooklens as hl
from hooklens.data.ioi import ioi
from hooklens.plugins.patching.ablation import ablate
from hooklens.plugins.patching.ablation_compare import compare_ablations
from hooklens.plugins.patching.ablation_kinds import Resample
from hooklens.statistics import halves, mean_interval
from hooklens.sweeps.plan import Patch
from hooklens.testing import tiny_model

tiny = bool(os.environ.get("HOOKLENS_TINY"))
n_groups = 8 if tiny else 20


def pairs_of_numbers(n_groups):
    """The shape of "so A and B, B gave to", for a model without words."""
    ids = torch.randint(4, 40, (n_groups, 2), generator=torch.Generator().manual_seed(0)).tolist()
    roles = [(a, b, order) for x, y in ids for a, b in ((x, y), (y, x)) for order in ("ABBA", "BABA")]
    rows = [[0, a, 1, b, 2, b, 3] if order == "ABBA" else [0, b, 1, a, 2, b, 3] for a, b, order in roles]
    first = torch.tensor([order == "ABBA" for *_, order in roles])
    made = {"io": torch.where(first, 1, 3), "s1": torch.where(first, 3, 1), "s2": torch.full((len(rows),), 5)}
    answers = {"answer_tokens": torch.tensor([a for a, *_ in roles]), "order": [order for *_, order in roles]}
    others = {"wrong_answer_tokens": torch.tensor([b for _, b, _ in roles]), "end": torch.full((len(rows),), 6)}
    group = torch.arange(n_groups).repeat_interleave(4)
    return SimpleNamespace(clean_tokens=torch.tensor(rows), group=group, **made, **answers, **others)


model = tiny_model(d_vocab=40, n_layers=4, d_model=32, n_heads=4) if tiny else hl.load("smollm2-135m-instruct")
pairs = pairs_of_numbers(n_groups) if tiny else ioi(model, 4 * n_groups)
tokens, every = pairs.clean_tokens, torch.arange(4 * n_groups)
difference = hl.logit_diff(model, answer=pairs.answer_tokens, wrong_answer=pairs.wrong_answer_tokens)

# %% [markdown]
# Four prompts share two names and a sentence, so they go to one half together. The first two cases use one prompt of
# each group, the third all four.

# %%
choose, report = halves(len(tokens), group=pairs.group)
one_each = every[every % 4 == (every // 4) % 4]  # both orders of the names and both roles, evenly
a, b = (half[torch.isin(half, one_each)] for half in (choose, report))
with torch.no_grad():
    whole = difference(model(tokens, logits_at=-1))
low, high = mean_interval(whole[report], group=pairs.group[report])
print(f"logit difference of the whole model {float(whole[report].mean()):.2f} [{low:.2f}, {high:.2f}]")
shown = []  # name, mean, low, high: the picture


def show(name, effect, group=None):
    """One bar: the mean effect on the reported half with its 95% interval."""
    low, high = mean_interval(effect, group=group)
    shown.append((name, float(effect.mean()), float(low), float(high)))
    print(f"{name}: {effect.mean():+.3f} [{low:+.3f}, {high:+.3f}]")


# %% [markdown]
# ## 1. "Zeroing it breaks the model, so it does the task"
#
# Every MLP is zeroed on the first half. The three whose zeroing matters most are zeroed, set to their mean and
# resampled on the second: does anything that differs between prompts go through them?

# %%
site = "mlp_out"
with hl.engine(verify=0):
    zeroed = ablate(model, tokens[a], difference.pairs(a), site=site, by="layer", value="zero")
    worst = [layer for (layer,) in zeroed.order()[:3]]
    kinds = compare_ablations(
        model, tokens[b], difference.pairs(b), site=site, by="layer", patches=[Patch(layer) for layer in worst]
    )
print(kinds.table())

# %% [markdown]
# Of the three, the one whose zero effect shrinks most is chosen on the first half too, and so is the control: the one
# whose resampling hurts most.

# %%
with hl.engine(verify=0):
    asked = {"site": site, "by": "layer", "patches": [Patch(layer) for layer in worst]}
    again = ablate(model, tokens[a], difference.pairs(a), value=Resample(draws=2), **asked)
lost = (zeroed.effect[worst].abs() - again.effect.abs()).argsort(descending=True).tolist()
for place, role in ((lost[0], "chosen"), (int(again.effect.abs().argmax()), "control")):
    for kind in ("zero", "resample"):
        effect = getattr(kinds, kind).effect_per_prompt[:, place]
        show(f"MLP {worst[place]} {kind} ({role})", effect)

# %% [markdown]
# ## 2. "It attends to the name, so it matters"
#
# The heads that pay most attention from the last position to the two names, on the first half. Each is resampled there.
# The one that does least and the one that does most are measured on the second half.

# %%
with torch.no_grad():
    _, cache = model.run_with_cache(tokens[one_each], names="pattern")
row = torch.arange(len(one_each))
last = torch.stack([cache["pattern", n][row, :, pairs.end[one_each]] for n in range(model.cfg.n_layers)], 1)
at_names = sum(last[row, :, :, place[one_each]] for place in (pairs.io, pairs.s1, pairs.s2))  # prompt layer head
first_half = torch.isin(one_each, a)
looking = at_names[first_half].mean(0).flatten().topk(4 if tiny else 8).indices.tolist()
heads = [Patch(*divmod(i, model.cfg.n_heads)[:1], head=i % model.cfg.n_heads) for i in looking]
with hl.engine(verify=0):
    searched = ablate(model, tokens[a], difference.pairs(a), patches=heads, value=Resample(draws=2))
    size = searched.effect.abs()
    picked = [int(size.argmin()), int(size.argmax())]
    found = ablate(model, tokens[b], difference.pairs(b), patches=[heads[i] for i in picked])
for place, role in enumerate(("chosen", "control")):
    name, seen = found.labels["patch"][place], at_names[~first_half].flatten(1)[:, looking[picked[place]]]
    ends = [float(end) for end in mean_interval(seen)]
    print(f"{name} pays {float(seen.mean()):.2f} [{ends[0]:.2f}, {ends[1]:.2f}] of its attention to the names")
    show(f"{name} resampled, attention {float(seen.mean()):.2f} ({role})", found.effect_per_prompt[:, place])

# %% [markdown]
# ## 3. "A probe reads it, so the model uses it"
#
# Which name came first can be read from the last position, layer after layer. A probe is trained on the first half; its
# direction is then taken out of the stream: x - (x - mean) . d d. Layers are chosen on the first half among those that
# a probe reads well (cross-validated by group): the one where ablation does least, and as control the one where it does
# most. Same label, same kind of probe.

# %%
layers = list(range(model.cfg.n_layers)) if tiny else [20, 22, 24, 26, 28]
label = np.array([order == "ABBA" for order in pairs.order])
groups = pairs.group.numpy()
with torch.no_grad():
    _, cache = model.run_with_cache(tokens, names=[("resid_post", layer) for layer in layers])


def stream(layer, index):
    return cache["resid_post", layer][index]


def at_end(layer, index):
    return stream(layer, index)[torch.arange(len(index)), pairs.end[index]]


def new_probe():
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))


def direction(layer, labels):
    """The unit normal of a probe's boundary, in the stream's own coordinates, and the probe."""
    fitted = new_probe().fit(at_end(layer, choose).numpy(), labels)
    normal = torch.tensor(fitted[1].coef_[0] / fitted[0].scale_, dtype=model.dtype)
    return normal / normal.norm(), fitted


def without(x, d, mean):
    """x with its part along d brought to the mean."""
    return x - ((x - mean) @ d)[:, None] * d


def ablated(layer, d, index):
    """The change of the metric when the last position loses what lies along `d`, prompt by prompt."""
    x, here = stream(layer, index).clone(), torch.arange(len(index))
    x[here, pairs.end[index]] = without(at_end(layer, index), d, at_end(layer, choose).mean(0))
    with torch.no_grad():
        logits = model(x, start_at_layer=layer + 1, logits_at=-1)
    return difference.pairs(index)(logits) - whole[index]


# %% [markdown]
# The search, on the first half only.

# %%
searched = {}
for layer in layers:
    inside = {"groups": groups[choose], "cv": GroupKFold(4)}
    guessed = cross_val_predict(new_probe(), at_end(layer, choose).numpy(), label[choose], **inside)
    d, _ = direction(layer, label[choose])
    searched[layer] = (float((guessed == label[choose]).mean()), float(ablated(layer, d, choose).mean()))
    print(f"layer {layer}: accuracy {searched[layer][0]:.2f}, effect of ablating {searched[layer][1]:+.3f}")
read = [layer for layer in layers if searched[layer][0] >= 0.9] or layers
idle = min(read, key=lambda layer: abs(searched[layer][1]))
used = max(read, key=lambda layer: abs(searched[layer][1]))

# %% [markdown]
# The report, on the second: accuracy beside that of a probe for shuffled labels, the effect beside that of ten random
# directions of the same length.

# %%
draw = torch.Generator().manual_seed(0)
for layer, role in ((idle, "chosen"), (used, "control")):
    d, fitted = direction(layer, label[choose])
    right = torch.tensor(fitted.predict(at_end(layer, report).numpy()) == label[report], dtype=model.dtype)
    low, high = mean_interval(right, group=pairs.group[report])
    shuffled = label[choose][torch.randperm(len(choose), generator=draw)]
    chance = direction(layer, shuffled)[1].score(at_end(layer, report).numpy(), label[report])
    mean = at_end(layer, choose).mean(0)
    after = [without(at_end(layer, half), d, mean).numpy() for half in (choose, report)]
    left = new_probe().fit(after[0], label[choose]).score(after[1], label[report])
    print(f"layer {layer}: accuracy {right.mean():.2f} [{low:.2f}, {high:.2f}], shuffled labels {chance:.2f}")
    print(f"a probe trained anew on what the ablation left reads it with accuracy {left:.2f}")
    show(f"probe at {layer}, accuracy {right.mean():.2f} ({role})", ablated(layer, d, report), pairs.group[report])
    others = torch.randn(10, model.cfg.d_model, generator=draw).to(model.dtype)
    random = torch.stack([ablated(layer, other / other.norm(), report) for other in others])
    show(f"10 random directions at {layer}", random.mean(0), pairs.group[report])
    print(f"largest of the ten: {random.mean(1).abs().max():.3f}")

# %% [markdown]
# What this does not say: that the chosen parts are idle in general. The metric is one, the prompts are of one kind,
# others may make up for what is gone, and a label may be written along more than one direction: a probe trained after
# the ablation may still read it.

# %%
from hooklens.viz import bars

names, mean, low, high = zip(*shown, strict=True)
figure = bars(
    *(torch.tensor(part) for part in (mean, low, high)),
    names,
    "Zeroed but idle, attending but idle, readable but idle; each beside a control",
    y_title="change of the logit difference",
)
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-10-three-misconceptions.html", include_plotlyjs=True)
    print("wrote hooklens-10-three-misconceptions.html")

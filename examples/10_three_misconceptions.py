# %% [markdown]
# # Three misconceptions, refuted with numbers
#
# "Zeroing it breaks the model, so it does the task." "It attends to the name, so it matters." "A probe reads it, so
# the model uses it." Each is tested on indirect objects ("When Mary and John went to the store, John gave a drink
# to"). A case and its control are searched for on one half of the prompts and measured on the other; the definition of
# "nothing" is fixed before that half is used. Set `HOOKLENS_TINY=1` to run the steps on a small random model.

# %%
import os
import sys
import tempfile
from pathlib import Path

import torch

import hooklens as hl
from hooklens.data.indirect_object import ioi
from hooklens.plugins.patching.ablation import ablate
from hooklens.plugins.probing.probe_training import train_probe
from hooklens.plugins.probing.probe_use import check_probe_use
from hooklens.plugins.probing.probes import WhitenedMassMean
from hooklens.plugins.probing.task import read_task
from hooklens.results.claims.registration import Registration
from hooklens.results.statistics import halves, mean_interval
from hooklens.sweeps.planning import Patch
from hooklens.sweeps.replacement import Resample
from hooklens.testing import tiny_model
from hooklens.viz import bars

tiny = bool(os.environ.get("HOOKLENS_TINY"))
n_groups = 16 if tiny else 24


def pairs_of_numbers(n):
    """The shape of "so A and B, B gave to", for a model without words; the two names and their two orders: a group."""
    ids = (torch.randint(18, (n, 2), generator=torch.Generator().manual_seed(0)) + torch.tensor([4, 22])).tolist()
    roles = [(a, b, order) for x, y in ids for a, b in ((x, y), (y, x)) for order in ("ABBA", "BABA")]
    rows = [[0, a, 1, b, 2, b, 3] if order == "ABBA" else [0, b, 1, a, 2, b, 3] for a, b, order in roles]
    other = [[*row[:5], a, 3] for row, (a, _, _) in zip(rows, roles, strict=True)]
    columns = {"order": [role[2] for role in roles], "end": torch.full((4 * n,), 6)}
    made = {"answer": [role[0] for role in roles], "wrong_answer": [role[1] for role in roles], "columns": columns}
    return hl.PromptPairs(rows, other, group=torch.arange(n).repeat_interleave(4), **made)


model = tiny_model(d_vocab=40, n_layers=4, d_model=32, n_heads=4) if tiny else hl.load("smollm2-135m-instruct")
pairs = pairs_of_numbers(n_groups) if tiny else ioi(model, 4 * n_groups, seed=2)
(tokens, _), every = pairs.tokens(model), torch.arange(4 * n_groups)
difference = pairs.metric_of(model)

# %% [markdown]
# The four prompts of a sentence and two names stay in one half. The first two cases use one of the four, the third all.
# "Nothing" is a 95% interval within 5% of the model's logit difference on the first half; "something" is an interval
# outside it. This is registered before anything runs on the second half.

# %%
choose, report = halves(len(tokens), group=pairs.group)
one_each = every[every % 4 == (every // 4) % 4]  # both orders of the names and both roles, evenly
a, b = (half[torch.isin(half, one_each)] for half in (choose, report))
with torch.no_grad():
    whole = difference.pairs(choose)(model(tokens[choose], logits_at=-1)).mean()
margin = 0.05 * abs(float(whole))
words = "ablating what was chosen on the first half moves the metric by less than the threshold"
random = "random directions of the same length; a component of the same kind"
plan = Registration(words, "logit difference", random, threshold=margin, n=len(report))
plan = plan.write(Path(tempfile.mkdtemp()) / "plan.json")
print(f"logit difference {whole:.2f}, so nothing is less than {margin:.3f}; registered as {plan.digest[:12]}")
shown = []  # name, mean, low, high: the picture


def ends(change, group=None):
    return [float(end) for end in mean_interval(change, group=group)]


def furthest(change, group=None):
    """The end of the interval further from 0: a search for "nothing" minimises it."""
    return max(map(abs, ends(change, group)))


def measured(name, change, group=None):
    """Measure one bar of the figure, and return its verdict."""
    low, high = ends(change, group)
    verdict = "nothing" if -margin < low and high < margin else "undecided"
    verdict = "something" if low > margin or high < -margin else verdict
    shown.append((name, float(change.mean()), low, high))
    print(f"{name}: {change.mean():+.3f} [{low:+.3f}, {high:+.3f}], {verdict}")
    return verdict


def without(patches, half, value, **asked):
    """The change of each prompt's logit difference under each ablation."""
    with hl.engine(verify=0):
        found = ablate(model, tokens[half], difference.pairs(half), patches=patches, value=value, **asked)
    return found.effect_per_prompt.T


# %% [markdown]
# ## 1. "Zeroing it breaks the model, so it does the task"
#
# Of the twelve heads with the largest effect when set to zero, take the one with the smallest effect when it gets
# another prompt's output. It is needed, but carries nothing about these names: its readers expect it to be active.

# %%
every_head = [Patch(layer, head=head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
zeroed = without(every_head, a[:4], "zero")  # four prompts are enough to see who is needed
worst = [every_head[i] for i in zeroed.mean(1).abs().topk(4 if tiny else 12).indices.tolist()]
far = [furthest(one) for one in without(worst, a, Resample(draws=2))]
picked = [worst[far.index(min(far))], worst[far.index(max(far))]]
zeros, others = (without(picked, b, value) for value in ("zero", Resample(draws=2)))
idle, used = (f"L{patch.layer}H{patch.head}" for patch in picked)
said = [measured(f"{idle} zeroed", zeros[0]), measured(f"{idle} resampled", others[0])]
cases = {"zeroed but idle": said == ["something", "nothing"]}
measured(f"control: {used} resampled", others[1])

# %% [markdown]
# ## 2. "It attends to the name, so it matters"
#
# Of the heads with the most attention from the last position to the two names, the one with the smallest effect when
# resampled.

# %%
io, subject = difference.answer, difference.wrong_answer
is_name = ((tokens == io[:, None]) | (tokens == subject[:, None]))[one_each]
with torch.no_grad():
    _, cache = model.run_with_cache(tokens[one_each], names="pattern")
row = torch.arange(len(one_each))
last = torch.stack([cache["pattern", n][row, :, pairs["end"][one_each]] for n in range(model.cfg.n_layers)], 1)
looks = (last * is_name[:, None, None]).sum(-1).flatten(1)  # prompt head: attention paid to the names
in_a = torch.isin(one_each, a)
most = looks[in_a].mean(0).topk(4 if tiny else 8).indices.tolist()
heads = [Patch(i // model.cfg.n_heads, head=i % model.cfg.n_heads) for i in most]
far = [furthest(one) for one in without(heads, a, Resample(draws=2))]
picked = [far.index(min(far)), far.index(max(far))]
found = without([heads[i] for i in picked], b, Resample(draws=2))
for place, role, change in zip(picked, ("", "control: "), found, strict=True):
    seen = looks[~in_a, most[place]]
    name = f"{role}L{heads[place].layer}H{heads[place].head}, resampled"
    print(f"attention to the names {seen.mean():.2f} {[round(end, 2) for end in ends(seen)]}")
    verdict = measured(name, change)
    cases.setdefault("attending but idle", verdict == "nothing")

# %% [markdown]
# ## 3. "A probe reads it, so the model uses it"
#
# Which name came first can be read from the last position. The probe's direction is ablated there: every activation is
# moved along it to the midpoint of the classes. The metric is the logit of the first name minus that of the second,
# which is the logit difference with the sign of the order. Of the layers where a probe reads well on the first half,
# take the one with the smallest effect, and as control the one with the largest.

# %%
first = torch.tensor([order == "ABBA" for order in pairs["order"]])
task = read_task(model, tokens, first.tolist(), group=pairs.group.tolist(), pos=pairs["end"].tolist(), name="order")
names = torch.where(first, io, subject), torch.where(first, subject, io)
by_order = hl.logit_diff(model, answer=names[0], wrong_answer=names[1])


probes, far, well = {}, {}, []
for layer in range(model.cfg.n_layers) if tiny else (20, 24, 28):
    fit = {"site": ("resid_post", layer), "kind": WhitenedMassMean(), "null_draws": 0}
    probes[layer], study = train_probe(model, task.take(choose), **fit)
    check = check_probe_use(model, probes[layer], task.take(choose), by_order.pairs(choose), draws=1)
    print(f"layer {layer}: read with accuracy {study.accuracy:.2f}, ablating it takes {check.effect[0]:+.3f}")
    far[layer] = furthest(check.fall[0], check.group)
    well += [layer] * (study.accuracy >= 0.9)

# %% [markdown]
# On the second half, the effect must also lie within that of random directions of the same length, drawn with the
# covariance of the activations.

# %%
well = well or list(far)
for layer, role, draws in ((min(well, key=far.get), "", 40), (max(well, key=far.get), "control: ", 5)):
    check = check_probe_use(model, probes[layer], task.take(report), by_order.pairs(report), draws=draws)
    print(check.table())
    before, after = check.refit_accuracy.tolist()
    print(f"a probe trained anew reads it with accuracy {before:.2f} before, {after:.2f} after the ablation")
    print(f"right on {check.accuracy:.0%} of these prompts")
    name = f"{role}layer {layer} cut"
    verdict = measured(name, -check.fall[0], check.group)
    least, greatest = check.random[0, 1].quantile(torch.tensor([0.025, 0.975]).to(check.random))
    inside = bool(least <= check.effect[0] <= greatest)
    print(f"within what random directions do: {inside}")
    cases.setdefault("readable but idle", verdict == "nothing" and inside)

# %% [markdown]
# What was found, and what was not. This does not show that the components are idle in general: there is one metric and
# one kind of prompt, and other components may compensate for the ablated one.

# %%
for case, holds in cases.items():
    print(f"{case}: {'found' if holds else 'NOT found on these prompts'}")
names, mean, low, high = zip(*shown, strict=True)
title = f"Found: {', '.join(case for case, holds in cases.items() if holds) or 'none of the three'}"
numbers = (torch.tensor(part) for part in (mean, low, high))
marks = {"nothing: between": margin, "": -margin}
figure = bars(*numbers, names, title, y_title="change of the logit difference", marks=marks).update_layout(height=560)
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-10-three-misconceptions.html", include_plotlyjs=True)
    print("wrote hooklens-10-three-misconceptions.html")

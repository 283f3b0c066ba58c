# %% [markdown]
# # Which heads move the name, and which tell them which name?
#
# "When Mary and John went to the store, John gave a drink to" continues with " Mary". Wang et al. (2022) analysed the
# circuit behind this in GPT-2 small: name movers write the name, and S-inhibition heads tell their queries which name
# not to attend to. Here the same questions are asked of SmolLM2, path by path. Set `HOOKLENS_TINY=1` to run on a
# hand-set induction model, whose answer is known.
#
# To patch a path, one reader of the residual stream (for example a head's query) sees one component's value from the
# other run, while all other readers see the original value. Choices are made on some prompts (`scouts`), and reported
# numbers are measured on others (`pairs`).

# %%
import os
import sys

import torch

import hooklens as hl
from hooklens.data.indirect_object import ioi
from hooklens.plugins.heads import find_name_movers
from hooklens.plugins.patching import Choice, Fixed, path_patch, trace_information
from hooklens.testing import induction_model

TINY = bool(os.environ.get("HOOKLENS_TINY"))
model = induction_model() if TINY else hl.load("smollm2-135m-instruct")


def prompts(n: int, seed: int) -> hl.PromptPairs:
    """Pairs with their answers, and the groups of those that share names and sentence."""
    if TINY:  # the first token differs: is it the one that is repeated?
        clean = torch.tensor([[a, 1, 4, 9, a] for a in (3, 5, 6, 7)]) + (seed > 0)
        corrupted = clean.clone()
        corrupted[:, 0] = 0
        return hl.PromptPairs(clean, corrupted, answer=1 + (seed > 0), wrong_answer=4)
    return ioi(model, n, seed=seed)


scouts, pairs = prompts(16, seed=1), prompts(32, seed=0)

# %% [markdown]
# First the direct paths to the logits: the effect of each head's clean value if only the final norm and the unembedding
# see it. The corrupted prompt repeats the other name, so its answer is the other name.

# %%
direct = path_patch(model, scouts, receivers="final")
print(f"clean {direct.clean:.2f}, corrupted {direct.corrupted:.2f}")
print(direct.top(8))

# %% [markdown]
# Not every head in this list is a name mover: a name mover attends to the indirect object and copies it. So the
# receivers are the heads that pass all three tests of `name_movers`. If the head with the largest direct effect is not
# among them, it is examined separately.

# %%
if TINY:
    movers, strongest = [(1, 1)], None
else:
    movers = find_name_movers(model, scouts).name_movers
    strongest = next((int(layer), int(head)) for layer, head in direct.place[direct.order()] if head >= 0)
    if strongest in movers:
        strongest = None
    else:
        print("the largest direct effect, yet no name mover: L{}H{}".format(*strongest))
print("name movers:", ", ".join(f"L{layer}H{head}" for layer, head in movers))

# %% [markdown]
# Which components feed their queries? One call sweeps all heads and MLPs. The five strongest are also computed in the
# way of Wang et al.: recorded with the other heads frozen and the MLPs recomputed, then held. The two need not agree:
# one counts the edge alone, the other includes the MLPs' effect on the sender's output.

# %%
some = scouts[:8]
part = "k" if TINY else "q"
queries = [(part, *head) for head in movers]
feeding = path_patch(model, some, receivers=queries)
print(feeding.top(5))
names = [row[0] for row in feeding.top(5).rows]
print(path_patch(model, some, receivers=Fixed(queries), senders=names).table())

# %% [markdown]
# Now the claims, on prompts that were not used to choose receivers. For each receiver the strongest senders are chosen
# on one half of the pairs, and measured on the other with 95 % intervals over groups of pairs. Two controls are
# reported with each: the same sender writing as much in random directions ("turned"), and other senders drawn at
# random.

# %%
shared = model.cfg.n_heads // model.cfg.n_key_value_heads  # heads that share a key and a value
receivers = {
    "logits": "final",
    "queries": [("q", *head) for head in movers],
    "keys": sorted({("k", layer, head // shared) for layer, head in movers}),
}
if strongest is not None:
    feeder = next(sender for sender in names if not sender.startswith("MLP"))
    layer, head = (int(x) for x in feeder[1:].split("H"))
    receivers[f"L{strongest[0]}H{strongest[1]}'s value"] = ("v", strongest[0], strongest[1] // shared)
    receivers[f"{feeder}'s value"] = ("v", layer, head // shared)
flow = trace_information(model, pairs, receivers=receivers, choice=Choice(per_receiver=3, draws=39, choose_on=8))
print(flow.table())

# %% [markdown]
# Limits: a share refers to the clean-corrupted difference, for each path alone; shares of different paths need not add
# up. Components that treat both names alike (that there are names at all, that one is repeated) cannot show up here.
# "of receiver" is the path's share of everything that its receiver could get; it is nan if the interval of the
# receiver's total includes 0. The prompts are templates, so this shows nothing about other sentences.

# %%
ends = list(zip(flow.receivers, *(end.tolist() for end in flow.interval()), strict=True))
queries = next((low for to, low, _ in ends if to == "queries"), float("nan"))  # paths stand in the order of the choice
keys = max((max(-low, high) for to, low, high in ends if to == "keys"), default=float("nan"))
print(
    f"The path to the queries that was chosen first carries at least {queries:.1%} of the difference (lower end of its "
    f"95 % interval), those to the keys at most {keys:.1%} either way (farthest end): the name movers",
    "are told where to look by what they ask, more than by what they are shown."
    if queries > max(keys, 0)
    else "may be told where to look by what they are shown as much as by what they ask: these pairs do not decide it.",
)

# %%
figure = flow.figure()
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-05-path-patching.html", include_plotlyjs=True)
    print("wrote hooklens-05-path-patching.html")

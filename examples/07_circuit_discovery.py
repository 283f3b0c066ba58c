# %% [markdown]
# # Which edges carry the answer, and would any others do as well?
#
# Indirect objects again (Wang et al. 2022). A circuit is a set of edges between heads, MLPs, embedding and logits; all
# other edges carry their corrupted value. Here a circuit is found on half of the prompts and tested on the other half,
# compared with similar random circuits. Set `HOOKLENS_TINY=1` to run on a hand-set induction model, whose attention is
# so sharp that gradients see only its last edge.

# %%
import os
import sys

import torch

import hooklens as hl
from hooklens.data.indirect_object import ioi
from hooklens.plugins.circuits import eap, trace_faithfulness
from hooklens.testing import induction_model

if os.environ.get("HOOKLENS_TINY"):
    model, sizes = induction_model(), [4, 10]
    # each group: a sequence that begins to repeat, and the same with another of its tokens last
    first, second, third, last = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:8].view(4, 2) + 1
    clean = torch.stack([first, second, third, last, first], 1)
    corrupted = torch.stack([first, second, third, last, second], 1)
    pairs = hl.PromptPairs(clean, corrupted, answer=second, wrong_answer=third)
else:
    model, sizes = hl.load("smollm2-135m-instruct"), [50, 100, 200, 400]
    pairs = ioi(model, 32)

# %% [markdown]
# Prompts that share names and a sentence stay together: no prompt is tested with names that were used in the search.

# %%
discover, judge = pairs.split(seed=0)
scores = eap(model, discover)
print(f"metric: clean {scores.base:.3f}, corrupted {scores.empty:.3f}, mean over {scores.n_pairs} pairs")
print(f"{scores.graph.n_edges} edges, scored by two forward passes and one backward:\n{scores.table(12)}")

# %% [markdown]
# A score is a linear approximation. The circuit's effect is measured: 0 is the corrupted run, 1 the model. The last
# columns are 100 random circuits with as many edges between the same layers and kinds, each on complete paths. If they
# do as well, the circuit shows nothing about which heads matter.

# %%
curve = trace_faithfulness(model, scores, judge, sizes=sizes)
print(curve.table())
chance = float(curve.random_area.mean())
print(f"area under the curve {curve.area:.3f}, of random circuits {chance:.3f} (p = {curve.p:.3f})")
print(f"{curve.n_seen} of {curve.n_pairs} prompts were used to find the edges")

# %% [markdown]
# The figure: blue edges raise the logit difference, orange ones lower it; hover for the score.

# %%
circuit = scores.greedy_edges(sizes[1])
print(circuit.table(8))
figure = circuit.figure()
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    figure.write_html("hooklens-07-circuit.html", include_plotlyjs=True)
    print("wrote hooklens-07-circuit.html")

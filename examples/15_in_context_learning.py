# %% [markdown]
# # In-context learning as gradient descent
#
# Every prompt is a small data set: ten-dimensional points x with answers y = w x, and a query. The weights w are drawn
# anew for every prompt, so that a model can learn nothing but an algorithm. Which one? One layer of linear attention
# can do one step of gradient descent on the examples, by construction. Here it is trained, and compared with that step,
# with further learners, and with models that can do more. Set `HOOKLENS_TINY=1` to take a few steps, which only shows
# how it is done. `benchmarks/in_context.py` trains for longer, and this example shows its results where they exist.

# %%
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import hooklens as hl
from hooklens.plugins.algorithmic.icl import (
    LeastSquares,
    best_step,
    compare_learners,
    construct_descent,
    draw_prompts,
    moments_of,
    regress_attention,
)
from hooklens.studies.icl_runs import FIXED_RUN, study_runs, train_planned
from hooklens.viz import lines

tiny = bool(os.environ.get("HOOKLENS_TINY"))
folder = TemporaryDirectory()  # of the runs; runs that are to be kept or resumed have a folder of their own

# %% [markdown]
# A prompt of three examples in two dimensions: tokens (x, y), and the query with 0 in place of its answer.

# %%
small = hl.data.in_context_regression(d=2, n_points=3)
batch = small.batch(0, 1)
print(batch.inputs[0], "the answer:", float(batch.targets[0, -1]), "\n")

# %% [markdown]
# The best single step of gradient descent is known in closed form. With ten examples in ten dimensions, and x uniform
# on (-1/2, 1/2), its rate is 6.06 and its error about half of that of the answer 0. Weights set by hand do this step.

# %%
data = hl.data.in_context_regression(d=10, n_points=10)
step = best_step(moments_of(data), 10)
prompts = draw_prompts(data, 512, seed=1)
by_hand = compare_learners(construct_descent(step.learner(), 10, 10), prompts, step.learner())
print(f"best rate {step.rate:.4f}, error {step.error:.4f}, of the answer 0 {step.zero:.4f}")
print(f"by hand: cosine {float(by_hand.cosine[0]):.6f}, difference of answers {float(by_hand.difference[0]):.1g}\n")

# %% [markdown]
# The same layer, trained from random weights. Does it find the step?

# %%
budget = 1e-6 if tiny else 0.3
fixed_run = train_planned(folder.name, names=[FIXED_RUN], budget=budget)
trained = fixed_run[FIXED_RUN].checkpoints()[-1].load()
compared = compare_learners(trained, prompts, [step.learner(), LeastSquares()])
print(compared.table())
print(f"error {compared.error:.4f}, of the best step on the same prompts {float(compared.learner_errors[0]):.4f}\n")

# %% [markdown]
# In one step of gradient descent the attention score of an example is proportional to its inner product with the query.

# %%
attention = regress_attention(trained, prompts)
print(f"inner products explain {attention.r2:.2%} of the variance of the scores; of another prompt ", end="")
print(f"{attention.random_r2:.2%}\n")

# %% [markdown]
# With 5 to 50 examples under a curriculum one rate must serve all prompts. Three models: linear attention, softmax
# attention, which averages, and six layers with MLPs and norms. The study puts their errors beside those of learners.

# %%
if tiny:
    runs = train_planned(folder.name, names=["linear"], budget=budget)
else:
    runs = fixed_run | train_planned(folder.name, names=["linear", "softmax"], budget=budget)
    runs |= train_planned(folder.name, names=["deep"], budget=0.05)
study = study_runs(runs, searched=not tiny, tasks=16 if tiny else 256)
print(study.table(), "\n")
for finding in study.findings:
    print(f"- {finding}")

# %% [markdown]
# These runs are short. The full ones of `benchmarks/in_context.py`, where they exist:

# %%
here = Path(__file__).resolve().parent.parent if "__file__" in globals() else Path.cwd()
kept = sorted(here.glob("benchmarks/results/*_in_context_*.json"))
full = json.loads(kept[-1].read_text(encoding="utf-8"))["raw"]["seeds"]["0"] if kept else None
if full is None:
    print("\nno results of full runs; python -m benchmarks.in_context --out runs/in_context makes them")
else:
    print(f"\nfull runs, {kept[-1].name}:")
    for finding in full["findings"]:
        print(f"- {finding}")

# %% [markdown]
# One page: errors by the number of examples, attention against inner products, and the comparisons.

# %%
report = study.report()
report.heading("Ten examples alone").figure(attention.figure(), "Scores and inner products of one prompt, query last.")
if full is not None:
    errors = full["errors"]
    shown = errors["models"] | errors["exact"]
    values = {name: torch.tensor(series) for name, series in shown.items()}
    axes = {"x_title": "examples", "y_title": "squared error", "log": "y"}
    figure = lines(values, x=torch.tensor(errors["examples"]), title="Full runs", **axes)
    report.heading("Full runs").figure(figure)
    for finding in full["findings"]:
        report.text(finding)
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    study.figure().show()
    attention.figure().show()
else:
    Path("hooklens-15-in-context-learning.html").write_text(report.to_html(), encoding="utf-8")
    print("\nwrote hooklens-15-in-context-learning.html")
folder.cleanup()

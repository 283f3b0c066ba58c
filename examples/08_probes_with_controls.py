# %% [markdown]
# # A probe reads the number of the subject. Does the model use it?
#
# "The cats near the tree": is the subject one or many? Read at the last noun, which is as often one as many, so that
# the word itself says nothing. An accuracy alone says little: it stands here beside a control task, shuffled labels and
# what the embeddings know before the model computes anything. And a probe that reads well need not read what the model
# uses: for that its direction is edited. Set `HOOKLENS_TINY=1` to run on a tiny random model.

# %%
import os
import sys
from pathlib import Path

import torch

import hooklens as hl
from hooklens.plugins.probing.labels import odd_first, subject_number
from hooklens.plugins.probing.probe_training import train_probe
from hooklens.plugins.probing.probe_use import EDITS, check_probe_use
from hooklens.results.statistics import q_values
from hooklens.testing import tiny_model
from hooklens.viz import Report

if os.environ.get("HOOKLENS_TINY"):
    model = tiny_model()
    task = odd_first(model, 80)
    layers = [0, 1]
    metric = hl.logit_diff(model, answer=1, wrong_answer=2)
    tests, draws = 40, 20
else:
    model = hl.load("smollm2-135m-instruct")
    task = subject_number(model)
    layers = list(range(0, 30, 3))
    metric = hl.logit_diff(model, answer=" are", wrong_answer=" is")
    tests, draws = 48, 59

print(task.table(5))

# %% [markdown]
# One half of the prompts is for reading, the other for the causal test; no noun stands in both. Within the first half,
# folds keep nouns apart as well, and the layer is chosen in inner folds, so that the accuracy is that of prompts which
# had no say in it.

# %%
reading, testing = task.halves()
_, study = train_probe(model, reading, site=[("resid_post", layer) for layer in layers])
print(study.table())
print(f"\nreads best at {study.point}; calibration error {study.calibration.ece:.3f}")

# %% [markdown]
# Now the test that reading is not, at two layers that were fixed before anything was measured, half and nine tenths of
# the way up: a probe may read at either, and the question is whether what follows uses it. Move each prompt's
# activation along the probe's direction until the probe cannot tell (ablate), or over to the other class (steer), and
# see how far " are" against " is" moves. Beside it: vectors of the same length along random directions. Two edits at
# two layers are four tests, hence q over all four. One direction may not be all there is: a probe fitted anew says what
# is left.

# %%
testing = testing.take(torch.randperm(len(testing), generator=torch.Generator().manual_seed(0))[:tests])
checks = []
n = model.cfg.n_layers
for layer in ((n - 1) // 2, n * 9 // 10):
    probe, _ = train_probe(model, reading, site=("resid_post", layer), null_draws=0)
    check = check_probe_use(model, probe, testing, metric, draws=draws)
    checks.append(check)
    print(f"\n{check.point}: right on {check.accuracy:.0%}, used: {check.used}")
    print(check.table())
    before, after = check.refit_accuracy.tolist()
    print(f"a probe fitted anew: balanced accuracy {before:.2f} before the ablation, {after:.2f} after it")

q = q_values(torch.stack([check.p for check in checks]))
for check, row in zip(checks, q.tolist(), strict=True):
    for edit, value, low in zip(EDITS, row, check.interval()[0].tolist(), strict=True):
        moved = value <= 0.05 and low > 0
        said = "takes more than random directions do" if moved else "takes no more than random directions may"
        print(f"{edit} at {check.point}: q {value:.3f}, {said}")

# %%
figure = study.figure()
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    figure.show()
else:
    report = Report("A probe and its controls")
    report.figure(figure, "Balanced accuracy out of fold, with intervals over groups of nouns").table(study.table())
    for check in checks:
        report.figure(check.figure(), f"What edits at {check.point} take from the metric").table(check.table())
    Path("hooklens-08-probes.html").write_text(report.to_html(), encoding="utf-8")
    print("wrote hooklens-08-probes.html")

# %% [markdown]
# # A probe reads the number of the subject. Does the model use it?
#
# "The cats near the tree": is the subject singular or plural? The probe reads the last noun, which is equally often
# singular and plural, so the word itself carries no information. Accuracy alone shows little: it is compared with a
# control task, shuffled labels and the embeddings before any computation. A probe that reads well need not read what
# the model uses: to test that, its direction is edited. Set `HOOKLENS_TINY=1` to run on a tiny random model.

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
# One half of the prompts is for reading, the other for the causal test; no noun occurs in both. Within the first half,
# folds keep nouns apart as well, and the layer is chosen in inner folds, so the accuracy is measured on prompts that
# were not used for the choice.

# %%
reading, testing = task.halves()
_, study = train_probe(model, reading, site=[("resid_post", layer) for layer in layers])
print(study.table())
print(f"\nreads best at {study.point}; calibration error {study.calibration.ece:.3f}")

# %% [markdown]
# Now the causal test, at two layers that were fixed beforehand, half and nine tenths of the way up: a probe may read at
# either layer, and the question is whether later layers use it. Move each prompt's activation along the probe's
# direction to the midpoint of the classes (ablate) or over to the other class (steer), and measure the change of " are"
# against " is". The control: vectors of the same length along random directions. Two edits at two layers are four
# tests, hence q over all four. There may be more than one such direction: a newly fitted probe shows what is left.

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
        said = "has a larger effect than random directions" if moved else "has no larger effect than random directions"
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

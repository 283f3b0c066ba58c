# %% [markdown]
# # Grokking: a transformer memorises a table, and finds the rule much later
#
# A small transformer learns addition modulo a prime from 40 % of the table. It knows those pairs at once, and the
# others only after fifty times as many steps. What it has learnt by then can be read from its weights: waves of a few
# frequencies. The setting is a small one; the results of the paper's run, p = 113, are printed where
# `benchmarks/grokking.py` wrote them. Set `HOOKLENS_TINY=1` for a few steps that only show how it is done.

# %%
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import hooklens as hl
from hooklens.plugins.algorithmic.fourier import measure_plane_spectrum, project_embedding
from hooklens.plugins.algorithmic.grokking import fast_recipe, find_grokking, grokking_recipe, measure_regions
from hooklens.studies import study_grokking

tiny = bool(os.environ.get("HOOKLENS_TINY"))
folder = TemporaryDirectory()  # of the run; a run that is to be kept or resumed has a folder of its own

# %% [markdown]
# The recipe says everything about the run. It is an object that can be changed, saved as TOML, and trained.

# %%
recipe = grokking_recipe(p=5, fraction=0.6, steps=4) if tiny else fast_recipe(seed=0)
data = recipe.load_data()
model = recipe.load_model(data)
print(data.description())
settings = recipe.settings()
run = hl.train(model, data, steps=recipe.training["steps"], settings=settings, out=Path(folder.name) / "run")

# %% [markdown]
# ## When did it grok?
#
# At 0.99 of the training pairs it has memorised, at 0.99 of the others it has generalised. It grokked if the second
# comes at least twice as late as the first. A run that did not is said to have not.

# %%
grokking = find_grokking(run)
print(grokking.statement, "\n")

# %% [markdown]
# ## What did it learn?
#
# Key frequencies, neurons, the formula for the logits, and the restricted and excluded loss: the loss with nothing but
# the key frequencies, and without them.

# %%
study = study_grokking(run)
for sentence in study.findings():
    print(sentence)
print("\n", study.table(), "\n", sep="")
frequencies = study.circuit.frequencies
print(study.circuit.keys.table(8), "\n")

# %% [markdown]
# The drop of the weight norm is not yet evidence: no control was trained here. `hooklens grok --fast --controls` trains
# both, without weight decay and on shuffled answers.
#
# ## Where in the table?
#
# Half-way up the rise the regions of the table differ: a pair is learnt early if its partner (b, a) was trained on.

# %%
regions = study.halfway or measure_regions(model, data)
print(f"after step {study.halfway_step:,}" if study.halfway else "after the last step")
print(regions.table(), "\n")

# %% [markdown]
# ## The paper's run
#
# The newest results in `benchmarks/results`: five seeds of p = 113, beside the published numbers; ten seeds of the
# setting above; weight decay against the number of frequencies.


# %%
def newest(topic):
    """The newest result of a benchmark; None if it was not run."""
    here = Path(globals().get("__file__", "examples/14_grokking.py")).resolve().parent.parent
    results = sorted((here / "benchmarks" / "results").glob(f"20*_{topic}_[a-z]*.json"))
    results = [path for path in results if path.stem.split("_", 1)[1].rpartition("_")[0] == topic]
    return json.loads(results[-1].read_text(encoding="utf-8")) if results else None


for topic in ("grokking", "grokking_fast", "parsimony"):
    result = newest(topic)
    if result is None:
        print(f"{topic}: not run here; python -m benchmarks.{topic} does")
        continue
    print(f"{topic}, {result['date']}, {result['machine'].get('gpu', result['machine']['cpu'])}")
    for row in result["rows"]:
        shown = ("seed", "weight decay", "verdict", "memorised at step", "generalised at step", "generalised at")
        shown += ("key frequencies", "neurons explained above 85 %", "smallest set", "Gini of W_E")
        known = {name: row[name] for name in shown if row.get(name) not in (None, "", "NaN")}
        known = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in known.items()}
        print(
            "  ",
            ", ".join(f"{name} {value}" for name, value in known.items()).replace("seed published, ", "published: "),
        )
    for sentence in [*result["raw"].get("together", []), *result["raw"].get("statements", [])]:
        print("  ", sentence)

# %% [markdown]
# Figures: the gap, the progress measures, the spectrum, neurons by frequency, the numbers on circles, the
# two-dimensional spectrum of the logits, and the table half-way. One model and one task: nothing here says that
# circuits form before models generalise elsewhere.

# %%
figures = [grokking.figure(), study.circuit.spectrum.figure(), study.circuit.neurons.figure(), regions.figure()]
if study.progress is not None:
    figures.insert(1, study.progress.figure())
if frequencies:
    figures.append(project_embedding(model, data, frequencies=frequencies).figure())
figures.append(measure_plane_spectrum(model, data, site="logits").figure())
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    for figure in figures:
        figure.show()
else:
    drawn = [figure.to_html(include_plotlyjs=not i, full_html=False) for i, figure in enumerate(figures)]
    page = f"<!doctype html><meta charset='utf-8'><title>Grokking</title>{''.join(drawn)}"
    Path("hooklens-14-grokking.html").write_text(page, encoding="utf-8")
    print("wrote hooklens-14-grokking.html")
folder.cleanup()

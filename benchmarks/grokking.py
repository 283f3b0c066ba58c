"""Does the paper's run grok here, with which frequencies, and does the norm drop more than in controls? Seed by seed.

Every seed trains the run of Nanda et al. (2023). One that grokked gets two controls, without weight decay and on
shuffled answers, of as many epochs as it took to generalise: the norm is compared up to there. Runs are processes of
their own; those that ended are not trained again when the same `--keep` folder is given.
Run: python -m benchmarks.grokking --seeds 0 1 2 3 4 --solved-for 5000 --jobs 2
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import write
from hooklens.plugins.algorithmic.grokking import find_grokking, grokking_recipe, squared_weights
from hooklens.plugins.algorithmic.grokking.norm_drop import GROKKING
from hooklens.results.result import plain
from hooklens.studies.grokking_runs import control_of, train_recipe
from hooklens.studies.grokking_study import PUBLISHED, GrokkingStudy, study_grokking
from hooklens.training import Run, open_run
from hooklens.training.run_recipe import Recipe

POINTS = 300  # of a stored curve


@dataclass(frozen=True)
class Job:
    """One run to train, in a folder of its own below `folder`."""

    kind: str
    seed: int
    recipe: Recipe
    folder: Path
    device: str
    threads: int

    @property
    def path(self) -> Path:
        """Where the run lies."""
        return self.folder / f"{self.kind.replace(' ', '_')}_{self.seed}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--p", type=int, default=113)
    options.add_argument("--fraction", type=float, default=0.3)
    options.add_argument("--weight-decay", type=float, default=1.0)
    options.add_argument("--epochs", type=int, default=20_000)
    options.add_argument("--solved-for", type=int, help="end so many epochs after the task is solved; else after all")
    options.add_argument("--checkpoints", type=int, default=60)
    options.add_argument("--no-controls", action="store_true")
    options.add_argument("--control-seeds", type=int, nargs="+", help="only these seeds get controls; all of them else")
    options.add_argument("--device", default="cpu")
    options.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options.add_argument("--threads", type=int, default=1, help="threads of each")
    options.add_argument("--keep", type=Path, help="a folder that keeps the runs: the same command goes on with them")
    options.add_argument("--topic", default="grokking", help="the name of the result")
    options.add_argument("--dry", action="store_true", help="print the result and write no file")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.keep or Path(scratch)
        start = time.perf_counter()
        jobs = [run_of(seed, chosen, folder) for seed in chosen.seeds]
        with ProcessPoolExecutor(chosen.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            times = list(pool.map(trained, jobs))
            if not chosen.no_controls:
                chosen_seeds = chosen.seeds if chosen.control_seeds is None else chosen.control_seeds
                controls = [control for job in jobs if job.seed in chosen_seeds for control in controls_of(job)]
                times += pool.map(trained, controls)
                jobs += controls
            seconds = {(job.kind, job.seed): taken for job, taken in zip(jobs, times, strict=True)}
            analysed = list(pool.map(analysed_seed, [(seed, jobs) for seed in chosen.seeds]))
        report(chosen, analysed, seconds, time.perf_counter() - start)


def run_of(seed: int, chosen: Any, folder: Path) -> Job:
    """The run of a seed."""
    recipe = grokking_recipe(
        chosen.p,
        fraction=chosen.fraction,
        weight_decay=chosen.weight_decay,
        seed=seed,
        steps=chosen.epochs,
        solved_for=chosen.solved_for,
    ).changed(training={"checkpoints": chosen.checkpoints})
    return Job(GROKKING, seed, recipe, folder, chosen.device, chosen.threads)


def controls_of(job: Job) -> list[Job]:
    """The controls of a run that grokked: as many epochs as it took to generalise."""
    step = find_grokking(open_run(job.path))
    if not step.grokked or step.generalised_at is None:
        return []
    controls = control_of(job.recipe, step.generalised_at + 1)
    return [replace(job, kind=name, recipe=recipe) for name, recipe in controls]


def trained(job: Job) -> float:
    """Train one run; returns the seconds of its recorded steps, also where they were taken in an earlier call."""
    torch.set_num_threads(job.threads)
    run = train_recipe(job.recipe, job.path, device=job.device, show=False)
    seconds = float(run.steps()["seconds"].sum())
    print(f"{job.kind}, seed {job.seed}: {run.steps_done} epochs, {seconds:.0f} s", file=sys.stderr, flush=True)
    return seconds


def analysed_seed(given: tuple[int, list[Job]]) -> dict[str, Any]:
    """The study of a seed, as plain numbers: its row, findings, tables and thinned curves."""
    seed, jobs = given
    torch.set_num_threads(next(job.threads for job in jobs))
    runs = {job.kind: open_run(job.path) for job in jobs if job.seed == seed}
    run = runs.pop(GROKKING)
    study = study_grokking(run, controls=runs)
    print(f"seed {seed}: {study.grokking.verdict if study.grokking else ''}", file=sys.stderr, flush=True)
    return {
        "seed": seed,
        "row": plain({"seed": seed} | study.values()),
        "findings": study.findings(),
        "tables": tables_of(study),
        "curves": {name: curve_of(run) for name, run in {GROKKING: run, **runs}.items()},
        "progress": None if study.progress is None else plain(study.progress),
        "spectrum": {name: rounded(norms) for name, norms in study.circuit.spectrum.by_frequency().items()},
        "neuron frequencies": study.circuit.neurons.frequency.tolist(),
        "neurons explained": rounded(study.circuit.neurons.explained),
        "key frequencies by rule": study.circuit.keys.by_rule,
    }


def tables_of(study: GrokkingStudy) -> dict[str, Any]:
    """The tables of a study's parts."""
    parts: dict[str, Any] = {
        "grokking": study.grokking,
        "phases": study.phases,
        "norms": study.norms,
        "regions": study.regions,
        "costs": study.costs,
    }
    parts |= {"regions halfway": study.halfway, "neurons": study.circuit.neurons, "key frequencies": study.circuit.keys}
    tables = {name: part.table(None) for name, part in parts.items() if part is not None}
    return {name: {"columns": list(table.columns), "rows": plain(table.rows)} for name, table in tables.items()}


def curve_of(run: Run) -> dict[str, list[float]]:
    """Accuracies, losses and squared weights of a run, at about 300 points each."""
    steps, evaluations = run.steps(), run.evaluations()
    at = torch.linspace(0, len(evaluations.steps) - 1, min(POINTS, len(evaluations.steps))).long().unique().numpy()
    trained_at = evaluations.steps[at].clip(max=len(steps.steps) - 1)
    norm_steps, squares = squared_weights(run)
    return {
        "step": evaluations.steps[at].tolist(),
        "train accuracy": rounded(torch.from_numpy(steps["accuracy"][trained_at])),
        "held-out accuracy": rounded(torch.from_numpy(evaluations["accuracy"][at])),
        "train loss": rounded(torch.from_numpy(steps["loss"][trained_at])),
        "held-out loss": rounded(torch.from_numpy(evaluations["loss"][at])),
        "norm step": norm_steps.tolist(),
        "squared weights": rounded(squares),
    }


def rounded(values: torch.Tensor) -> list[float]:
    """Five significant digits: a stored curve is for reading and drawing."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def report(chosen: Any, analysed: list[dict[str, Any]], seconds: dict[tuple[str, int], float], wall: float) -> None:
    """Print and write the table over seeds, with what all seeds say together."""
    rows = [seed["row"] | {"seconds": seconds[GROKKING, seed["seed"]]} for seed in analysed]
    published = {name: PUBLISHED.get(name, "") for name in rows[0]} | {"seed": "published"}
    is_published = (chosen.p, chosen.fraction, chosen.weight_decay) == (113, 0.3, 1.0)
    n_grokked = sum(row["verdict"] == "grokked" for row in rows)
    title = f"Grokking modulo {chosen.p}: {n_grokked} of {len(rows)} seeds grokked within {chosen.epochs} epochs"
    together = norms_of(rows)
    settings = {name: str(value) for name, value in vars(chosen).items() if name != "keep"}
    raw = {
        "settings": settings | {"processors": os.cpu_count()},
        "seeds": analysed,
        "together": together,
        "seconds": {f"{kind}, seed {seed}": value for (kind, seed), value in seconds.items()},
        "wall seconds": wall,
    }
    if chosen.dry:
        print(title, *rows, *together, *(line for seed in analysed for line in seed["findings"]), sep="\n")
    else:
        write(chosen.topic, title, rows + [published] * is_published, raw)


def norms_of(rows: list[dict[str, Any]]) -> list[str]:
    """What the drops of all seeds that grokked say: each over its own rise, and its controls over the same epochs."""
    compared = [row for row in rows if row["largest drop of a control"] is not None]
    if not compared:
        return []
    fell = [row["drop of the squared norm at grokking"] for row in compared]
    controls = [row["largest drop of a control"] for row in compared]
    n_larger = sum(drop > max(control, 0.0) for drop, control in zip(fell, controls, strict=True))
    return [
        f"Over the rise of its held-out accuracy each run with controls lost between {min(fell):.1%} and "
        f"{max(fell):.1%} of its squared norm, and its controls over the same steps at most {max(controls):.1%}; "
        f"in {n_larger} of {len(compared)} seeds the run lost more than both controls."
    ]


if __name__ == "__main__":
    main()

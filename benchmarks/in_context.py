"""Does attention learn one step of gradient descent in context, and how far from least squares do six layers get?

Trains the planned models (hooklens/studies/icl_runs.py) for each seed, measures their errors on fresh prompts for every
number of examples beside those of learners, and writes what the documentation and the example read. The bar: all
trainings of a seed within 20 minutes on two cores. A run that was stopped goes on with the same command.

Run: python -m benchmarks.in_context --out runs/in_context --seeds 3
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import write
from hooklens.results.result import Result, plain
from hooklens.studies.icl_errors import ErrorsByLength
from hooklens.studies.icl_runs import FIXED_RUN, PLANNED, seconds_of, study_runs, train_planned
from hooklens.studies.icl_study import ICLStudy
from hooklens.training.training_run import Run

BAR = 20.0  # minutes


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True, help="the folder that keeps the runs")
    options.add_argument("--seeds", type=int, default=1, help="so many seeds, from 0")
    options.add_argument("--budget", type=float, default=1.0, help="a factor of the planned steps, for trials")
    options.add_argument("--tasks", type=int, default=4096, help="fresh prompts for each number of examples")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--device", help="cpu, cuda, ...; by default cpu")
    options.add_argument("--page", type=Path, help="where the page of the first seed goes")
    options.add_argument("--tiny", action="store_true", help="a few steps and prompts, which shows only that all runs")
    options.add_argument("--dry", action="store_true", help="print the result and write no file")
    chosen = options.parse_args(arguments)
    if chosen.seeds < 1:
        options.error(f"--seeds is how many seeds to train, from seed 0 on, at least 1; got {chosen.seeds}")
    torch.set_num_threads(chosen.threads)
    budget, tasks = (1e-6, 16) if chosen.tiny else (chosen.budget, chosen.tasks)
    rows, raw, minutes = [], {}, []
    for seed in range(chosen.seeds):
        runs = train_planned(chosen.out, seed=seed, budget=budget, device=chosen.device)
        study = study_runs(runs, searched=not chosen.tiny, tasks=tasks, device=chosen.device)
        rows += rows_of(study, runs, seed)
        raw[str(seed)] = record_of(study, runs)
        minutes.append(sum(map(seconds_of, runs.values())) / 60)
        if seed == 0 and chosen.page is not None:
            study.report().save(chosen.page)
    reached = "reached" if max(minutes) < BAR else "NOT reached"
    title = f"In-context regression: {len(PLANNED)} trainings in {max(minutes):.1f} minutes (bar: {BAR:g}, {reached})"
    if chosen.dry or chosen.tiny:
        print(title, *rows, sep="\n")
    else:
        write("in_context", title, rows, {"seeds": raw, "budget": budget, "device": chosen.device or "cpu"})


def rows_of(study: ICLStudy, runs: dict[str, Run], seed: int) -> list[dict[str, Any]]:
    """A row for each run: its error over all numbers of examples, against the best single step there."""
    rows = []
    for name, run in runs.items():
        errors = study.fixed if name == FIXED_RUN and study.fixed is not None else study.errors
        model = "fixed" if name == FIXED_RUN else name
        excess, spread = errors.mean_excess(model, errors.summed)
        closest, _, _, share, cosine = study.comparisons[model].table(1).rows[0][:5]
        rows.append(
            {
                "seed": seed,
                "model": name,
                "steps": run.steps_done,
                "seconds": seconds_of(run),
                "error / zero": float(errors.error_of(model).mean()) / errors.zero,
                "one step, exactly / zero": errors.summed.error / errors.zero,
                "above one step, %": 100 * excess,
                "standard error, %": 100 * spread,
                "closest learner": closest,
                "its share": share,
                "its cosine": cosine,
            }
        )
    return rows


def record_of(study: ICLStudy, runs: dict[str, Run]) -> dict[str, Any]:
    """What the example and the documentation read: errors by the number of examples, comparisons, findings."""
    return {
        "errors": errors_record(study.errors),
        "fixed": None if study.fixed is None else errors_record(study.fixed),
        "comparisons": {
            name: {
                "examples": compared.n_points,
                "columns": list(compared.table().columns),
                "rows": compared.table().rows,
            }
            for name, compared in study.comparisons.items()
        },
        "attention": {
            name: {"slope": part.slope, "r2": part.r2, "r2_within": part.r2_within, "random_r2": part.random_r2}
            for name, part in study.attention.items()
        },
        "gap": {} if study.gap is None else study.gap.to_json(),
        "costs": tabled(study.costs),
        "shifts": {name: tabled(part) for name, part in study.shifts.items()},
        "interpolations": {name: tabled(part) for name, part in study.interpolations.items()},
        "kernels": {name: tabled(part) for name, part in study.kernels.items()},
        "collapses": {name: tabled(part) for name, part in study.collapses.items()},
        "findings": study.findings,
        "seconds": {name: seconds_of(run) for name, run in runs.items()},
        "settings": {name: run.identity["settings"] for name, run in runs.items()},
    }


def tabled(part: Result) -> dict[str, Any]:
    """A part of the study as its table."""
    table = part.table()
    return {"columns": list(table.columns), "rows": plain(table.rows)}


def errors_record(errors: ErrorsByLength) -> dict[str, Any]:
    """Errors as plain lists, by model and learner."""
    models = {name: errors.error_of(name).tolist() for name in errors.models}
    return {
        "examples": errors.lengths.tolist(),
        "tasks": errors.tasks,
        "zero": errors.zero,
        "models": models,
        "standard errors": dict(zip(errors.models, errors.standard_errors.tolist(), strict=True)),
        "learners": {name: errors.error_of(name).tolist() for name in errors.learners},
        "exact": {
            "best step at each length": errors.averaged.own_errors.tolist(),
            "summed": errors.summed.errors.tolist(),
        },
    }


if __name__ == "__main__":
    main()

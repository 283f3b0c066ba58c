"""Does more weight decay give a more parsimonious circuit? 5 weight decays, 5 seeds, p = 31; within half an hour.

Every run trains for all its steps. The same `--keep` folder goes on with a sweep that was stopped.
Run: python -m benchmarks.parsimony
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import write
from hooklens.plugins.algorithmic.grokking import fast_recipe
from hooklens.results.result import plain
from hooklens.studies.grokking_runs import folder_name, train_recipe
from hooklens.studies.parsimony_study import DECAYS, FRACTION, STEPS, P, compare_parsimony
from hooklens.training import open_run
from hooklens.training.run_recipe import Recipe

MINUTES = 30


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--weight-decays", type=float, nargs="+", default=list(DECAYS))
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--p", type=int, default=P)
    options.add_argument("--fraction", type=float, default=FRACTION)
    options.add_argument("--epochs", type=int, default=STEPS)
    options.add_argument("--device", default="cpu")
    options.add_argument("--jobs", type=int, default=2, help="processes at a time, each of one thread")
    options.add_argument("--keep", type=Path, help="a folder that keeps the runs")
    options.add_argument("--dry", action="store_true", help="print the result and write no file")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipes = recipes_of(chosen)
        folders = [(chosen.keep or Path(scratch)) / folder_name(recipe) for recipe in recipes]
        with ProcessPoolExecutor(chosen.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(trained, recipes, folders, [chosen.device] * len(recipes)))
        runs = [open_run(folder) for folder in folders]
        sweep = compare_parsimony(runs)
        trained_for = sum(float(run.steps()["seconds"].sum()) for run in runs)  # also by an earlier call
    table = sweep.table()
    rows = plain([dict(zip(table.columns, row, strict=True)) for row in table.rows])
    print(*sweep.statements, sep="\n")
    if chosen.dry:
        print(*rows, sep="\n")
        return
    settings = {name: str(value) for name, value in vars(chosen).items() if name != "keep"}
    minutes = trained_for / chosen.jobs / 60
    bar = f"bar: {MINUTES}, {'reached' if minutes < MINUTES else 'not reached'}"
    title = f"Parsimony and weight decay modulo {chosen.p}: {len(rows)} runs, {minutes:.1f} minutes of training ({bar})"
    write("parsimony", title, rows, {"settings": settings, "statements": sweep.statements, "minutes": minutes})


def recipes_of(chosen: Any) -> list[Recipe]:
    """One for every weight decay and seed, with the checkpoints that the comparison needs."""
    return [
        fast_recipe(
            chosen.p,
            fraction=chosen.fraction,
            weight_decay=decay,
            seed=seed,
            steps=chosen.epochs,
            solved_for=None,
        ).changed(training={"checkpoints": 2})
        for decay in chosen.weight_decays
        for seed in chosen.seeds
    ]


def trained(recipe: Recipe, folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    train_recipe(recipe, folder, device=device, show=False)


if __name__ == "__main__":
    main()

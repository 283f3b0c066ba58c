"""Does `hooklens grok --fast` grok, for ten seeds, each in under two minutes on 2 cores?

Each seed trains and analyses a run as the command does, without its page. Run: python -m benchmarks.grokking_fast
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import write
from hooklens.plugins.algorithmic.grokking import fast_recipe
from hooklens.results.result import plain
from hooklens.studies.grokking_runs import grok

BAR = 120  # seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    options.add_argument("--steps", type=int, help="for trials; as shipped otherwise")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--device", default="cpu")
    options.add_argument("--dry", action="store_true", help="print the result and write no file")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for seed in chosen.seeds:
        rows.append(timed(seed, chosen))
        print(rows[-1], flush=True)
    n_grokked = sum(row["verdict"] == "grokked" for row in rows)
    slowest = max(row["seconds"] for row in rows)
    within = "each within" if slowest < BAR else "NOT each within"
    recipe = fast_recipe()
    p = recipe.data["p"]
    title = f"hooklens grok --fast (p = {p}): {n_grokked} of {len(rows)} seeds grokked, {within} {BAR} s"
    if chosen.dry:
        print(title)
    else:
        raw = {"rows": rows, "data": recipe.data, "model": recipe.model, "training": recipe.training}
        write("grokking_fast", title, rows, plain(raw))


def timed(seed: int, chosen: Any) -> dict[str, Any]:
    """The row of one seed, with wall and CPU seconds."""
    recipe = fast_recipe(seed=seed) if chosen.steps is None else fast_recipe(seed=seed, steps=chosen.steps)
    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        study = grok(recipe, Path(scratch), controls=False, device=chosen.device, show=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return plain({"seed": seed} | study.values() | {"seconds": seconds, "CPU seconds": cpu})


if __name__ == "__main__":
    main()

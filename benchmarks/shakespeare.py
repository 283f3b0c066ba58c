"""How low is the held-out loss of a character model of Shakespeare after ten minutes on two cores? The bar: 1.6 nats.

The run is that of `hooklens train shakespeare`. The last tenth of the plays, by position, is held out, and all its
windows are evaluated at the end. The number of steps is fixed beforehand, because the learning rate falls to its floor
at the last one.
Run: python -m benchmarks.shakespeare
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import hooklens as hl
from benchmarks.rounds import write
from hooklens.training.run_recipe import Recipe

BAR, MINUTES = 1.6, 10


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, help="for trials; as shipped otherwise")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="a folder that keeps the run")
    options.add_argument("--dry", action="store_true", help="print the result and write no file")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    shipped = {} if chosen.steps is None else {"steps": chosen.steps}
    recipe = Recipe({"task": "shakespeare"}, {"seed": chosen.seed}, shipped)
    data, steps = recipe.load_data(), recipe.training["steps"]
    model = recipe.load_model(data)
    with tempfile.TemporaryDirectory() as scratch:
        out = chosen.out or Path(scratch) / "run"
        start, cpu = time.perf_counter(), time.process_time()
        run = hl.train(model, data, steps=steps, settings=recipe.settings(), out=out)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        curve = [list(pair) for pair in zip(run.evaluations().steps.tolist(), run.held_out_loss.tolist(), strict=True)]
    loss, n = held_out_loss(model, data)
    row = {
        "steps": steps,
        "million tokens": steps * recipe.settings().batch * recipe.data["window"] / 1e6,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "CPU seconds": cpu,
        "held-out nats": round(loss, 4),
        "held-out tokens": n,
    }
    reached = "reached" if loss < BAR and seconds < 60 * MINUTES else "NOT reached"
    found = f"{loss:.3f} nats held out in {seconds / 60:.1f} minutes"
    title = f"Shakespeare by character: {found} (bar: below {BAR} in {MINUTES}, {reached})"
    if chosen.dry:
        print(title, row, sep="\n")
    else:
        write("shakespeare", title, [row], {"row": row, "curve": curve, "settings": run.identity["settings"]})


def held_out_loss(model: hl.HookedTransformer, data: Any) -> tuple[float, int]:
    """The mean loss over every held-out window, and over how many tokens."""
    total, n = 0.0, 0
    for batch in data.with_all_held_out().held_out(128):
        with torch.no_grad():
            log_probs = model(batch.inputs).log_softmax(-1)
        losses = -log_probs.gather(2, batch.targets[..., None])
        total, n = total + float(losses.double().sum()), n + losses.numel()
    return total / n, n


if __name__ == "__main__":
    main()

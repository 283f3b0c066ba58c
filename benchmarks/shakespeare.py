"""How low is the held-out loss of a character model of Shakespeare after ten minutes on two cores? The bar: 1.6 nats.

The last tenth of the plays, by position, is held out, and all its windows are evaluated at the end. The number of steps
is fixed beforehand, because the learning rate falls to its floor at the last one. `--steps` and `--dry` are for trials.
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
from hooklens.data.plays import shakespeare
from hooklens.data.text_windows import TextWindows
from hooklens.model.transformer import HookedTransformer
from hooklens.training import AdamW, Cosine, Settings

BAR, MINUTES = 1.6, 10
STEPS, WINDOW = 7000, 64
SIZES: dict[str, Any] = {"n_layers": 4, "d_model": 128, "n_heads": 4, "positional_embedding_type": "rotary"}


def settings_for(steps: int) -> Settings:
    """The settings of the run."""
    return Settings(
        batch=16,
        optimizer=AdamW(lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1),
        schedule=Cosine(warmup=min(200, steps // 10), floor=0.02),
        clip=1.0,
        evaluate=40,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=STEPS)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="a folder that keeps the run")
    options.add_argument("--dry", action="store_true", help="print the result and write no file")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    data = shakespeare(window=WINDOW)
    cfg = hl.HookedTransformerConfig(**SIZES, n_ctx=WINDOW, d_vocab=data.d_vocab)
    model = HookedTransformer(cfg, tokenizer=data.tokenizer, seed=chosen.seed)
    with tempfile.TemporaryDirectory() as scratch:
        out = chosen.out or Path(scratch) / "run"
        start, cpu = time.perf_counter(), time.process_time()
        run = hl.train(model, data, steps=chosen.steps, settings=settings_for(chosen.steps), out=out)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        curve = [list(pair) for pair in zip(run.evaluations().steps.tolist(), run.held_out_loss.tolist(), strict=True)]
    loss, n = held_out_loss(model, data)
    row = {
        "steps": chosen.steps,
        "million tokens": chosen.steps * 16 * WINDOW / 1e6,
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


def held_out_loss(model: HookedTransformer, data: TextWindows) -> tuple[float, int]:
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

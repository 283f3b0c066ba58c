"""Is an exact sweep faster than TransformerLens's loop on a GPU too? GPT-2-small shape, 20 tokens, float32, no TF32.

Needs transformer-lens==3.9.0 beside hooklens. Run: python -m benchmarks.gpu
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch

import hooklens as hl
from benchmarks import peers
from benchmarks.rounds import alternate, ratios, write
from benchmarks.sweeps import RIGHT, WRONG, prompts, theirs

THEIRS = "TransformerLens 3.9.0"
OWN_LOOP = "hooklens, plain loop"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--ours-only", action="store_true")
    chosen = options.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    model = peers.ours()
    peer = None if chosen.ours_only else peers.transformer_lens(model, "cuda")
    model.to("cuda")
    clean, second, _ = (each.cuda() for each in prompts())
    metric = hl.logit_diff(model, answer=RIGHT, wrong_answer=WRONG)
    rows, raw = [], {}
    with torch.no_grad():
        for site, by in (("resid_pre", "layer x pos"), ("z", "layer x head"), ("z", "layer x head x pos")):
            runs: dict[str, Any] = {
                "hooklens": partial(finished, hl.patch, model, clean, second, metric, site=site, by=by),
                OWN_LOOP: partial(loop, model, clean, second, metric, site, by),
            }
            part = 12 if by.endswith("x pos") and site == "z" else 1
            if part > 1:
                del runs[OWN_LOOP]
            if peer is not None:
                runs[THEIRS] = partial(finished, theirs, peer, clean, second, by, part)
            for run in runs.values():
                run()
            seconds = alternate(runs, chosen.rounds)
            if THEIRS in seconds:
                seconds[THEIRS] = [each * part for each in seconds[THEIRS]]
            raw[f"{site}, {by}"] = {"seconds": seconds, "peer part": 1 / part}
            rows += table(f"{site}, {by}", seconds)
    write("gpu", "Exact sweeps against the loop on a GPU", rows, raw)


def finished(run, *args: Any, **kwargs: Any) -> Any:
    """What it gives, once the device has done its work."""
    out = run(*args, **kwargs)
    torch.cuda.synchronize()
    return out


def loop(model, clean, corrupted, metric, site: str, by: str) -> Any:
    with hl.engine(plain=True):
        return finished(hl.patch, model, clean, corrupted, metric, site=site, by=by)


def table(case: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for who, each in seconds.items():
        row: dict[str, Any] = {"case": case, "who": who, "median s": statistics.median(each)}
        rows.append(row if who == "hooklens" else row | ratios(seconds, who, "hooklens"))
    return rows


if __name__ == "__main__":
    main()

"""Did a change cost speed? Two checkouts, each in its own process, take turns at the same tasks: the ratio new/old.

Run: python -m benchmarks.two_checkouts --old ../hooklens-before
A task is a pass, a pass with its cache, sweeps by position and by head, an ablation of all heads, path patching, the
logit lens and generation, on random weights (eight layers of GPT-2's kind). Only one process works at a time.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rounds import ratios, write

HERE = Path(__file__).parent.parent
WORKER = r"""
import json, sys, time
import torch
import hooklens as hl
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens import logit_lens
from hooklens.plugins.patching import ablate, patch, path_patch
from hooklens.plugins.circuits import circuit_graph, run_edges

torch.set_num_threads(2)
torch.set_grad_enabled(False)
model = HookedTransformer(
    HookedTransformerConfig(n_layers=8, d_model=512, n_ctx=256, n_heads=8, d_vocab=20000, tie_word_embeddings=True),
    seed=0,
).eval()
query = ("q", 6, 1)
generator = torch.Generator().manual_seed(1)
clean = torch.randint(0, 20000, (1, 20), generator=generator)
corrupted = clean.clone()
corrupted[0, 7] = 5
eight = torch.randint(0, 20000, (8, 20), generator=generator)
metric = hl.logit_diff(model, answer=1000, wrong_answer=2000)
masks = torch.rand(8, circuit_graph(model).n_edges, generator=generator) < 0.5
tasks = {
    "forward, 8 x 20": lambda: model(eight),
    "run_with_cache, 8 x 20": lambda: model.run_with_cache(eight)[0],
    "patch resid_pre, layer x pos": lambda: patch(model, clean, corrupted, metric).values,
    "patch z, layer x head": lambda: patch(model, clean, corrupted, metric, site="z").values,
    "ablate all heads by zero": lambda: ablate(model, eight, metric).values,
    "path_patch to the logits": lambda: path_patch(model, clean, corrupted, metric, receivers="final").values,
    "path_patch to L6H1.q": lambda: path_patch(model, clean, corrupted, metric, receivers=query).values,
    "run_edges, 8 circuits": lambda: run_edges(model, masks, clean, corrupted, metric).per_pair,
    "logit lens, 1 x 20": lambda: logit_lens(model, clean).table(3),
    "generate 24 tokens": lambda: model.generate(clean, 24),
}
for task in tasks.values():
    task()
print(json.dumps(list(tasks)), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    with torch.inference_mode(False):
        tasks[line.rstrip("\n")]()
    print(time.perf_counter() - start, flush=True)
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--old", type=Path, required=True, help="the checkout to compare with")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--dry", action="store_true", help="print only")
    chosen = options.parse_args()
    workers = {"old": worker(chosen.old), "new": worker(HERE)}
    names = [json.loads(process.stdout.readline()) for process in workers.values()]
    tasks = [task for task in names[0] if task in names[1]]
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for task in tasks:
        seconds: dict[str, list[float]] = {"old": [], "new": []}
        for turn in range(chosen.rounds):
            for name in list(workers)[:: 1 if turn % 2 == 0 else -1]:
                seconds[name].append(asked(workers[name], task))
        ratio = ratios(seconds, "new", "old")
        rows.append({"task": task, "new / old": ratio["median"], "least": ratio["min"], "most": ratio["max"]})
        raw[task] = seconds
        print(rows[-1], flush=True)
    for process in workers.values():
        process.stdin.close()
    if not chosen.dry:
        write("two_checkouts", "This checkout against an earlier one", rows, raw)


def worker(checkout: Path) -> Any:
    """A process that imports hooklens from this checkout and waits for the names of tasks."""
    command = [sys.executable, "-c", WORKER]
    return subprocess.Popen(command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def asked(process: Any, task: str) -> float:
    """Wall seconds that the process took."""
    process.stdin.write(task + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


if __name__ == "__main__":
    main()

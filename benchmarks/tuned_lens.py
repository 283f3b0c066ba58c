"""Does a tuned lens of SmolLM2's 30 layers train within 4 GiB, how long does it take, and how far does the KL fall?

Fitted in closed form on pages of Shakespeare, then trained on from there for some steps; each in a process of its own,
because a peak is that of all that a process has done. Run: python -m benchmarks.tuned_lens
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.rounds import write

BODY = """
import json, resource, time, torch
torch.set_num_threads(2)
import hooklens as hl
from hooklens.plugins.lens.affine_lens import fit_tuned_lens, train_tuned_lens
from hooklens.pretrained.assets import text
model = hl.load("smollm2-135m-instruct")
ids = model.to_tokens(text("shakespeare")[1_000_000:1_000_000 + {characters}])[0]
windows = ids[: len(ids) // 32 * 32].view(-1, 32)
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
lens, found = {call}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fall = found.before.mean(0) - found.after.mean(0)
print(json.dumps({{
    "tokens": found.train_tokens, "seconds": seconds, "loaded GiB": loaded / 2**20, "peak GiB": peak / 2**20,
    "layers whose held-out KL falls": int((fall > 0).sum()), "least fall": float(fall.min()),
    "mean KL before": float(found.before.mean()), "after": float(found.after.mean()),
}}))
"""
CALLS = {
    "fit_tuned_lens": "fit_tuned_lens(model, windows)",
    "train_tuned_lens, {steps} steps of 4 windows": "train_tuned_lens(model, windows, steps={steps}, batch=4)",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--characters", type=int, default=24_000)
    chosen = options.parse_args()
    rows = []
    for name, call in CALLS.items():
        body = BODY.format(characters=chosen.characters, call=call.format(steps=chosen.steps))
        rows.append({"what": name.format(steps=chosen.steps)} | measured(body))
        print(rows[-1], flush=True)
    write("tuned_lens", "A tuned lens for SmolLM2-135M's 30 layers", rows, {"rows": rows})


def measured(body: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

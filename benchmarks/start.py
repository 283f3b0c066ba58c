"""How long until something can be done? Import over torch's, SmolLM2 from its GGUF file to first logits, the demo.

Each figure is a process of its own, taking turns. Run: python -m benchmarks.start
With `--old ../hooklens-before`, only imports, in seconds of the processor: this checkout and the other one take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rounds import ratios, write

HERE = Path(__file__).parent.parent

IMPORTS = {
    "import torch": "import torch",
    "import torch, hooklens": "import torch, hooklens.public",
}
FIRST_USES = ("import hooklens", "import hooklens; hooklens.patch", "import hooklens.plugins")
LOAD = """
import json, resource, time, torch
torch.set_num_threads(2)
import {module}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
{body}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, (peak - before) * 1024, int(logits.argmax())]))
"""
OURS = """
import hooklens as hl
model = hl.load("smollm2-135m-instruct")
logits = model(model.to_tokens({prompt!r}))[0, -1].detach()
"""
THEIRS = """
from hooklens.pretrained.assets import fetch
from transformers import AutoModelForCausalLM, AutoTokenizer
path = fetch("smollm2-135m-instruct")
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
logits = model(**tokenizer({prompt!r}, return_tensors="pt")).logits[0, -1].detach()
"""
PROMPT = "When Mary and John went to the store, John gave a drink to"
FLOAT32_BYTES = 134_515_008 * 4


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--old", type=Path, help="a checkout to compare imports with; nothing else is timed")
    chosen = options.parse_args()
    if chosen.old is not None:
        print("\n".join(map(str, against(chosen.old, chosen.rounds))))
        return
    raw: dict[str, list[Any]] = {}
    for _ in range(chosen.rounds):
        for name, code in IMPORTS.items():
            timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
            raw.setdefault(name, []).append(float(run(timed)))
        for name, module, body in (("hooklens", "hooklens", OURS), ("transformers", "transformers, gguf", THEIRS)):
            code = LOAD.format(module=module, body=body.format(prompt=PROMPT))
            raw.setdefault(f"SmolLM2 to first logits, {name}", []).append(json.loads(run(code)))
        raw.setdefault("hooklens demo, model already fetched", []).append(demo())
    write("start", "Import and load", table(raw), raw)


def against(old: Path, rounds: int) -> list[dict[str, Any]]:
    """CPU seconds of the first uses in both checkouts: medians, and the ratio new / old round by round."""
    rows = []
    for code in FIRST_USES:
        timed = f"import time; t = time.process_time(); {code}; print(time.process_time() - t)"
        seconds: dict[str, list[float]] = {"old": [], "new": []}
        for turn in range(rounds):
            for name, checkout in (("old", old), ("new", HERE))[:: 1 if turn % 2 == 0 else -1]:
                seconds[name].append(float(run(timed, checkout)))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append({"code": code, **medians, "new / old": ratios(seconds, "new", "old")["median"]})
    return rows


def demo() -> float:
    """Seconds of the whole command, from its start to its report."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        code = "from hooklens.cli import main; main()"
        subprocess.run([sys.executable, "-c", code, "demo"], cwd=folder, capture_output=True, check=True)
        return time.perf_counter() - start


def run(code: str, checkout: Path | None = None) -> str:
    """The last line that a new process prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def table(raw: dict[str, list[Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, each in raw.items():
        seconds = [one[0] if isinstance(one, list) else one for one in each]
        row = {
            "what": name,
            "median s": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "n": len(each),
        }
        if isinstance(each[0], list):
            row["peak memory / float32 weights"] = statistics.median(one[1] for one in each) / FLOAT32_BYTES
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()

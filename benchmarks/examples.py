"""How long does each example take at full size? A process each, one after the other, as a reader would run it.

The bar: under two minutes on 2 cores. Run: python -m benchmarks.examples
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

from benchmarks.rounds import write

FOLDER = Path(__file__).parents[1] / "examples"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--keep", type=Path, help="a folder for what the examples print and draw")
    options.add_argument("--only", nargs="+", help="numbers of examples, such as 14 15; by default all")
    chosen = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for example in sorted(FOLDER.glob("[0-9]*.py")):
            if chosen.only and example.stem.partition("_")[0] not in chosen.only:
                continue
            rows.append(timed(example, (chosen.keep or Path(scratch)) / example.stem))
            print(rows[-1], flush=True)
    write("examples", "The examples at full size", rows, {"rows": rows})


def timed(example: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "HOOKLENS_TINY"}
    environment["PYTHONPATH"] = str(FOLDER.parent)
    start, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
    with open(folder / "printed.txt", "w") as out:
        command = [sys.executable, str(example)]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    after = getrusage(RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = time.perf_counter() - start
    return {"example": example.stem, "exit": done.returncode, "seconds": seconds, "CPU seconds": cpu}


if __name__ == "__main__":
    main()

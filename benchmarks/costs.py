"""What do the models of both tracks reach, cost and implement? One table from the newest results of both benchmarks.

Run after them: python -m benchmarks.costs
"""

import json
from typing import Any

from benchmarks.rounds import RESULTS, write

SEED = "seed 0"  # of the in-context models: their errors by seed are in the result of their own benchmark


def main() -> None:
    grokking, in_context = newest("grokking"), newest("in_context")
    rows = [row | {"track": "modular addition"} for seed in grokking["raw"]["seeds"] for row in rows_of(seed["tables"])]
    rows += [row | {"track": "in-context regression"} for row in rows_of(in_context["raw"]["seeds"]["0"])]
    read = [record["file"] for record in (grokking, in_context)]
    write("costs", f"Models of both tracks, in-context ones of {SEED}", rows, {"read from": read})


def newest(topic: str) -> dict[str, Any]:
    """The newest result of a benchmark, on any processor: `grokking_fast_amd` is of another one than `grokking_amd`."""
    files = sorted(RESULTS.glob(f"*_{topic}_*.json"))
    files = [path for path in files if path.stem.split("_", 1)[1].rpartition("_")[0] == topic]
    if not files:
        raise SystemExit(f"there is no result of benchmarks.{topic} yet: run it first")
    return json.loads(files[-1].read_text()) | {"file": files[-1].name}


def rows_of(tables: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table of costs."""
    return [dict(zip(tables["costs"]["columns"], row, strict=True)) for row in tables["costs"]["rows"]]


if __name__ == "__main__":
    main()

"""What benchmarks share: runs that take turns in one process, and a record of numbers, n, machine and versions."""

import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight", "numpy")


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of every run, taking turns; the order is reversed in every other round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], top: str, bottom: str) -> dict[str, float]:
    """Median of the round-by-round ratio top/bottom, and its range."""
    each = [a / b for a, b in zip(seconds[top], seconds[bottom], strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each), "n": len(each)}


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name()
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def vendor() -> str:
    """Part of a result's name: figures of one vendor's processor stand beside those of another."""
    return "intel" if "Intel" in cpu_name() else "amd" if "AMD" in cpu_name() else platform.machine()


def write(topic: str, title: str, rows: list[dict[str, Any]], raw: dict[str, Any]) -> None:
    """results/<date>_<topic>.json with everything, .md with the table."""
    date = datetime.now(UTC).date().isoformat()
    RESULTS.mkdir(exist_ok=True)
    record = {"topic": topic, "date": date, "machine": machine(), "rows": rows, "raw": raw}
    topic = f"{topic}_{vendor()}"
    (RESULTS / f"{date}_{topic}.json").write_text(compact(json.dumps(record, indent=1)) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {title}", "", " | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(shown(row.get(column, "")) for column in columns) for row in rows]
    lines += ["", ", ".join(f"{k} {v}" for k, v in machine().items())]
    (RESULTS / f"{date}_{topic}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def compact(text: str) -> str:
    """Indented JSON with every list of plain values on one line: curves are long."""
    return re.sub(r"\[\s[^\[\]{}\"]*\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

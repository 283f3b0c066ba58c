"""Benchmarks are run by hand, where a changed signature shows late: they import, and what they import is there.

mypy checks their calls: `packages` in setup.cfg.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))
PEERS = {"transformer_lens", "auto_circuit"}  # not needed by anything but the benchmark


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # the recorders are run as scripts
    monkeypatch.syspath_prepend(FOLDER.parent)
    try:
        module = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        assert error.name in PEERS, error
        return
    workers = [value for value in vars(module).values() if isinstance(value, str) and "import hooklens" in value]
    for code in workers:
        for node in ast.walk(ast.parse(re.sub(r"\{\w+(!r)?\}", "filled", code))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hooklens"):
                there = importlib.import_module(str(node.module))
                assert all(hasattr(there, alias.name) for alias in node.names), ast.unparse(node)


def test_mypy_checks_the_benchmarks():
    assert "\npackages = hooklens, benchmarks\n" in (FOLDER.parent / "setup.cfg").read_text()

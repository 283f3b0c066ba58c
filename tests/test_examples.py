"""Every example runs as a script, in a folder of its own, and writes nothing but its one picture there."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
SECONDS = 120


#: A notebook's way of running a script: cell by cell, in one namespace.
CELLS = """
import re, sys
namespace = {"__name__": "__main__"}
for cell in re.split(r"(?m)^# %%", open(sys.argv[1]).read())[1:]:
    kind, _, code = cell.partition("\\n")
    if "[markdown]" in kind:
        assert all(line.startswith("#") or not line.strip() for line in code.splitlines()), code
    else:
        exec(compile(code, sys.argv[1], "exec"), namespace)
"""


def run(example, folder, as_notebook=False, **environment):
    before = {path: path.stat().st_mtime_ns for path in FOLDER.iterdir() if path.is_file()}
    started = time.perf_counter()
    command = [sys.executable, "-W", "error", *(("-c", CELLS) if as_notebook else ()), str(example)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.perf_counter() - started < SECONDS
    assert {path: path.stat().st_mtime_ns for path in FOLDER.iterdir() if path.is_file()} == before
    written = list(folder.iterdir())
    assert [path.suffix for path in written] == [".html"]
    assert "plotly" in written[0].read_text()
    return done.stdout


def test_there_are_examples_and_they_have_cells():
    assert len(EXAMPLES) >= 3
    for example in EXAMPLES:
        assert example.read_text().startswith("# %% [markdown]\n# # ")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_on_a_tiny_model(example, tmp_path):
    run(example, tmp_path, HOOKLENS_TINY="1")


@pytest.mark.parametrize("example", EXAMPLES[:3], ids=lambda path: path.stem)
def test_an_example_runs_as_a_notebook(example, tmp_path):
    run(example, tmp_path, as_notebook=True, HOOKLENS_TINY="1")


# Those that take more than half a minute are run at full size, and timed, by benchmarks/examples.py.
@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES[:2], ids=lambda path: path.stem)
def test_an_example_runs_on_the_real_model(example, tmp_path):
    run(example, tmp_path)


def test_the_plugin_of_the_third_example_lacks_only_its_entry_point(tmp_path):
    out = run(FOLDER / "03_write_your_own_plugin.py", tmp_path)
    assert "breaks the clause 'saved'" in out
    assert "declare the module as an entry point of the group 'hooklens.plugins'" in out

"""Every example runs as a script, in a folder of its own, and writes nothing but its one picture there."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
PLUGIN = FOLDER / "03_write_your_own_plugin.py"
QUICK = {"01", "14", "15"}  # the others are slow tests


def as_notebook(path):
    """A notebook's way of running a script: cell by cell, in one namespace."""
    namespace = {"__name__": "__main__"}
    for cell in re.split(r"(?m)^# %%", path.read_text())[1:]:
        kind, _, code = cell.partition("\n")
        if "[markdown]" in kind:
            assert all(line.startswith("#") or not line.strip() for line in code.splitlines()), code
        else:
            exec(compile(code, str(path), "exec"), namespace)


def as_script(path):
    runpy.run_path(str(path), run_name="__main__")


def in_a_process(path):
    done = subprocess.run([sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example and look at what it left behind."""

    def run(example, how, tiny):
        before = {path: path.stat().st_mtime_ns for path in FOLDER.iterdir() if path.is_file()}
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(example)])
        monkeypatch.delenv("HOOKLENS_TINY", raising=False)
        if tiny:
            monkeypatch.setenv("HOOKLENS_TINY", "1")
        how(example)
        assert {path: path.stat().st_mtime_ns for path in FOLDER.iterdir() if path.is_file()} == before
        written = list(tmp_path.iterdir())
        assert [path.suffix for path in written] == [".html"]
        assert "plotly" in written[0].read_text()

    return run


def test_there_are_examples_and_they_have_cells():
    assert len(EXAMPLES) >= 3
    for example in EXAMPLES:
        assert example.read_text().startswith("# %% [markdown]\n# # ")


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem[:2] not in QUICK))
        for path in EXAMPLES
        if path != PLUGIN
    ],
)
def test_an_example_runs_on_a_tiny_model(example, run):
    run(example, as_script, tiny=True)


@pytest.mark.parametrize("example", EXAMPLES[:2], ids=lambda path: path.stem)
def test_an_example_runs_as_a_notebook(example, run):
    run(example, as_notebook, tiny=True)


# Those that take more than half a minute are run at full size, and timed, by benchmarks/examples.py.
@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES[:2], ids=lambda path: path.stem)
def test_an_example_runs_on_the_real_model(example, run):
    run(example, in_a_process, tiny=False)


def test_the_plugin_of_the_third_example_lacks_only_its_entry_point(run, capsys):
    run(PLUGIN, as_script, tiny=False)  # it checks the module __main__
    out = capsys.readouterr().out
    assert "breaks the clause 'saved'" in out
    assert "declare the module as an entry point of the group 'hooklens.plugins'" in out

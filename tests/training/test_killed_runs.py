"""Runs that SIGKILL ends at a chosen instant, and resume: the files are bit for bit those of the uninterrupted run."""

import subprocess
import sys

import pytest

import hooklens as hl
from hooklens.training.training_run import open_run

# One interpreter forks a process for each run; it trains nothing itself, so that no thread of torch is lost.
SCRIPT = '''
import os, signal, sys
from pathlib import Path
import torch
import hooklens.training.loop as loop
from hooklens.data.modular import modular_arithmetic
from hooklens.testing import tiny_model
from hooklens.training.optimizers import AdamW, Grokfast
from hooklens.training.row_file import RowFile
from hooklens.training.training_settings import Settings

torch.set_num_threads(1)
loop._SAVE_EVERY, loop._SAVE_SHARE, loop._FLUSH_EVERY = 0.0, 0, 0.0
DATA = modular_arithmetic(p=7, fraction=0.7)
SETTINGS = Settings(
    batch=8, accumulate=2, optimizer=Grokfast(inner=AdamW(lr=0.01)), clip=1.0, evaluate=6, checkpoints=6,
    snapshots=["pattern"],
)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(what, when, nth):
    """Replace the function that passes this instant by one that kills the process there, the nth time."""
    passed = [0]

    def is_now(matches=True):
        passed[0] += matches
        return matches and passed[0] == nth

    if what == "rows":
        flush = RowFile.flush
        def flush_or_die(self, *, to_disk=False):
            now = is_now()
            if now and when == "before":
                die()
            if now and when == "half":
                self._file.flush()
                self._file.write(b"half of a row")
            flush(self, to_disk=to_disk)
            if now:
                die()
        RowFile.flush = flush_or_die
    elif what in ("_losses_of", "forget_after"):
        owner = loop._Training if what == "_losses_of" else loop.RunFolder
        whole = getattr(owner, what)
        def run_or_die(self, argument):
            result = whole(self, argument)
            return die() if is_now() else result
        setattr(owner, what, run_or_die)
    else:
        replace = os.replace
        def replace_or_die(source, target):
            now = is_now(what in Path(target).name)
            if now and when == "half":
                os.truncate(source, os.path.getsize(source) // 2)
            if now and when != "after":
                die()
            replace(source, target)
            if now:
                die()
        os.replace = replace_or_die


def in_child(folder, *instant):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        if instant:
            kill_at(*instant)
        model = tiny_model(d_vocab=DATA.d_vocab, dtype=torch.float64, dropout=0.2)
        loop.train(model, DATA, steps=12, out=folder, settings=SETTINGS)
        status = 0
    finally:
        os._exit(status)


root = Path(sys.argv[1])
assert in_child(root / "whole") == 0
for i, instant in enumerate(sys.argv[2:]):
    what, when, nth = instant.split(":")
    died = in_child(root / f"run{i}", what, when, int(nth))
    resumed = in_child(root / f"run{i}")
    print(instant, died == -signal.SIGKILL, resumed, flush=True)
'''

FEW = ["run.json:half:1", "state:half:4", "rows:half:9"]
MORE = [
    *("run.json:before:1", "run.json:after:1", "forget_after:after:1"),
    *("state:before:1", "state:after:1", "state:before:7", "state:after:12"),
    *("step_:half:1", "step_:after:1", "step_:half:4", "step_:before:5", "step_:after:6"),
    *("rows:before:1", "rows:half:2", "rows:after:20", "rows:before:33"),
    *("_losses_of:after:1", "_losses_of:after:10", "_losses_of:after:23"),
]


def contents(path):
    """The bytes of models and state, and everything recorded but the seconds."""
    run = open_run(path)
    held = {file.name: file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}
    for kind, rows in (("step", run.steps()), ("evaluation", run.evaluations())):
        held |= {f"{kind} {name}": rows[name].tobytes() for name in rows.columns if name != "seconds"}
        held[kind] = rows.steps.tolist()
    snapshots = run.snapshots()
    return held | {name: snapshots[name].tobytes() for name in snapshots.names}


def check_killed(tmp_path, instants):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *instants]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.splitlines() == [f"{instant} True 0" for instant in instants], ended.stderr
    whole = contents(tmp_path / "whole")
    assert len(whole["step"]) == 12 and len(whole["evaluation"]) == 7 and "state.safetensors" in whole
    for i, instant in enumerate(instants):
        assert contents(tmp_path / f"run{i}") == whole, instant
    return hl.load(tmp_path / "whole" / "checkpoints" / "step_000000012.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_run_killed_while_it_writes_its_beginning_a_state_or_a_row_resumes_bit_for_bit(tmp_path):
    assert check_killed(tmp_path, FEW).cfg.dropout == 0.2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_killed_at_22_named_instants_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path):
    assert len({*FEW, *MORE}) == 22
    check_killed(tmp_path, [*FEW, *MORE])

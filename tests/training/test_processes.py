"""Runs in processes of their own: killed at any instant, and two that share one batch."""

import json
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import hooklens as hl
from hooklens.training.training_run import open_run

RUN = """
import os, signal, sys, threading, time
import torch
import hooklens.training.loop as loop
from hooklens.data.modular import modular_arithmetic
from hooklens.testing import tiny_model
from hooklens.training.optimizers import AdamW, Grokfast
from hooklens.training.training_settings import Settings

torch.set_num_threads(1)
loop._SAVE_EVERY, loop._SAVE_SHARE = float(sys.argv[2]), 0
data = modular_arithmetic(p=7, fraction=0.7)
model = tiny_model(d_vocab=data.d_vocab, dtype=torch.float64, dropout=0.1)
settings = Settings(batch=8, optimizer=Grokfast(inner=AdamW(lr=0.01)), clip=1.0, evaluate=10, checkpoints=6)
reached, killed_after, delay = threading.Event(), int(sys.argv[4]), float(sys.argv[5])


def kill():
    reached.wait()
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def count(step, loss):
    steps_taken.append(step)
    if len(steps_taken) == killed_after:
        reached.set()


steps_taken = []
if killed_after >= 0:
    threading.Thread(target=kill, daemon=True).start()
if killed_after == 0:
    reached.set()
loop.train(model, data, steps=int(sys.argv[3]), out=sys.argv[1], settings=settings, after_step=count)
print("ended", flush=True)
"""


# One interpreter imports, and forks a process for each run; it trains nothing itself, so that no thread is lost.
FORKS = f"""
import json, os, sys
import torch, hooklens.data.modular, hooklens.testing, hooklens.training.loop

for given in json.loads(sys.argv[1]):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    sys.argv[1:] = map(str, given)
    status = 1
    try:
        exec({RUN!r}, {{"__name__": "__main__"}})
        status = 0
    finally:
        os._exit(status)
"""


def given(path, save_every, steps, kill_after=-1, delay=0.0):
    """The arguments of a run, which kills itself `delay` seconds after its step number `kill_after`."""
    return [str(path), save_every, steps, kill_after, delay]


def said(*command):
    """What a command of Python prints, also as errors."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    return done.stdout, done.stderr


def bits(path):
    return {file.name: file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}


@pytest.mark.slow
def test_killed_at_twenty_random_instants_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path):
    """Each of 4 runs is killed 5 times, after a random number of steps and a random part of the next ones.

    The child counts its steps and kills itself, so that the load of the machine changes neither how often a run is
    killed nor how far it gets in between: at most 30 steps, and those of the delay.
    """
    runs, draw = [given(tmp_path / "whole", 1e9, 400)], random.Random(0)
    for attempt in range(4):
        path = tmp_path / f"run{attempt}"
        runs += [given(path, 0.01, 400, draw.randrange(31), draw.uniform(0, 0.02)) for _ in range(5)]
        runs.append(given(path, 0.01, 400))
    output, errors = said("-c", FORKS, json.dumps(runs))
    assert output.split() == ["ended", "0", *4 * [*5 * [str(-signal.SIGKILL)], "ended", "0"]], errors
    whole = bits(tmp_path / "whole")
    assert len(whole) == 8  # seven checkpoints and the state
    for attempt in range(4):
        assert bits(tmp_path / f"run{attempt}") == whole, attempt


def torchrun(path, text, count, steps):
    """What `count` processes print that run a script together."""
    path.mkdir()
    (path / "script.py").write_text(text)
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", path / "script.py")
    return said(*launcher, *given(path / "run", 1e9, steps))


@pytest.mark.slow
def test_the_first_of_two_processes_stops_both_early(tmp_path):
    text = RUN.replace("evaluate=10", "evaluate=20, patience=2").replace("lr=0.01", "lr=0.0, weight_decay=0.0")
    output, error = torchrun(tmp_path / "early", text, 2, 20)
    assert output.count("ended") == 2, error
    assert open_run(tmp_path / "early" / "run").steps_done == 2


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path):
    for count in (1, 2):
        output, error = torchrun(tmp_path / str(count), RUN, count, 20)
        assert output.count("ended") == count, error
    one, two = (open_run(tmp_path / str(count) / "run") for count in (1, 2))
    assert len(one.loss) == 20
    assert np.abs(one.loss - two.loss).max() < 1e-6
    first, second = (hl.load(run.checkpoints()[-1].path).state_dict() for run in (one, two))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-9
    assert first["embed.weight"].dtype == torch.float64

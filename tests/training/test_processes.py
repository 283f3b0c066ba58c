"""Runs in processes of their own: killed at any instant, and two that share one batch."""

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import hooklens as hl
from hooklens.training.training_run import open_run

RUN = """
import sys
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
print("begins", flush=True)
loop.train(model, data, steps=int(sys.argv[3]), out=sys.argv[1], settings=settings)
print("ended", flush=True)
"""


def started(path, save_every, steps, *launcher):
    command = [sys.executable, *(launcher or ("-c", RUN)), str(path), str(save_every), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def bits(path):
    return {file.name: file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}


@pytest.mark.slow
def test_killed_at_twenty_instants_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path):
    began = time.monotonic()
    child = started(tmp_path / "whole", 1e9, 200)
    assert child.communicate()[0].endswith("ended\n")
    seconds, draw, kills = time.monotonic() - began, random.Random(0), 0
    whole = bits(tmp_path / "whole")
    for attempt in range(60):
        path = tmp_path / f"run{attempt}"
        for _ in range(3):
            child = started(path, 0.02, 200)
            assert child.stdout is not None and child.stdout.readline() == "begins\n"
            try:
                child.wait(draw.uniform(0, seconds / 3))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                kills += 1
            child.communicate()
        output, error = started(path, 0.02, 200).communicate()
        assert output.endswith("ended\n"), error
        assert bits(path) == whole
        if kills >= 20:
            break
    assert kills >= 20


def torchrun(path, text, count, steps):
    """What `count` processes print that run a script together."""
    path.mkdir()
    (path / "script.py").write_text(text)
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(path / "script.py"))
    return started(path / "run", 1e9, steps, *launcher).communicate()


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

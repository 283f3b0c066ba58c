"""A run that is stopped and resumed gives the bits of one that is not; other runs are kept out of its folder."""

import subprocess
import sys
import time

import pytest
import torch

import hooklens as hl
from hooklens.core.errors import HooklensError
from hooklens.data.modular import modular_arithmetic
from hooklens.testing import tiny_model
from hooklens.training import loop
from hooklens.training.loop import Diverged, train
from hooklens.training.optimizers import SGD, AdamW, Grokfast
from hooklens.training.training_run import open_run
from hooklens.training.training_settings import Settings

SETTINGS = Settings(batch=4, optimizer=Grokfast(inner=AdamW(lr=0.01)), clip=0.5, evaluate=4, checkpoints=4)
DATA = modular_arithmetic(p=5, fraction=0.8)


def model(seed=0):
    return tiny_model(d_vocab=DATA.d_vocab, seed=seed)


def weights(path):
    return hl.load(path / "checkpoints" / "step_000000012.safetensors").state_dict()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(model(), DATA, steps=12, out=path, settings=SETTINGS)
    return path


def stop_after(step):
    def hook(now, loss):
        if now == step:
            raise RuntimeError("stopped")

    return hook


@pytest.mark.parametrize("step", [1, 5, 11])
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_resumed_equals_uninterrupted_bit_for_bit(uninterrupted, tmp_path, monkeypatch, step, save_every):
    monkeypatch.setattr(loop, "_SAVE_EVERY", save_every)
    monkeypatch.setattr(loop, "_SAVE_SHARE", 0)
    with pytest.raises(RuntimeError, match="stopped"):
        train(model(), DATA, steps=12, out=tmp_path / "run", settings=SETTINGS, after_step=stop_after(step))
    run = train(model(), DATA, steps=12, out=tmp_path / "run", settings=SETTINGS)
    first, second = weights(uninterrupted), weights(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = open_run(uninterrupted)
    for name in ("loss", "gradient_norms", "parameter_norms", "change_norms"):
        assert (run.steps()[name] == before.steps()[name]).all()
    assert (run.evaluations()["histogram"] == before.evaluations()["histogram"]).all()


def test_a_finished_run_is_read_again_and_the_model_takes_its_weights(uninterrupted):
    again = model()
    run = train(again, DATA, steps=12, out=uninterrupted, settings=SETTINGS)
    assert run.steps_done == 12
    last = weights(uninterrupted)
    assert all(torch.equal(value, last[name]) for name, value in again.state_dict().items())
    train(again, DATA, steps=12, out=uninterrupted, settings=SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 13}, "steps was 12 and is 13"),
        ({"settings": Settings(batch=8)}, "settings.batch was 4 and is 8"),
        ({"data": modular_arithmetic(p=5, fraction=0.6)}, "data.fraction was 0.8 and is 0.6"),
        (
            {"model": model(seed=1)},
            "the model's weights are neither those that the run began with nor those of its last",
        ),
        ({"model": tiny_model(n_layers=1, d_vocab=6)}, "config.n_layers was 2 and is 1"),
    ],
)
def test_another_run_in_the_folder_is_refused_with_what_differs(uninterrupted, change, message):
    call = {"model": model(), "data": DATA, "steps": 12, "settings": SETTINGS} | change
    first, data = call.pop("model"), call.pop("data")
    with pytest.raises(HooklensError, match=message):
        train(first, data, out=uninterrupted, **call)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(HooklensError, match="holds other files"):
        train(model(), DATA, steps=1, out=tmp_path)


@pytest.mark.slow
def test_a_second_writer_is_refused_with_the_process_of_the_first(tmp_path):
    code = (
        "import sys\nfrom hooklens.training.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).writing():\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(HooklensError, match=f"is being written by process {child.pid}"):
        train(model(), DATA, steps=1, out=tmp_path / "run")
    child.communicate()
    assert train(model(), DATA, steps=1, out=tmp_path / "run").steps_done == 1


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    settings = Settings(batch=4, optimizer=SGD(lr=1e11), schedule="constant", evaluate=1)
    with pytest.raises(Diverged, match=r"the loss of step \d is nan.*The last checkpoint before it: .*step_"):
        train(model(), DATA, steps=50, out=tmp_path / "run", settings=settings)
    kept = open_run(tmp_path / "run").checkpoints()
    assert kept and all(bool(torch.isfinite(p).all()) for p in kept[0].load().parameters())


def test_ctrl_c_finishes_the_step_and_the_same_call_continues(tmp_path):
    def interrupt(step, loss):
        if step == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt, match="stopped after 3 steps"):
        train(model(), DATA, steps=6, out=tmp_path / "run", settings=SETTINGS, after_step=interrupt)
    seen = []
    train(model(), DATA, steps=6, out=tmp_path / "run", settings=SETTINGS, after_step=lambda step, _: seen.append(step))
    assert seen == [4, 5, 6]

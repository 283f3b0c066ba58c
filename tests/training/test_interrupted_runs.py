"""What ends a run early, and what is then in its folder: Ctrl-C, a vanished folder, early stopping, damaged files."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import hooklens as hl
from hooklens.core.errors import FileRefused, InputError, Unavailable
from hooklens.data.modular import modular_arithmetic
from hooklens.testing import tiny_model
from hooklens.training import loop
from hooklens.training.divergence import Diverged
from hooklens.training.loop import train
from hooklens.training.optimizers import SGD, AdamW
from hooklens.training.run_folder import RunFolder
from hooklens.training.training_run import open_run
from hooklens.training.training_settings import Settings

DATA = modular_arithmetic(p=5, fraction=0.8)
SETTINGS = Settings(batch=4, evaluate=4, checkpoints=3, schedule="constant", snapshots=["pattern"])


def model(**changes):
    return tiny_model(**{"d_vocab": DATA.d_vocab} | changes)


def ctrl_c(step, loss):
    if step == 2:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 8 steps that stopped after 6."""
    path = tmp_path_factory.mktemp("stopped") / "run"

    def stop(step, loss):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        train(model(), DATA, steps=8, out=path, settings=SETTINGS, after_step=stop)
    return path


@pytest.fixture
def copied(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


def resumed(path, **changes):
    call = {"model": model(), "data": DATA, "steps": 8, "settings": SETTINGS} | changes
    first, data = call.pop("model"), call.pop("data")
    return train(first, data, out=path, **call)


def test_ctrl_c_without_a_folder_names_the_one_that_goes_on():
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 2 steps; out='.*' goes on from there") as stop:
        train(model(), DATA, steps=4, settings=SETTINGS, after_step=ctrl_c)
    folder = str(stop.value).split("'")[1]
    steps = []
    train(model(), DATA, steps=4, out=folder, settings=SETTINGS, after_step=lambda step, loss: steps.append(step))
    assert steps == [3, 4]


def test_the_checkpoint_that_a_diverged_run_names_is_there_without_a_folder():
    settings = Settings(batch=4, optimizer=SGD(lr=1e11), schedule="constant", evaluate=1)
    try:
        train(model(), DATA, steps=50, settings=settings)
    except Diverged as error:
        message = str(error)
    assert hl.load(message.rsplit(": ", 1)[1]).cfg.d_vocab == DATA.d_vocab


def test_a_checkpoint_of_a_run_that_nobody_kept_can_be_loaded():
    assert hl.checkpoints(train(model(), DATA, steps=2, settings=SETTINGS))[-1].load().cfg.n_layers == 2


def test_ctrl_c_during_the_last_state_is_not_lost(tmp_path, monkeypatch):
    save_state = loop._Training.save_state

    def save_and_interrupt(training):
        save_state(training)
        ctrl_c(2, 0.0)

    monkeypatch.setattr(loop._Training, "save_state", save_and_interrupt)
    with pytest.raises(KeyboardInterrupt, match="stopped after 3 steps; the run is complete"):
        train(model(), DATA, steps=3, out=tmp_path / "run", settings=SETTINGS)


def test_a_background_process_keeps_ignoring_ctrl_c(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = train(model(), DATA, steps=4, out=tmp_path / "run", settings=SETTINGS, after_step=ctrl_c)
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.steps_done == 4


def test_a_folder_that_vanishes_is_named_and_the_model_keeps_its_weights(tmp_path):
    def remove(step, loss):
        if step == 2:
            shutil.rmtree(tmp_path / "above")

    trained = model()
    with pytest.raises(Unavailable, match=r"above/run' vanished while its run was written.*weights after 3 steps"):
        train(trained, DATA, steps=8, out=tmp_path / "above" / "run", settings=SETTINGS, after_step=remove)
    assert not torch.equal(trained.W_E, model().W_E) and not trained.training


def test_a_run_that_stops_early_keeps_its_last_model(tmp_path):
    settings = Settings(batch=4, evaluate=20, patience=2, checkpoints=3, optimizer=AdamW(lr=0.0, weight_decay=0.0))
    run = train(model(), DATA, steps=40, out=tmp_path / "run", settings=settings)
    assert run.steps_done == 4 and [kept.step for kept in run.checkpoints()] == [0, 1, 4]


@pytest.mark.parametrize("name", ["steps.rows", "evaluations.rows", "snapshots.rows"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_rows_that_the_state_has_seen_are_not_silently_dropped(copied, name, damage):
    raw = bytearray((copied / name).read_bytes())
    raw[-40] ^= 1
    (copied / name).write_bytes(bytes(raw if damage == "flipped" else raw[:-40]))
    with pytest.raises(FileRefused, match=rf"{name} lacks intact rows of steps that the run has taken \(\d of \d\)"):
        resumed(copied)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": Settings(batch=4, evaluate=4, checkpoints=3, optimizer="sgd")},
        {"model": model(n_layers=1)},
        {"model": model(seed=1)},
    ],
)
def test_an_intact_state_of_another_run_is_refused(copied, tmp_path, change):
    resumed(tmp_path / "other", **change)
    shutil.copy(tmp_path / "other" / "state.safetensors", copied / "state.safetensors")
    with pytest.raises(FileRefused, match=r"state.safetensors' is the state of another run; put the right file back"):
        resumed(copied)


def test_weights_in_another_dtype_are_another_run(copied):
    with pytest.raises(InputError, match="weights are neither those that the run began with nor those of its last"):
        resumed(copied, model=model(dtype=torch.float64))


def test_a_run_that_has_just_begun_says_so(copied):
    for name in ("steps.rows", "evaluations.rows"):
        (copied / name).write_bytes(b"")
    for later in sorted((copied / "checkpoints").iterdir())[1:]:
        later.unlink()
    run = open_run(copied)
    for read in (lambda: run.loss, lambda: run.held_out_loss, run.table, run.figure):
        with pytest.raises(InputError, match=r"has no .* yet|no recorded step to draw yet"):
            read()


def test_a_page_that_looks_at_the_lock_does_not_keep_a_run_from_starting(tmp_path, monkeypatch):
    """A reader holds the lock for an instant; the run that starts in this instant waits for it."""
    import fcntl

    from hooklens.training import run_folder

    folder = RunFolder(tmp_path)
    (tmp_path / ".lock").touch()
    reader = open(tmp_path / ".lock")  # noqa: SIM115  # closed below, as the reader's end
    fcntl.flock(reader, fcntl.LOCK_SH)
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: reader.close())
    with folder.writing():
        assert folder.is_being_written()


def test_a_file_system_without_locks_is_trained_on_unguarded(tmp_path, monkeypatch):
    import errno
    import fcntl

    def without(handle, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    assert train(model(), DATA, steps=1, out=tmp_path / "run", settings=SETTINGS).steps_done == 1
    assert RunFolder(tmp_path / "run").is_being_written() is None


def test_a_relative_folder_is_found_after_the_current_one_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def move(step, loss):
        os.chdir(tmp_path / "elsewhere")

    run = train(model(), DATA, steps=3, out="run", settings=SETTINGS, after_step=move)
    assert run.steps_done == 3 and run.path == tmp_path / "run"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = train(model(), DATA, steps=1, out="~/run", settings=SETTINGS)
    assert run.path == tmp_path / "run" and open_run("~/run").steps_done == 1 and not (tmp_path / "~").exists()

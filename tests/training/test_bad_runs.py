"""Bad input to training: the message says what was asked, what was seen and what works, and nothing is lost."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from refused import refused

from hooklens.core.errors import FileRefused, HooklensError, Unavailable
from hooklens.data.batches import Batch
from hooklens.data.modular import modular_arithmetic
from hooklens.data.regression import in_context_regression
from hooklens.model.config import VectorEmbed
from hooklens.testing import tiny_model
from hooklens.training import loop
from hooklens.training.divergence import Diverged, LossWatch
from hooklens.training.loop import train
from hooklens.training.optimizers import SGD
from hooklens.training.processes import Processes
from hooklens.training.row_file import RowFile
from hooklens.training.training_run import open_run
from hooklens.training.training_settings import Settings

DATA = modular_arithmetic(p=5, fraction=0.8)
SETTINGS = Settings(batch=4, evaluate=2, checkpoints=3, schedule="constant")


def model(**changes):
    return tiny_model(**{"d_vocab": DATA.d_vocab} | changes)


def weights_of(run):
    return run.checkpoints()[-1].load().state_dict()


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def stop(step, loss):
    if step == 4:
        raise RuntimeError("stopped")


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run of 6 steps that stopped after 4, its states written at every step."""
    monkeypatch.setattr(loop, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(loop, "_SAVE_SHARE", 0)
    with pytest.raises(RuntimeError, match="stopped"):
        train(model(), DATA, steps=6, out=tmp_path / "run", settings=SETTINGS, after_step=stop)
    return tmp_path / "run"


FLAT = in_context_regression(d=2, n_points=3)


@pytest.mark.parametrize(
    ("changes", "data", "settings", "message"),
    [
        ({"d_vocab": 5}, DATA, {}, "the data have 6 tokens, this model has d_vocab 5; give d_vocab=6"),
        ({"d_vocab_out": 3}, DATA, {"batch": 20}, "the targets reach token 4, this model has d_vocab_out 3"),
        ({"n_ctx": 2}, DATA, {}, "the data have 3 positions, this model has n_ctx 2; use a smaller window"),
        ({}, FLAT, {"loss": "squared_error"}, r"this model reads tokens; give embed=VectorEmbed\(d_in=3\)"),
        ({"embed": VectorEmbed(d_in=2)}, FLAT, {}, "reads vectors of 2 numbers, and the data are vectors of 3"),
        ({"embed": VectorEmbed(d_in=2)}, DATA, {}, "reads vectors of 2 numbers, and the data are tokens"),
        ({"embed": VectorEmbed(d_in=3)}, FLAT, {}, "the targets are vectors, for the loss 'squared_error'"),
        (
            {"embed": VectorEmbed(d_in=3)},
            FLAT,
            {"loss": "squared_error"},
            "targets have 1 numbers, the model's output 6",
        ),
        ({}, DATA, {"loss": "squared_error"}, "the targets are tokens, and the loss is 'squared_error'"),
        ({"dtype": torch.float64}, DATA, {"precision": "bfloat16"}, "keeps weights in float32"),
        ({}, modular_arithmetic(p=5, fraction=1.0), {"patience": 2}, "these data hold nothing out"),
        ({}, modular_arithmetic(p=5, fraction=1.0), {"solved": 0.9}, "these data hold nothing out"),
        ({"embed": VectorEmbed(d_in=3), "d_vocab_out": 1}, FLAT, {"loss": "squared_error", "solved": 0.9}, "have none"),
        ({}, DATA, {"snapshots": ["patern"]}, "closest: pattern"),
        ({}, DATA, {"snapshots": [["pattern", 0, 7]]}, "no head 7; this model has 2 heads"),
        ({}, DATA, {"snapshots": ["pattern"], "snapshot_prompts": [[1, 2], [1]]}, r"got lengths \[1, 2\]"),
        (
            {},
            DATA,
            {"snapshots": ["pattern"], "snapshot_prompts": [[1] * 30] * 2, "evaluate": 20_000},
            "would take 0.54 GiB, at most 0.25 are kept",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run_begins(tmp_path, changes, data, settings, message):
    with pytest.raises(HooklensError, match=message):
        train(model(**changes), data, steps=10**7, out=tmp_path / "run", settings=Settings(**settings))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(HooklensError, match="a batch of 8 rows does not split into 3 equal passes"):
        Settings(batch=8, accumulate=3)
    with pytest.raises(HooklensError, match="solved_for=100 says for how long a task is solved; give solved="):
        Settings(solved_for=100)
    with pytest.raises(HooklensError, match="a batch of 5 rows does not split over 2 processes; give a batch that is"):
        Processes(count=2).rows(Batch(torch.zeros(5, 1), torch.zeros(5, 1), torch.ones(5, 1, dtype=torch.bool)))


def test_other_objects_are_refused():
    with pytest.raises(HooklensError, match=r"hl.train needs a HookedTransformer, got Linear"):
        train(torch.nn.Linear(1, 1), DATA, steps=1)
    with refused(HooklensError, r"hl.train reads data of hl.data"):
        train(model(), [[1, 2]], steps=1)
    with refused(HooklensError, r"settings= takes hooklens.training.Settings"):
        train(model(), DATA, steps=1, settings={"batch": 4})
    with pytest.raises(HooklensError, match=r"dropout is a probability from 0 to below 1, got 1.0"):
        model(dropout=1.0)


def test_a_run_that_diverged_says_so_at_once_when_it_is_called_again(tmp_path):
    settings = Settings(batch=4, optimizer=SGD(lr=1e11), schedule="constant", evaluate=1)
    with pytest.raises(Diverged) as first:
        train(model(), DATA, steps=50, out=tmp_path / "run", settings=settings)
    steps = []
    with pytest.raises(Diverged) as second:
        call = {"settings": settings, "after_step": lambda step, loss: steps.append(step)}
        train(model(), DATA, steps=50, out=tmp_path / "run", **call)
    assert str(first.value) == str(second.value) and not steps
    (kept,) = open_run(tmp_path / "run").checkpoints()  # of step 0: those from the NaN on are gone
    assert kept.step == 0 and str(kept.path) in str(first.value)


def test_a_loss_that_grows_far_beyond_its_start_stops_the_run():
    watch = LossWatch()
    faults = [watch.fault(step, 2.0 if step < 30 else 8.0, 1.0) for step in range(60)]
    assert next(step for step, fault in enumerate(faults) if fault) == 46  # 17 x 8 + 3 x 2 > 20 x 7
    assert "step 46 is 7.1, the mean of 20 steps (first 2)" in str(faults[46])
    assert LossWatch(**watch.to_json()) == watch


def test_weights_that_are_not_finite_are_not_kept_as_a_checkpoint(tmp_path):
    poisoned = model()

    def poison(step, loss):
        if step == 1:
            poisoned.blocks[1].mlp.out.weight.data[0, 0] = float("nan")

    with pytest.raises(Diverged, match=r"the loss of step 1 is nan.*not finite in"):
        train(poisoned, DATA, steps=6, out=tmp_path / "run", settings=SETTINGS, after_step=poison)
    assert [kept.step for kept in open_run(tmp_path / "run").checkpoints()] == [0]


def test_a_full_disk_stops_the_run_and_its_last_state_goes_on(tmp_path, monkeypatch):
    whole = train(model(), DATA, steps=6, out=tmp_path / "whole", settings=SETTINGS)
    monkeypatch.setattr(loop, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(loop, "_SAVE_SHARE", 0)
    replace, failing = os.replace, []

    def full(source, target):
        if "state" in str(target) and failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    fill = lambda step, loss: failing.append(step) if step == 3 else None  # noqa: E731
    with pytest.raises(Unavailable, match=r"cannot write .*state.safetensors': the disk is full .*free some space"):
        train(model(), DATA, steps=6, out=tmp_path / "run", settings=SETTINGS, after_step=fill)
    monkeypatch.setattr(os, "replace", replace)
    resumed = train(model(), DATA, steps=6, out=tmp_path / "run", settings=SETTINGS)
    assert equal(weights_of(whole), weights_of(resumed)) and (whole.loss == resumed.loss).all()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_record_says_which_file():
    with pytest.raises(Unavailable, match=r"cannot write '/dev/full'.*goes on from the last state"):
        RowFile(Path("/dev/full"), {"loss": 1})


def test_more_steps_are_a_longer_run_under_a_constant_schedule_only(tmp_path):
    whole = train(model(), DATA, steps=8, out=tmp_path / "whole", settings=SETTINGS)
    train(model(), DATA, steps=5, out=tmp_path / "run", settings=SETTINGS)
    extended = train(model(), DATA, steps=8, out=tmp_path / "run", settings=SETTINGS)
    assert (extended.loss == whole.loss).all() and equal(weights_of(extended), weights_of(whole))
    assert open_run(tmp_path / "run").identity["steps"] == 8
    with pytest.raises(HooklensError, match="steps was 8 and is 5"):
        train(model(), DATA, steps=5, out=tmp_path / "run", settings=SETTINGS)
    cosine = Settings(batch=4)
    train(model(), DATA, steps=2, out=tmp_path / "cosine", settings=cosine)
    with pytest.raises(HooklensError, match=r"steps was 2 and is 4 \(the cosine schedule depends on the planned"):
        train(model(), DATA, steps=4, out=tmp_path / "cosine", settings=cosine)


@pytest.mark.parametrize("name", ["run.json", "state.safetensors", "steps.rows"])
def test_a_corrupted_file_is_refused_by_name(stopped, name):
    raw = bytearray((stopped / name).read_bytes())
    raw[len(raw) // 2] ^= 4
    (stopped / name).write_bytes(raw)
    with pytest.raises(FileRefused, match=name):
        train(model(), DATA, steps=6, out=stopped, settings=SETTINGS)


def test_rows_behind_the_last_state_may_be_anything(stopped):
    with open(stopped / "steps.rows", "ab") as file:
        file.write(bytes(500))
    assert train(model(), DATA, steps=6, out=stopped, settings=SETTINGS).steps().steps.tolist() == list(range(6))


def test_a_lost_state_begins_again_and_a_lost_record_is_refused(stopped):
    (stopped / "steps.rows").unlink()
    with pytest.raises(FileRefused, match=r"steps.rows lacks intact rows of steps that the run has taken"):
        train(model(), DATA, steps=6, out=stopped, settings=SETTINGS)
    (stopped / "state.safetensors").unlink()
    assert train(model(), DATA, steps=6, out=stopped, settings=SETTINGS).steps_done == 6


def test_frozen_weights_stay_and_belong_to_the_run(tmp_path):
    def frozen(seed=0):
        part = model(seed=seed)
        part.embed.weight.requires_grad_(False)
        return part

    run = train(frozen(), DATA, steps=3, out=tmp_path / "run", settings=SETTINGS)
    assert "embed" not in run.layers and torch.equal(weights_of(run)["embed.weight"], frozen().embed.weight)
    other = frozen()
    other.embed.weight.data[0, 0] += 1
    with pytest.raises(HooklensError, match="the weights that are not trained are not those of the run"):
        train(other, DATA, steps=3, out=tmp_path / "run", settings=SETTINGS)


def test_tensorboard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Unavailable, match=r"pip install 'hooklens\[tensorboard\]'"):
        train(model(), DATA, steps=1, out=tmp_path / "run", settings=SETTINGS, tensorboard=True)
    assert train(model(), DATA, steps=1, out=tmp_path / "run", settings=SETTINGS).steps_done == 1


def test_tensorboard_gets_every_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(model(), DATA, steps=3, out=tmp_path / "run", settings=SETTINGS, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(run.loss.tolist())

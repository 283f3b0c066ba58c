"""Progress measures of a run, from its folder: each column is what the function says of the loaded checkpoint."""

import shutil

import pytest
import torch

from hooklens.core.errors import InputError
from hooklens.data.markov_chains import markov_source
from hooklens.data.modular import modular_arithmetic
from hooklens.plugins.algorithmic.fourier import (
    excluded_loss,
    formula_coefficients,
    measure_fourier_spectrum,
    measure_progress,
    restricted_loss,
    run_pairs,
    task_of,
)
from hooklens.testing import tiny_model
from hooklens.training.loop import train
from hooklens.training.training_settings import Settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = modular_arithmetic(p=7, fraction=0.6, seed=3)
    settings = Settings(batch=49, checkpoints=2, evaluate=2)
    return train(tiny_model(d_vocab=8), data, steps=4, settings=settings, out=tmp_path_factory.mktemp("runs") / "run")


def test_every_measure_at_every_checkpoint(run):
    measured = measure_progress(run.path, frequencies=[3, 1])
    assert measured.frequencies.tolist() == [1, 3] and measured.steps.tolist() == [0, 1, 4]
    for i, checkpoint in enumerate(run.checkpoints()):
        model = checkpoint.load()
        table = run_pairs(model, task_of(run))
        expected = {
            "loss": table.loss,
            "train_loss": float(table.losses[table.trained].mean()),
            "held_out_loss": float(table.losses[~table.trained].mean()),
            "held_out_accuracy": float(table.correct[~table.trained].double().mean()),
            "restricted": restricted_loss(table.logits, [1, 3]),
            "excluded": excluded_loss(table.logits, [1, 3], table.trained),
            "gini_embedding": measure_fourier_spectrum(model, 7).gini_embedding,
            "squared_weights": sum(parameter.double().square().sum().item() for parameter in model.parameters()),
        }
        # the model is float32, and with its neurons listened to it runs another kernel
        close = 8 * torch.finfo(torch.float32).eps
        for name, value in expected.items():
            assert abs(float(getattr(measured, name)[i]) - value) < close * max(1, abs(value)), name
        assert torch.allclose(measured.coefficients[i], formula_coefficients(table.logits)[[0, 2]], atol=close)
    assert len(measured.table().rows) == 3


def test_the_task_of_a_run_is_the_one_it_was_trained_on(run):
    assert task_of(run.path) == modular_arithmetic(p=7, fraction=0.6, seed=3)


def test_a_run_without_key_frequencies_or_of_another_task_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="did not grok"):
        measure_progress(run)
    with pytest.raises(InputError, match="1 to p // 2 = 3"):
        measure_progress(run, frequencies=[4])
    other = train(tiny_model(d_vocab=4), markov_source(4), steps=1, out=tmp_path / "other")
    with pytest.raises(InputError, match=r"not trained on hl\.data\.modular_arithmetic"):
        measure_progress(other)


def test_a_run_without_its_checkpoints_is_said_to_be(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("*step_*"))
    with pytest.raises(InputError, match="has no checkpoint: they were removed"):
        measure_progress(tmp_path / "run")

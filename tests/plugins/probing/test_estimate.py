"""How long a probe will take is said before the first point, and by about what is fitted."""

import torch

from hooklens.plugins.probing import probe_training as train
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.probes import Ridge
from hooklens.plugins.probing.scoring import Trainer
from hooklens.testing import tiny_model


def test_no_estimate_was_given_before_the_first_point_was_done(monkeypatch):
    """The time came with the first point's end, which of many texts is minutes away."""
    said, fitted, whole = [], [], Trainer.cross_validate
    monkeypatch.setattr(train, "say_estimate", lambda what, seconds: said.append((what, seconds, len(fitted))))
    monkeypatch.setattr(Trainer, "cross_validate", lambda *a, **k: (fitted.append(1), whole(*a, **k))[1])
    train.train_probe(model := tiny_model(), odd_first(model), kind=Ridge(), null_draws=19)
    assert [(what, done) for what, _, done in said] == [("probes at 2 points", 0)] and len(fitted) == 2


def test_as_many_fits_are_foretold_as_are_made(monkeypatch):
    said, made = [], []

    class Counted(Ridge):
        def said_of_many(self, x, labels, asked, n_classes):
            made.append(len(labels))
            return super().said_of_many(x, labels, asked, n_classes)

    monkeypatch.setattr(train, "_a_fit", lambda *a: 1.0)
    monkeypatch.setattr(train, "say_estimate", lambda what, seconds: said.append(seconds))
    train.train_probe(model := tiny_model(), odd_first(model), kind=Counted(), null_draws=19)
    beside = 2 * 5  # the two embeddings, fold by fold, which need no point
    assert torch.tensor(said).item() == sum(made) - beside

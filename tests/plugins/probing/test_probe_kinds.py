"""Each kind of probe against scikit-learn, and against what is known of two Gaussians."""

import math

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hooklens.core.errors import InputError
from hooklens.plugins.probing.confidence import Calibration, temperature
from hooklens.plugins.probing.folds import make_folds
from hooklens.plugins.probing.probes import PROBES, Logistic, MassMean, Probe, Ridge, WhitenedMassMean
from hooklens.plugins.probing.scoring import Trainer, majority

PEERS = {
    "logistic": (  # at the default tolerance of 1e-4 one example of the third fold lies on the other side
        Logistic(c=0.3),
        lambda: make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=10_000, tol=1e-6)),
    ),
    "ridge": (Ridge(alpha=7.0), lambda: make_pipeline(StandardScaler(), RidgeClassifier(alpha=7.0))),
    "mass-mean": (MassMean(), NearestCentroid),
    "whitened mass-mean": (
        WhitenedMassMean(),
        lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[1 / 2] * 2),
    ),
}


def gaussians(distance: float, n: int = 4000, d: int = 6, seed: int = 0):
    """Two classes whose means lie `distance` standard deviations apart along (1, 2, 0, ...), far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.zeros(d, dtype=torch.float64)
    where[:2] = torch.tensor([1.0, 2.0]) / math.sqrt(5)
    label = torch.arange(n) % 2
    x = 3 * torch.randn(n, d, generator=generator, dtype=torch.float64) + 3 * distance * label[:, None] * where + 50
    return x, label, where


def classes(k: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(120) % k
    means = torch.randn(k, 9, generator=generator, dtype=torch.float64)
    noise = torch.randn(120, 9, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 3, 9)
    return means[label] + noise + 7, label


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", PEERS)
def test_scores_are_those_of_scikit_learn(name, k):
    kind, peer = PEERS[name]
    if k == 3 and name == "whitened mass-mean":
        peer = lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[1 / 3] * 3)  # noqa: E731
    x, label = classes(k)
    folds = make_folds(label, torch.arange(120))
    trainer, rows = Trainer(kind, k), x.numpy()
    scored, right = trainer.cross_validate(rows, label[None], folds), trainer.correct(rows, label[None], folds)[0]
    for fold in folds:
        fitted = peer().fit(x.numpy()[fold.train], label.numpy()[fold.train])
        expected = fitted.predict(x.numpy()[fold.test])
        assert np.array_equal(scored.logits[fold.test].argmax(1).numpy(), expected)
        assert np.array_equal(right[fold.test].numpy().astype(bool), expected == label.numpy()[fold.test])
    for f, fold in enumerate(folds):
        inner = [
            peer().fit(x[a].numpy(), label[a].numpy()).predict(x[b].numpy()) == label[b].numpy() for a, b in fold.inner
        ]
        assert float(scored.inner[0, f]) == pytest.approx(np.concatenate(inner).mean())


@pytest.mark.parametrize("kind", [Logistic(), Logistic(c=1.0), Ridge(), MassMean()], ids=str)
@pytest.mark.parametrize("n, d, k", [(40, 90, 2), (40, 90, 3), (90, 8, 2), (90, 8, 3)])
def test_many_labellings_at_once_are_read_as_one_at_a_time(kind, n, d, k):
    """Rows in more or fewer dimensions than there are rows, some of them constant; a label that is nearly separable."""
    generator = torch.Generator().manual_seed(n)
    scale = 10 ** torch.linspace(-2, 2, d, dtype=torch.float64)
    x = (torch.randn(n + 10, d, generator=generator, dtype=torch.float64) * scale).numpy()
    x[:, 3], x[:, 4] = 7.0, 0.0
    labels = torch.stack([torch.randperm(n, generator=generator) % k for _ in range(4)])
    labels[0] = torch.from_numpy(x[:n, 0].argsort().argsort()) * k // n
    many = kind.said_of_many(x[:n], labels, x[n:], k).softmax(2)
    for found, label in zip(many, labels, strict=True):
        one = torch.from_numpy(kind.fit(x[:n], label.numpy(), k).logits(x[n:])).softmax(1)
        torch.testing.assert_close(found, one, atol=1e-4, rtol=0)


def test_logits_of_logistic_regression_are_scikit_learns():
    for k in (2, 3):
        x, label = classes(k)
        peer = PEERS["logistic"][1]().fit(x.numpy(), label.numpy())
        logits = torch.from_numpy(Trainer(Logistic(c=0.3), k).fit(x.numpy(), label.numpy()).logits(x.numpy()))
        torch.testing.assert_close(logits.softmax(1).numpy(), peer.predict_proba(x.numpy()), atol=1e-8, rtol=0)


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", PEERS)
def test_two_gaussians_are_told_apart_as_well_as_can_be(name, distance):
    """Phi(d' / 2), within three standard errors of 4,000 examples and what fitting six weights costs."""
    kind = PEERS[name][0]
    x, label, where = gaussians(distance)
    folds = make_folds(label, torch.arange(len(label)))
    best = 0.5 * (1 + math.erf(distance / 2 / math.sqrt(2)))
    right = Trainer(kind, 2).correct(x.numpy(), label[None], folds)
    assert float(right.mean()) == pytest.approx(best, abs=3 * 0.008)
    if distance:
        fitted = Trainer(kind, 2).fit(x.numpy(), label.numpy())
        for part, least in ((fitted.weight, 0.99), (fitted.step, 0.98)):  # features of the noise's own variance
            across = part[1] - part[0]
            assert across @ where.numpy() / np.linalg.norm(across) > least


def test_the_mass_mean_direction_is_the_difference_of_the_means():
    x, label = classes(2)
    weight, bias, step = map(torch.from_numpy, Trainer(MassMean(), 2).fit(x.numpy(), label.numpy()))
    means = torch.stack([x[label == one].mean(0) for one in range(2)])
    probe = Probe(weight, bias, means, step=step)
    torch.testing.assert_close(probe.normal, probe.direction, atol=1e-12, rtol=0)
    across = means[1] - means[0]
    torch.testing.assert_close(probe.direction, across / across.norm(), atol=1e-12, rtol=0)
    assert probe.gap == pytest.approx(float(across.norm()))
    halfway = means.mean(0)
    assert probe.middle == pytest.approx(float(halfway @ probe.direction))
    torch.testing.assert_close(*probe(halfway), atol=1e-10, rtol=0)
    assert probe.predict(halfway + across).item() == 1 and probe.predict(halfway - across).item() == 0


def test_ignoring_how_features_vary_costs_the_mass_mean_and_not_the_whitened_one():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(2000) % 2
    noise = (
        torch.randn(2000, 2, generator=generator, dtype=torch.float64) @ torch.tensor([[3.0, 3.0], [0.0, 0.3]]).double()
    )
    x = noise + label[:, None] * torch.tensor([1.0, -0.5]).double()
    folds = make_folds(label, torch.arange(2000))
    plain, whitened = (
        float(Trainer(kind, 2).correct(x.numpy(), label[None], folds)[0].mean())
        for kind in (MassMean(), WhitenedMassMean())
    )
    assert plain < 0.85 and whitened > 0.95


@pytest.mark.parametrize("name", PEERS)
def test_a_step_is_steepest_as_the_fit_measures_length(name):
    """Standardised rows have the same probe with weights for steps, and moving by the gap swaps the class means."""
    kind = PEERS[name][0]
    x, label = classes(2)
    x = x * torch.logspace(-2, 2, 9, dtype=torch.float64)
    weight, bias, step = map(torch.from_numpy, Trainer(kind, 2).fit(x.numpy(), label.numpy()))
    means = torch.stack([x[label == one].mean(0) for one in range(2)])
    probe = Probe(weight, bias, means, step=step)
    moved = means[0] + probe.gap * probe.direction
    torch.testing.assert_close(probe.coordinate(moved), probe.coordinate(means[1]), atol=1e-9, rtol=1e-9)
    if name in ("logistic", "ridge"):
        scaled = Trainer(kind, 2).fit((x / x.std(0, correction=0)).numpy(), label.numpy())
        found = scaled.step[1] - scaled.step[0]
        np.testing.assert_allclose(found, scaled.weight[1] - scaled.weight[0], rtol=1e-6)
        np.testing.assert_allclose((step[1] - step[0]) / x.std(0, correction=0), found, rtol=1e-6)
    else:
        torch.testing.assert_close(step[1] - step[0], means[1] - means[0])


def test_a_class_that_the_rows_lack_is_never_said():
    x, label = classes(3)
    for kind in PROBES.values():
        rows = (label != 1).numpy()
        logits = Trainer(kind, 3).fit(x.numpy()[rows], label.numpy()[rows]).logits(x.numpy())
        assert set(logits.argmax(1).tolist()) == {0, 2}
        one = Trainer(kind, 3).fit(x.numpy()[:1], label.numpy()[:1]).logits(x.numpy())
        assert set(one.argmax(1).tolist()) == {0}


def test_features_that_never_change_do_no_harm():
    x, label = classes(2)
    x = torch.cat([x, torch.full((120, 2), 1e6, dtype=torch.float64)], 1)
    for kind in PROBES.values():
        assert all(np.isfinite(part).all() for part in Trainer(kind, 2).fit(x.numpy(), label.numpy()))


def test_the_majority_is_that_of_the_rows_that_are_fitted_on():
    label = torch.tensor([0, 1, 1] * 20)
    folds = make_folds(label, torch.arange(60))
    assert torch.equal(majority(label, folds), (label == 1).double())


def test_a_probe_is_a_module():
    probe = Probe(torch.eye(3), torch.zeros(3), torch.eye(3), classes=["a", "b", "c"], point="blocks.0.hook_resid_post")
    assert {name for name, _ in probe.named_parameters()} == {"weight", "bias"} and "a | b | c" in repr(probe)
    assert probe(torch.eye(3).expand(2, 3, 3)).shape == (2, 3, 3)
    copy = Probe(torch.zeros(3, 3), torch.zeros(3), torch.zeros(3, 3))
    copy.load_state_dict(probe.state_dict())
    assert torch.equal(copy.means, probe.means)
    assert not any(hasattr(probe, name) for name in ("direction", "normal", "gap", "middle"))
    with pytest.raises(InputError, match="this probe has 3"):
        probe.direction  # noqa: B018


# -- calibration


def test_what_is_calibrated_has_no_error_and_the_brier_score_of_its_variance():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=generator, dtype=torch.float64)
    label = (torch.rand(200_000, generator=generator, dtype=torch.float64) < p).long()
    made = Calibration.of(torch.stack([1 - p, p], 1), label)
    assert made.ece < 0.005
    assert made.brier == pytest.approx(1 / 6, abs=0.002)  # the mean of p (1 - p)
    assert made.brier_of_shares == pytest.approx(1 / 4, abs=0.001)
    sure = (torch.stack([1 - p, p], 1) > 0.5).double()
    assert Calibration.of(sure, label).ece == pytest.approx(1 / 4, abs=0.01)


def test_brier_and_bins_by_hand():
    made = Calibration.of(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]), torch.tensor([1, 2]))
    assert made.brier == pytest.approx(((0.49 + 0.64 + 0.01) + (0.01 + 0.01 + 0.04)) / 2)
    assert made.ece == pytest.approx((0.7 + 0.2) / 2) and made.count[[7, 8]].tolist() == [1, 1]
    assert len(made.table()) == 2 and len(made.table(1)) == 1 and made.figure().data


def test_the_temperature_undoes_a_factor():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50_000, 3, generator=generator, dtype=torch.float64)
    label = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert temperature(1000 * logits, label) == pytest.approx(1 / 1000, rel=0.02)
    assert temperature(logits / 1000, label) == pytest.approx(1000, rel=0.02)

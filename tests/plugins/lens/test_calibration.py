"""Calibration: a model that predicts a Markov source's distribution is calibrated, one three times as sure is not."""

import json
import math
from importlib import import_module

import pytest
import torch
from model.zoo import TOKENS, zoo_model

from hooklens.core.errors import InputError
from hooklens.model.config import Biases
from hooklens.plugins.lens import reading
from hooklens.plugins.lens.calibration import Calibration, measure_calibration
from hooklens.testing import tiny_model

module = import_module("hooklens.plugins.lens.calibration")  # the package has a function of that name

N = 6


def transition(seed=0, sharpness=1.5):
    """A Markov source: rows sum to 1."""
    logits = torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sharpness * logits).softmax(-1)


def predicting(probs, sharpness=1.0):
    """A model whose prediction after token i is softmax(sharpness * log probs[i])."""
    sizes = {"d_model": N, "d_vocab": N, "n_layers": 1, "n_heads": 1, "n_ctx": 64, "dtype": torch.float64}
    none = Biases(qkv=False, o=False)
    model = tiny_model(**sizes, attn_only=True, normalization_type=None, positional_embedding_type="none", biases=none)
    with torch.no_grad():
        model.W_E.copy_(torch.eye(N))
        model.blocks[0].attn.o.weight.zero_()
        model.W_U.copy_(sharpness * probs.log())
    return model


def texts(probs, n=300, length=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.multinomial(stationary(probs), n, replacement=True, generator=generator)]
    for _ in range(length - 1):
        tokens.append(torch.multinomial(probs[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1)


def stationary(probs):
    return torch.linalg.matrix_power(probs, 200)[0]


def test_cross_entropy_minus_entropy_rate_is_the_kl():
    """Exactly, by going through every pair of tokens with its own probability."""
    source, other = transition(), transition(seed=5)
    pairs = torch.cartesian_prod(torch.arange(N), torch.arange(N))
    weight = (stationary(source)[:, None] * source).flatten()
    found = measure_calibration(predicting(other), pairs)
    rate = -(weight * source.log().flatten()).sum()
    kl = (stationary(source)[:, None] * source * (source / other).log()).sum()
    torch.testing.assert_close((weight * found.loss[:, 0]).sum(), rate + kl, atol=1e-10, rtol=0)
    own = measure_calibration(predicting(source), pairs)
    torch.testing.assert_close((weight * own.loss[:, 0]).sum(), rate, atol=1e-10, rtol=0)
    torch.testing.assert_close((weight * own.entropy[:, 0]).sum(), rate, atol=1e-10, rtol=0)


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_sources_own_distribution_is_calibrated(adaptive):
    probs = transition()
    found = measure_calibration(predicting(probs), texts(probs), adaptive=adaptive)
    low, high = found.surplus_interval()
    assert low < 0 < high
    assert found.p > 0.05 and found.expected_error < found.null.max()
    assert found.loss.mean() < found.unigram < found.uniform == math.log(N)


@pytest.mark.parametrize(("sharpness", "sign"), [(3.0, 1), (0.3, -1)])
def test_one_that_is_too_sure_or_not_sure_enough_is_not(sharpness, sign):
    probs = transition()
    found = measure_calibration(predicting(probs, sharpness), texts(probs))
    low, high = found.surplus_interval()
    assert (low if sign > 0 else -high) > 0  # the loss lies above the entropy, or below it
    assert found.p < 0.01 and found.expected_error > 3 * found.null.max()
    low, high = found.expected_error_interval()
    assert found.null.max() < low < found.expected_error < high


@pytest.mark.slow
def test_intervals_and_p_values_of_forty_samples_from_the_source():
    """About 95 % of the intervals of loss minus entropy contain its mean, 0; the p-values fill the unit interval."""
    probs = transition()
    model, covered, ps = predicting(probs), 0, []
    for seed in range(40):
        found = measure_calibration(model, texts(probs, n=40, length=8, seed=seed), n_bins=5)
        low, high = found.surplus_interval()
        covered += low <= 0 <= high
        ps.append(found.p)
    assert 33 <= covered <= 40
    assert sum(p < 0.05 for p in ps) <= 6 and sum(p > 0.5 for p in ps) >= 10


def test_every_number_by_hand():
    model = zoo_model("gemma2", dtype=torch.float64)
    found = measure_calibration(model, TOKENS, n_bins=3, adaptive=False)
    log_probs = model(TOKENS).log_softmax(-1)[:, :-1]
    expected = -log_probs.gather(2, TOKENS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.loss, expected.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.entropy, -(log_probs.exp() * log_probs).sum(-1).detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.confidence, log_probs.exp().amax(-1).detach(), atol=1e-10, rtol=0)
    assert torch.equal(found.correct, log_probs.argmax(-1) == TOKENS[:, 1:])
    error = 0.0
    for low, high in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)):
        inside = (found.confidence > low) & (found.confidence <= high)
        if inside.any():
            gap = found.confidence[inside].mean() - found.correct[inside].double().mean()
            error += float(inside.double().mean() * gap.abs())
    assert abs(found.expected_error - error) < 1e-10


def test_adaptive_bins_hold_equally_many():
    found = measure_calibration(zoo_model("gpt2"), texts(transition(), n=40, length=8), n_bins=7)
    counts = found.counts.sum(0)
    assert len(counts) == 7 and (counts - 40).abs().max() <= 4  # texts that begin alike tie
    same = measure_calibration(predicting(transition().mean(0).expand(N, N)), texts(transition(), n=40, length=8))
    assert same.counts.sum() == 280 and len(same.edges) <= 3  # one confidence: one bin, not fifteen


def test_texts_in_groups_are_texts_together(monkeypatch):
    model, tokens = tiny_model(), torch.arange(60).view(10, 6) % 11
    whole = measure_calibration(model, tokens)
    monkeypatch.setattr(reading, "_STREAMS_AT_ONCE", 1000)
    parts = measure_calibration(model, tokens)
    torch.testing.assert_close(parts.loss, whole.loss)
    assert torch.equal(parts.correct, whole.correct)


def test_what_cannot_be_predicted_is_refused():
    model = tiny_model()
    with pytest.raises(InputError, match="two tokens"):
        measure_calibration(model, [[1]])
    with pytest.raises(InputError, match="n_bins"):
        measure_calibration(model, TOKENS, n_bins=0)
    with pytest.raises(InputError, match="one length"):
        measure_calibration(model, [[1, 2], [1, 2, 3]])


def test_tables_figures_files(tmp_path):
    found = measure_calibration(tiny_model(), TOKENS)
    assert sum(row[1] for row in found.table().rows) == 8
    assert len(found.summary()) == 5 and "by chance" in str(found.summary())
    losses = [row[3] for row in found.top_tokens(4).rows]
    assert losses == sorted(losses, reverse=True) and losses[0] == float(found.loss.max())
    assert found.top_tokens(1).rows[0][0] == repr(
        found.str_tokens[found.top_tokens(1).rows[0][1]][found.top_tokens(1).rows[0][2]]
    )
    found.figure().to_json()
    assert 'title="1' in found.token_figure(1)
    found.save(tmp_path / "found.safetensors")
    assert Calibration.load(tmp_path / "found.safetensors").expected_error == found.expected_error
    json.dumps(found.to_json(), allow_nan=False)
    one = measure_calibration(tiny_model(), TOKENS[:1])
    assert math.isnan(one.expected_error_interval()[0]) and math.isnan(one.surplus_interval()[0])
    one.figure().to_json()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_bits_of_a_confidence_say_nothing_about_its_bin(dtype):
    """Edges were confidences themselves, so that another kernel's rounding moved predictions between bins."""
    confidence = torch.rand(7, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    confidence[:, ::5] = confidence[0, 0]  # many of one value, up to rounding
    edges = module._edges(confidence, 15, adaptive=True)
    nudged = confidence * (1 + torch.finfo(dtype).eps * torch.randint(-4, 5, confidence.shape))
    one, other = (torch.bucketize(each, edges[1:-1]) for each in (confidence, nudged))
    assert len(edges) > 8 and torch.equal(one, other)
    again = torch.bucketize(nudged, module._edges(nudged, 15, adaptive=True)[1:-1])
    assert torch.equal(again, one)

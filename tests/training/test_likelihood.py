"""Mean negative log-likelihood, cross-entropy and KL divergence are one thing, up to an entropy."""

import math

import numpy as np
import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import InputError, WrongType
from hooklens.data.text_windows import TextWindows
from hooklens.data.vocabularies import byte_tokenizer
from hooklens.testing import tiny_model
from hooklens.training.likelihood import (
    compressed_nats,
    empirical_divergence,
    measure_likelihood,
    source_divergence,
)


def test_on_a_markov_source_all_three_agree():
    source = hl.data.markov_source(5, window=12, seed=2)
    model = tiny_model(d_vocab=5, n_ctx=12, dtype=torch.float64)
    measured = measure_likelihood(model, source, size=24)
    assert measured.n_targets == 64 * 12 and measured.how == "the source's transition probabilities"
    # the mean negative log-likelihood, by torch, over the same targets
    losses = [
        torch.nn.functional.cross_entropy(model(batch.inputs).transpose(1, 2), batch.targets, reduction="none")
        for batch in source.held_out(64)
    ]
    assert measured.loss == pytest.approx(float(losses[0].detach().mean()), abs=1e-12)
    assert measured.empirical_cross_entropy == pytest.approx(measured.loss, abs=1e-12)
    for of in ("empirical", "source"):
        cross, entropy, kl = (getattr(measured, f"{of}_{name}") for name in ("cross_entropy", "entropy", "kl"))
        assert cross - entropy == pytest.approx(kl, abs=1e-12) and kl > 0 and entropy > 0
    # what occurred is a sample of what could have
    assert abs(measured.loss - measured.source_cross_entropy) < 4 * measured.standard_error
    assert abs(measured.source_entropy - source.entropy_rate()) < 0.1
    assert 5 < measured.n_contexts <= measured.n_targets
    table = measured.table()
    assert table.columns[0] == "compared with" and [row[0] for row in table.rows] == ["these tokens", "their source"]


def test_a_model_that_is_the_source_has_no_divergence_from_it():
    source = hl.data.markov_source(4, seed=1)
    inputs = torch.arange(4).repeat(3)
    seen = source_divergence(source.transitions[inputs], source.transitions[inputs].log())
    assert abs(seen.kl) < 1e-12 and seen.cross_entropy == pytest.approx(seen.entropy, abs=1e-12)
    # weighted by the stationary distribution, the numbers are the source's own
    predicted = torch.full((4, 4), 0.25, dtype=torch.float64)
    per_state = [source_divergence(source.transitions[[i]], predicted[[i]].log()) for i in range(4)]
    weights = source.stationary.tolist()
    for name, value in (
        ("entropy", source.entropy_rate()),
        ("cross_entropy", source.cross_entropy(predicted)),
        ("kl", source.kl(predicted)),
    ):
        total = sum(w * getattr(state, name) for w, state in zip(weights, per_state, strict=True))
        assert total == pytest.approx(value, abs=1e-12)


def test_what_never_follows_adds_nothing():
    probs = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    seen = source_divergence(probs, torch.tensor([[-math.inf, 0.0]], dtype=torch.float64))
    assert (seen.cross_entropy, seen.entropy, seen.kl) == (0, 0, 0)
    # a model with more tokens than the source
    wide = source_divergence(probs, torch.full((1, 4), 0.25, dtype=torch.float64).log())
    assert wide.kl == pytest.approx(math.log(4), abs=1e-12)


def test_the_frequencies_of_the_tokens_are_the_most_likely_predictions():
    contexts, targets = list("xxxxyy"), torch.tensor([0, 0, 0, 1, 1, 1])
    frequencies = torch.tensor([[0.75, 0.25], [0.0, 1.0]], dtype=torch.float64)
    best = frequencies[[0, 0, 0, 0, 1, 1]].log()
    seen = empirical_divergence(best, targets, contexts)
    assert seen.kl == pytest.approx(0, abs=1e-12)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) * 4 / 6
    assert seen.entropy == pytest.approx(entropy, abs=1e-12) and seen.cross_entropy == pytest.approx(entropy, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.rand(2, 2, dtype=torch.float64, generator=generator).log_softmax(-1)[[0, 0, 0, 0, 1, 1]]
        assert empirical_divergence(other, targets, contexts).cross_entropy > seen.cross_entropy


def windows_of(tokens, window=8):
    return TextWindows("numbers", tokens, len(tokens) * 9 // 10, byte_tokenizer(), window)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_the_compressor_bounds_a_known_entropy_from_above(kind):
    random = np.random.default_rng(0).integers(0, 256, 20_000).astype(kind)
    assert math.log(256) <= compressed_nats(windows_of(random)) < 1.02 * math.log(256)
    assert compressed_nats(windows_of(np.tile(np.arange(50, dtype=kind), 400))) < 0.05
    source = hl.data.markov_source(6, window=499, seed=3)
    tokens = source.sample(40, torch.Generator().manual_seed(0)).flatten().numpy().astype(kind)
    bound = compressed_nats(windows_of(tokens))
    assert source.entropy_rate() < bound < source.entropy_rate() + 0.6
    large = np.random.default_rng(0).integers(0, 1000, 20_000).astype(kind)
    assert math.log(1000) < compressed_nats(windows_of(large)) < 1.2 * math.log(1000)


def test_on_text_the_entropy_is_an_estimate(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question. " * 60)
    data = hl.data.text(path, window=8)
    model = tiny_model(d_vocab=data.d_vocab, n_ctx=8, dtype=torch.float64)
    measured = measure_likelihood(model, data)
    assert "lzma" in measured.how and measured.source_cross_entropy == measured.loss
    assert measured.empirical_cross_entropy == pytest.approx(measured.loss, abs=1e-12)
    assert measured.source_entropy == pytest.approx(compressed_nats(data), abs=1e-12)
    assert measured.source_kl == measured.source_cross_entropy - measured.source_entropy > 0
    path = tmp_path / "measured.safetensors"
    measured.save(path)
    assert type(measured).load(path).loss == measured.loss


def test_data_without_a_known_entropy_are_refused():
    with refused(WrongType, "known for a Markov source and estimated for a text, got Modular"):
        measure_likelihood(tiny_model(), hl.data.modular_arithmetic(5))
    with pytest.raises(InputError, match="the model predicts 11 tokens, and the data have 20"):
        measure_likelihood(tiny_model(d_vocab=20, d_vocab_out=11), hl.data.markov_source(20, window=4))


def test_the_headline_said_the_loss_twice():
    measured = hl.training.measure_likelihood(tiny_model(d_vocab=2), hl.data.markov_source(2, window=8))
    assert measured.headline().count("loss") == 1

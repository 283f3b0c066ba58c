"""Token lists of singular directions and neurons: they add up to what the model computes, and chance stays chance."""

import pytest
import torch
from model.zoo import TOKENS, zoo_model
from refused import refused

from hooklens.core.component import Component
from hooklens.core.errors import HooklensError, InputError
from hooklens.model.config import Biases
from hooklens.plugins.weights.angles import measure_angles
from hooklens.plugins.weights.matrices import embedding_rows, folded_heads, folded_neurons, unembedding_rows
from hooklens.plugins.weights.neurons import read_neurons
from hooklens.plugins.weights.ranked_tokens import Side, list_tokens, random_vectors
from hooklens.plugins.weights.singular_directions import (
    mlp_read_directions,
    mlp_write_directions,
    ov_directions,
    qk_directions,
)
from hooklens.testing import same, tiny_model


def unbiased(name, **changes):
    return zoo_model(name, dtype=torch.float64, biases=Biases(qkv=False, o=False, mlp=False), **changes)


@pytest.mark.parametrize("name", ["llama", "gemma2", "parallel_attn_only"])
def test_reads_times_singular_values_times_writes_is_what_a_head_writes_about_a_lone_token(name):
    """One token: the head looks at itself, so that its result is the sum over directions."""
    model = unbiased(name, normalization_type="RMS")
    for head in range(2):
        found = ov_directions(model, 0, head, k=4, top=11)
        score = torch.zeros(11, 4, dtype=torch.float64)
        for i in range(4):
            score[found.lists[0].high[i], i] = found.lists[0].high_score[i]
        wrote = score * found.singular @ found.right
        for token in range(11):
            result = model.run_with_cache([[token]], names=("result", 0))[1]["result", 0][0, 0, head]
            post = model.blocks[0].ln1_post
            result = result if post is None else post.linearised(result, torch.ones(1))
            torch.testing.assert_close(wrote[token], result, atol=1e-9, rtol=1e-9)
        logits = found.right @ unembedding_rows(model).T
        torch.testing.assert_close(found.lists[1].high_score, logits.sort(descending=True).values, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_queries_times_singular_values_times_keys_is_a_token_s_score_with_itself(name):
    """Rotary turns cancel at equal positions."""
    model = unbiased(name, normalization_type="RMS")
    found = qk_directions(model, 0, 1, k=4, top=11)
    rows = embedding_rows(model, model.blocks[0].reads_through("attn"))
    scores = ((rows @ found.left.T) * found.singular * (rows @ found.right.T)).sum(1)
    for token in range(11):
        seen = model.run_with_cache([[3, token]], names=("attn_scores", 0))[1]["attn_scores", 0][0, 1, 1, 1]
        assert scores[token].item() == pytest.approx(seen.item() * model.blocks[0].attn.scale, abs=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_directions_are_the_dense_decomposition_with_one_sign_for_both_sides(name):
    model = zoo_model(name, dtype=torch.float64)
    found, M = ov_directions(model, 1, 1, k=3), folded_heads(model, 1).OV[1].AB
    for i in range(3):
        torch.testing.assert_close(found.left[i] @ M, found.singular[i] * found.right[i], atol=1e-10, rtol=1e-10)
        assert found.left[i].abs().max() == found.left[i].max()
    torch.testing.assert_close(found.share, torch.linalg.svdvals(M)[:3].square() / M.square().sum())
    reads, writes = mlp_read_directions(model, 0, k=3), mlp_write_directions(model, 0, k=3)
    matrices = folded_neurons(model, 0)
    torch.testing.assert_close((reads.left @ matrices.reads).norm(dim=1), reads.singular, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close((writes.right @ matrices.writes.T).norm(dim=1), writes.singular, atol=1e-10, rtol=1e-10)
    if model.cfg.gated_mlp:
        gate = mlp_read_directions(model, 0, gate=True, k=3)
        torch.testing.assert_close((gate.left @ matrices.gate).norm(dim=1), gate.singular, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox"])
def test_a_neurons_lists_are_its_preactivation_on_lone_tokens_and_the_logits_it_adds(name):
    model = unbiased(name, normalization_type="RMS")
    with torch.no_grad():
        model.blocks[0].attn.o.weight.zero_()  # the MLP then reads the embedding
    found = read_neurons(model, 0, top=11)
    first = found.reads if found.gate is None else found.gate
    for token in range(11):
        _, cache = model.run_with_cache([[token]], names=["pre", *(["pre_linear"] if found.gate else [])])
        for one, site in ((first, "pre"), *([(found.reads, "pre_linear")] if found.gate else [])):
            score = torch.where(one.high == token, one.high_score, 0.0).sum(1)
            torch.testing.assert_close(score, cache[site, 0][0, 0], atol=1e-9, rtol=1e-9)
    wrote = folded_neurons(model, 0).writes
    final = model.ln_final.linearised(wrote, torch.ones(1)) @ model.W_U
    torch.testing.assert_close(found.writes.high_score, final.sort(descending=True).values, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.writes.low_score, final.sort().values, atol=1e-9, rtol=1e-9)


def test_kurtosis_and_cosine_are_those_of_their_definitions():
    model = zoo_model("gpt2", dtype=torch.float64, d_vocab=50)
    found, wrote = read_neurons(model, 1, [4, 9, 2]), folded_neurons(model, 1).writes[[4, 9, 2]]
    rows = unembedding_rows(model)
    scores = wrote @ rows.T
    deviations = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(found.writes.kurtosis, deviations.pow(4).mean(1) - 3, atol=1e-10, rtol=1e-10)
    cosines = torch.nn.functional.cosine_similarity(wrote[:, None], rows[None], dim=-1).abs().amax(1)
    torch.testing.assert_close(found.writes.cosine, cosines, atol=1e-10, rtol=1e-10)
    reads = folded_neurons(model, 1).reads.T[[4, 9, 2]]
    torch.testing.assert_close(found.in_out, torch.cosine_similarity(reads, wrote, dim=1), atol=1e-10, rtol=1e-10)


def test_a_planted_neuron_stands_out_and_those_of_a_fresh_model_do_not():
    model = tiny_model(d_vocab=200, d_model=32, n_heads=2, dtype=torch.float64)
    fresh = read_neurons(model, 0, draws=400)
    shares = [float((one.p <= 0.05).double().mean()) for one in fresh.lists]
    assert all(share < 0.13 for share in shares) and not (fresh.q <= 0.05).any()
    with torch.no_grad():
        model.blocks[0].mlp.W_out[7] = 3 * (model.W_U[:, 123] - model.W_U[:, 123].mean())
        model.blocks[0].mlp.W_in[:, 7] = model.W_E[45] - model.W_E[45].mean()
    found = read_neurons(model, 0, draws=4000)
    assert found.writes.words(7)[0] == "123" and found.reads.words(7)[0] == "45"
    assert found.order()[0] == 7 and found.q[1, 7] <= 0.05 and found.writes.cosine[7].item() == pytest.approx(1)
    assert found.table(1).rows[0][0] == "L0N7"


def test_a_vector_without_tokens_has_flat_lists():
    side = Side("reads", torch.ones(6, 3), random_vectors(5, torch.zeros(3), 0))
    found = list_tokens(tiny_model(), side, torch.zeros(2, 3), top=2)
    assert found.kurtosis.tolist() == [0, 0] and found.cosine.tolist() == [0, 0]


def test_what_cannot_be_listed_is_refused_with_a_reason():
    model = tiny_model()
    with pytest.raises(InputError, match="layer 2 was asked for as a head; there are layers 0 to 1"):
        ov_directions(model, 2, 0)
    with pytest.raises(InputError, match="head 5 of layer 0 was asked for"):
        qk_directions(model, 0, 5)
    with pytest.raises(InputError, match="k=99"):
        ov_directions(model, 0, 0, k=99)
    with pytest.raises(InputError, match="W_gate"):
        mlp_read_directions(model, 0, gate=True)
    with pytest.raises(InputError, match="neurons must be a list of indices from 0 to 31"):
        read_neurons(model, 0, [32])
    with pytest.raises(InputError, match="from 1 to 11"):
        read_neurons(model, 0, top=12)
    assert model(TOKENS).shape[-1] == 11


def test_false_discovery_rates_count_the_lists_of_both_sides():
    from hooklens.results.statistics import q_values

    found = ov_directions(tiny_model(), 1, 0, k=4, top=3)
    expected = q_values(torch.stack([one.p for one in found.lists]))
    assert torch.equal(found.q, expected) and found.q.shape == (2, 4)
    assert [row[-2:] for row in found.table(None).rows[::2]] == [tuple(pair) for pair in expected.T.tolist()]
    apart = torch.stack([one.q for one in found.lists])
    assert not torch.equal(apart, expected)  # what list by list would have said


def test_a_head_by_name_was_a_missing_argument_and_a_negative_layer_was_refused():
    model = tiny_model()
    few = {"k": 2, "top": 2}
    for read in (ov_directions, qk_directions):
        by_numbers = read(model, 1, 0, **few)
        for asked in (("L1H0",), ("L-1H0",), (-1, 0), (Component("head", 1, 0),), ((1, 0),)):
            assert same(read(model, *asked, **few), by_numbers)
        for asked in (("L0H0", 0), (0,), ("MLP0",), ("L0H0@1",), ("heads",), (1.0, 0), (True, 0), (0, -1), (2, 0)):
            with refused(InputError, "head"):
                read(model, *asked, **few)
    for read in (mlp_read_directions, mlp_write_directions):
        by_number = read(model, 1, **few)
        assert same(read(model, "MLP1", **few), by_number) and same(read(model, -1, **few), by_number)
        for asked in ("L0H0", "L1", 2, -3, None, 1.0, True, "MLP0@1"):
            with refused(InputError, "layer"):
                read(model, asked, **few)
    assert read_neurons(model, "MLP1", [3], top=2).layer == read_neurons(model, -1, [3], top=2).layer == 1


def test_a_component_that_exists_was_no_writer():
    model = tiny_model()
    by_name = measure_angles(model, "L0H1", "L1H0.q", draws=3)
    pairs = ((0, 1), ("q", 1, 0)), ("L-2H1", "L-1H0.q"), (Component("head", 0, 1), Component("q", 1, 0))
    for writer, reader in pairs:
        assert same(measure_angles(model, writer, reader, draws=3), by_name)
    refused_pairs = ("embed", "MLP1"), ("heads", "MLP1"), ("L0H0@1", "MLP1"), ("MLP0", "final"), ("MLP0", "L1H0")
    for writer, reader in refused_pairs:
        with refused(HooklensError, "writer|reader|receiver"):
            measure_angles(model, writer, reader)

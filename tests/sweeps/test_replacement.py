"""What is written in place of an activation: a word means the same in patches, ablations, circuits and head studies."""

import pytest
import torch
from close import close

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.plugins.circuits.circuit import Circuit, circuit_of
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.edge_scores import EdgeScores
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import run_edges
from hooklens.plugins.heads.mediation import measure_mediation
from hooklens.plugins.heads.redundancy import measure_redundancy
from hooklens.plugins.patching import Mean, OtherRun, Resample
from hooklens.sweeps.replacement import WORDS
from hooklens.testing import tiny_model

CLEAN = torch.tensor([[1, 5, 2, 7], [4, 4, 9, 0], [8, 1, 1, 3]])
CORRUPTED = torch.tensor([[1, 5, 3, 7], [4, 2, 9, 0], [8, 6, 1, 3]])
MIXED, OF_MIXED = [[1, 5, 2], [4, 4, 9, 0], [8, 1, 1]], [[1, 6, 2], [4, 3, 9, 0], [8, 2, 1]]
HEADS = [(layer, head) for layer in (0, 1) for head in (0, 1)]


@pytest.fixture
def model():
    return tiny_model(dtype=torch.float64)


@pytest.fixture
def metric(model):
    return hl.logit_diff(model, answer=3, wrong_answer=4)


def z_of(model, rows):
    """For each layer the z of every prompt on its own: [pos head d_head]."""
    caches = [model.run_with_cache(torch.as_tensor(row)[None], names="z")[1] for row in rows]
    return [[cache["z", layer][0] for cache in caches] for layer in range(2)]


def by_position(acts, i):
    return torch.stack(acts).mean(0)


def of_the_others(acts, i):
    return torch.stack(acts[:i] + acts[i + 1 :]).mean(0)


def over_positions(acts, i):
    return torch.cat(acts).mean(0, keepdim=True)


MEANINGS = {
    "zero": lambda acts, i: torch.zeros_like(acts[i]),
    "mean": by_position,
    "mean of others": of_the_others,
    "mean over positions": over_positions,
}


def by_hand(model, metric, rows, meaning):
    """prompt head: one hooked forward pass for each prompt and head."""
    acts = z_of(model, rows)
    out = torch.zeros(len(rows), len(HEADS), dtype=model.dtype)
    for i, row in enumerate(rows):
        for column, (layer, head) in enumerate(HEADS):
            value = meaning(acts[layer], i)

            def write(z, hook, head=head, value=value):
                z[0, :, head] = value[:, head]
                return z

            hook = (("z", layer), write)
            out[i, column] = metric(model.run_with_hooks(torch.as_tensor(row)[None], fwd_hooks=[hook]))[0].detach()
    return out


def without_each_head(model, clean, corrupted, metric, value):
    """prompt head: the circuit in which every edge that leaves the head is cut."""
    graph = circuit_graph(model)
    nodes = [graph.source_names.index(f"L{layer}H{head}") for layer, head in HEADS]
    kept = torch.stack([graph.ends[0] != node for node in nodes])
    return run_edges(model, kept, clean, corrupted, metric, value=value).per_pair.T


@pytest.mark.parametrize("word", MEANINGS)
def test_mean_meant_one_thing_in_patch_another_in_ablate_and_a_third_in_circuits(model, metric, word):
    expected = by_hand(model, metric, CLEAN, MEANINGS[word])
    patched = hl.patch(model, CLEAN, CORRUPTED, metric, site="z", value=word).per_pair.flatten(1)
    ablated = hl.ablate(model, CLEAN, metric, value=word).per_prompt.flatten(1)
    edges = without_each_head(model, CLEAN, CORRUPTED, metric, word)
    mediated = measure_mediation(model, CLEAN, metric, HEADS, value=word)
    redundant = measure_redundancy(model, CLEAN, metric, HEADS, value=word)
    roads = (
        mediated.base_per_sequence[:, None] - mediated.total,
        redundant.base_per_sequence[:, None] - redundant.single,
    )
    for found in (patched, ablated, edges, *roads):
        assert close(found, expected, 1000)


@pytest.mark.parametrize("word", ["mean", "mean of others", "mean over positions"])
def test_a_mean_over_prompts_of_several_lengths_is_over_all_positions_in_every_method(model, metric, word):
    def meaning(acts, i):
        return over_positions(acts[:i] + acts[i + 1 :] if word == "mean of others" else acts, i)

    expected = by_hand(model, metric, MIXED, meaning)
    patched = hl.patch(model, MIXED, OF_MIXED, metric, site="z", value=word).per_pair.flatten(1)
    ablated = hl.ablate(model, MIXED, metric, value=word).per_prompt.flatten(1)
    edges = without_each_head(model, MIXED, OF_MIXED, metric, word)
    for found in (patched, ablated, edges):
        assert close(found, expected, 1000)


def test_the_mean_of_circuits_was_over_corrupted_prompts(model, metric):
    """That is still there, under its own name; and the mean over the clean prompts needs no corrupted ones."""
    expected = by_hand(model, metric, CORRUPTED, by_position)  # of the same prompts, so that only the mean counts
    assert close(without_each_head(model, CORRUPTED, None, metric, "mean"), expected, 1000)
    assert close(without_each_head(model, CORRUPTED, CLEAN, metric, Mean(CORRUPTED)), expected, 1000)
    other = without_each_head(model, CORRUPTED, CLEAN, metric, Mean(CLEAN))
    assert float((other - expected).abs().max()) > 1e-3


def test_a_mean_over_a_reference_of_another_length_was_refused_by_head_studies(model, metric):
    reference = [[9, 8, 7], [3, 0]]
    means = [torch.cat(acts).mean(0, keepdim=True) for acts in z_of(model, reference)]
    found = measure_mediation(model, CLEAN, metric, [(1, 0)], value=Mean(reference))

    def write(z, hook):
        z[:, :, 0] = means[1][:, 0]
        return z

    expected = metric(model.run_with_hooks(CLEAN, fwd_hooks=[(("z", 1), write)])).detach()
    assert close(found.base_per_sequence - found.total[:, 0], expected, 1000)


def test_given_runs_leave_the_two_ends_of_a_patch_as_they_are(model, metric):
    """The stream of the run that gives the values is that of the other end only where it is that run."""
    given = OtherRun(CLEAN.flip(0))
    sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z", value=given)
    plain = hl.patch(model, CLEAN, CORRUPTED, metric, site="z", value="corrupted")
    assert close(sweep.corrupted_per_pair, plain.corrupted_per_pair, 100) and sweep.replacement == "other run"
    swapped = hl.ablate(model, CLEAN, metric, value=given)
    assert close(sweep.per_pair, swapped.per_prompt, 1000)


def test_given_runs_are_those_of_edges(model, metric):
    kept = torch.rand(3, circuit_graph(model).n_edges, generator=torch.Generator().manual_seed(0)) < 0.5
    given = run_edges(model, kept, CLEAN, None, metric, value=OtherRun(CORRUPTED)).per_pair
    assert close(given, run_edges(model, kept, CLEAN, CORRUPTED, metric).per_pair, 1000)


def test_methods_that_write_one_value_take_one_draw(model, metric):
    for value in ("resample", Resample(draws=2)):
        with pytest.raises(InputError, match=r"draws 2; give one draw, such as Resample\(draws=1\)"):
            hl.patch(model, CLEAN, CORRUPTED, metric, site="z", value=value)
        with pytest.raises(InputError, match="draws 2; give one draw"):
            without_each_head(model, CLEAN, CORRUPTED, metric, value)
    one = Resample(draws=1, seed=3)
    ablated = hl.ablate(model, CLEAN, metric, value=one).per_prompt
    assert close(hl.patch(model, CLEAN, CORRUPTED, metric, site="z", value=one).per_pair, ablated, 1000)
    assert close(without_each_head(model, CLEAN, CORRUPTED, metric, one), ablated.flatten(1), 1000)


def test_a_drawn_value_is_refused_with_the_words_that_would_work(model, metric):
    with pytest.raises(InputError, match=r"draws 2; .*\('clean', 'corrupted', 'zero', 'mean', .*\), or average"):
        hl.patch(model, CLEAN, CORRUPTED, metric, site="z", value="resample")


def test_every_word_is_the_label_that_results_print():
    assert {word: replacement.label for word, replacement in WORDS.items()} == {word: word for word in WORDS}


def test_a_run_into_itself_is_refused(model, metric):
    with pytest.raises(InputError, match="would be written into the clean run itself"):
        without_each_head(model, CLEAN, CORRUPTED, metric, "clean")


def test_circuits_and_scores_that_were_saved_run_with_the_same_means(model, metric, tmp_path):
    value = Mean(CORRUPTED)
    circuit = circuit_of(model, ["embed->L0H1.v", "L0H1->logits"], value=value)
    scores = eap(model, CLEAN, None, metric, value=value)
    circuit.save(tmp_path / "circuit")
    scores.save(tmp_path / "scores")
    read, read_scores = Circuit.load(tmp_path / "circuit"), EdgeScores.load(tmp_path / "scores")
    assert str(read.replacement) == "mean of reference"
    assert torch.equal(*(one.run(model, CLEAN, None, metric).per_pair for one in (read, circuit)))
    assert read_scores.top_edges(20).edges == scores.top_edges(20).edges
    assert read.to_json()["replacement"]["class"] == "Mean"

"""A transformer whose weights add modulo p by hand: all methods on it, and what is refused."""

import math

import numpy as np
import pytest
import torch
from planted_addition import PHASES, SCALE, adding_model, written_out
from refused import refused

from hooklens import logit_diff, patch
from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError, NameNotFound, WrongType
from hooklens.data.modular import modular_arithmetic
from hooklens.plugins.algorithmic.fourier import (
    ablate_neuron_frequencies,
    classify_neurons,
    find_key_frequencies,
    fourier_basis,
    keep_single_frequencies,
    measure_fourier_spectrum,
    measure_plane_spectrum,
    neuron_logit_map,
    patch_neurons,
    project_embedding,
    random_pairs,
    read_sum_directions,
    run_pairs,
    tabulate,
)
from hooklens.plugins.algorithmic.fourier.key_frequencies import by_circularity
from hooklens.testing import tiny_model

P, KEYS = 13, [2, 5]


@pytest.fixture(scope="module")
def model():
    return adding_model(P, KEYS)


@pytest.fixture(scope="module")
def table(model):
    return run_pairs(model, modular_arithmetic(p=P, fraction=0.3))


def test_the_whole_table_in_one_call(model, table):
    assert torch.allclose(table.logits, written_out(P, KEYS), atol=1e-11)
    assert table.accuracy == 1 and int(table.trained.sum()) == 50
    _, cache = model.run_with_cache([[3, 11, P]], names="post")
    assert torch.allclose(table.post[3, 11], cache["post", 0][0, -1], atol=1e-12)


def test_every_rule_finds_the_planted_frequencies(model, table):
    key = find_key_frequencies(model, P)
    exact = {rule: keys for rule, keys in key.by_rule.items() if rule != "circles"}
    assert exact == dict.fromkeys(exact, KEYS) and len(exact) == 6
    # circles of equal radius are one eigenspace, of which principal components are any rotation
    assert key.by("circles") == [] and set(key.scores["circles"].nonzero().flatten().add(1).tolist()) == set(KEYS)
    assert key.keys == KEYS and key.answers == P and "Nanda" in key.sources["neurons"]
    counts = [row[2] for row in key.table().rows if row[0] in KEYS]
    assert all(isinstance(count, int) for count in counts) and sum(counts) == int(key.scores["neurons"].sum())
    assert find_key_frequencies(model, P, table=table).by_rule == key.by_rule


def test_key_frequencies_print_which_they_are(model, table):
    found = find_key_frequencies(model, table.modulus)
    assert repr(found).splitlines()[0].startswith(f"KeyFrequencies: keys {' '.join(map(str, found.keys))}, ")


@pytest.mark.parametrize(("p", "radii"), [(13, {2: 3.0, 5: 1.0}), (7, {3: 1.0}), (10, {2: 1.0, 3: 4.0})])
def test_circles_of_different_radii_are_found_by_circularity(p, radii):
    basis = fourier_basis(p)
    rows = torch.cat([radius * basis[2 * k - 1 : 2 * k + 1] for k, radius in radii.items()]).T
    keys, scores = by_circularity(
        7 + rows @ torch.linalg.qr(torch.randn(rows.shape[1], 9, generator=seeded(0)).double().T)[0].T
    )
    assert keys == sorted(radii) and torch.allclose(scores[[k - 1 for k in radii]], torch.ones(len(radii)).double())


def test_chance_is_what_the_plane_of_a_random_embedding_holds():
    found = [project_embedding(tiny_model(d_vocab=32, d_model=16, seed=i), 31, frequencies=[3, 8]) for i in range(20)]
    held = torch.stack([circles.variance for circles in found]).mean(1)  # of 20 independent embeddings
    assert abs(float(held.mean()) - found[0].chance) < 3 * float(held.std()) / 20**0.5
    assert abs(found[0].chance - (1 / 15 + 14 / 15 / 8)) < 1e-12


def test_every_neuron_has_its_frequency(table):
    neurons = classify_neurons(table)
    assert neurons.frequency.tolist() == [2] * PHASES + [5] * PHASES
    assert neurons.share_explained == 1 and neurons.counts().tolist() == [0, PHASES, 0, 0, PHASES, 0]


def test_spectra_circles_and_directions_of_the_weights(model, table):
    spectrum = measure_fourier_spectrum(model, P)
    planted = [2 * k - 1 + i for k in KEYS for i in (0, 1)]
    expected = torch.zeros(P, dtype=torch.float64)
    expected[planted] = math.sqrt(P / 2)
    assert torch.allclose(spectrum.embedding, expected, atol=1e-12)
    # W_L of a frequency is SCALE / 16 cos(w c + 2 x): sums of squares over 16 phases and p answers
    expected[planted] = SCALE / PHASES * math.sqrt(PHASES / 2 * P / 2)
    assert torch.allclose(spectrum.neuron_logit, expected, atol=1e-11)
    assert abs(spectrum.gini_embedding - (1 - len(planted) / P)) < 1e-12
    circles = project_embedding(model, P, frequencies=KEYS)
    assert torch.allclose(circles.variance, torch.full((2,), 0.5).double())
    assert torch.allclose(circles.pure, torch.ones(2).double()) and torch.allclose(
        circles.roundness, torch.ones(2).double()
    )
    assert torch.allclose(circles.planes.norm(dim=-1), torch.ones(2, P).double())
    assert abs(float(circles.component_variance.sum()) - 1) < 1e-12
    found = read_sum_directions(model, P, table=table)
    assert found.waves == ["cos 2", "sin 2", "cos 5", "sin 5"] and found.rank() == 4
    assert abs(found.key_share - 1) < 1e-12
    W_L = neuron_logit_map(model, P)
    assert torch.allclose(table.post @ W_L, table.logits, atol=1e-11)


def test_what_a_direction_reads_is_the_least_squares_fit(model, table):
    found = read_sum_directions(model, P, frequencies=[5], table=table)
    n = torch.arange(P).double()
    wave = torch.cos(2 * math.pi / P * 5 * (n[:, None] + n)).flatten()
    read = (table.post @ found.directions[0]).flatten()
    read = read - read.mean()
    coefficient = read @ wave / (wave @ wave)
    assert abs(float(found.coefficient[0] - coefficient)) < 1e-10
    rest = (read - coefficient * wave).square().sum() / read.square().sum()
    assert abs(float(found.explained[0] - (1 - rest))) < 1e-12


def test_neuron_ablation_is_the_terms_taken_from_the_logits(model, table):
    """There is no norm, so that the logits are linear in the neurons."""
    ablation = ablate_neuron_frequencies(model, P, frequencies=[2, 3])
    W_L = neuron_logit_map(model, P)
    for i, k in enumerate([2, 3]):
        other = tabulate(table.logits - keep_single_frequencies(table.post, [k]) @ W_L)
        assert abs(float(ablation.losses[i]) - other.loss) < 1e-10
        assert float(ablation.accuracies[i]) == other.accuracy
    assert ablation.base == table.loss and ablation.keys == KEYS
    assert ablation.losses[0] > 10 * ablation.losses[1]


def test_neuron_patching_is_the_plain_loop_and_adds_up(model, table):
    clean, corrupted = random_pairs(P, 3, seed=1)
    patching = patch_neurons(model, P, clean, corrupted)
    prompts = [torch.cat([pairs, torch.full((3, 1), P)], 1) for pairs in (clean, corrupted)]
    _, cache = model.run_with_cache(prompts[0], names="post")
    answers, others = (pairs.sum(1) % P for pairs in (clean, corrupted))

    def metric(logits):
        rows = torch.arange(3)
        return (logits[rows, -1, answers] - logits[rows, -1, others]).mean().item()

    base = metric(model(prompts[1]))
    for neuron in (0, 7, 20):

        def write(act, hook, neuron=neuron):
            act[:, :, neuron] = cache["post", 0][:, :, neuron]
            return act

        moved = metric(model.run_with_hooks(prompts[1], fwd_hooks=[(("post", 0), write)])) - base
        assert abs(moved - float(patching.effects[neuron])) < 1e-10
    assert abs(patching.corrupted - base) < 1e-12
    assert abs(patching.total - patching.gap) < 1e-9  # everything goes through the neurons, and linearly
    assert torch.allclose(patching.by_frequency().sum(), patching.effects.sum())
    assert [row[0] for row in patching.table().rows if abs(row[2]) > 1e-9] in (["2", "5"], ["5", "2"])
    direct = patch(
        model, *prompts, logit_diff(model, answer=answers, wrong_answer=others), site="post", by="layer x neuron"
    )
    assert torch.allclose(direct.effect[0], patching.effects)


def test_a_random_model_has_no_key_frequencies_by_the_neuron_rule():
    for seed in range(3):
        key = find_key_frequencies(tiny_model(d_vocab=32, seed=seed), 31)
        assert key.by("neurons") == [] and key.by("circles") == [] and key.by("gap in W_E") == []


def test_a_model_of_two_tokens_is_run_without_equals():
    model = tiny_model(d_vocab=7, n_ctx=2)
    table = run_pairs(model, 7)
    assert torch.allclose(table.logits[2, 5], model([[2, 5]])[0, -1].double()) and table.trained is None
    with_equals = tiny_model(d_vocab=8, n_ctx=2)  # its vocabulary has "=", its context no room for it
    assert torch.allclose(run_pairs(with_equals, 7).logits[2, 5], with_equals([[2, 5]])[0, -1, :7].double())


@pytest.mark.parametrize("p", [2, 3, 4, 6])
def test_the_smallest_and_even_moduli(p):
    model = tiny_model(d_vocab=p + 1, n_ctx=3)
    key = find_key_frequencies(model, p)
    assert key.modulus == p and all(1 <= k <= p // 2 for keys in key.by_rule.values() for k in keys)
    spectrum = classify_neurons(model, p).spectrum
    assert spectrum.shape[1] == p // 2 and bool((spectrum <= 1 + 1e-12).all())
    if p % 2 == 0:
        with pytest.raises(InputError, match="has no circle"):
            project_embedding(model, p, frequencies=[p // 2])


@pytest.mark.parametrize(
    ("changes", "data", "seen"),
    [
        ({"d_vocab": 12}, 13, "another p, on 11, or 12"),
        ({"d_vocab": 14}, modular_arithmetic(p=12), "d_vocab 14"),
        ({"d_vocab": 8, "d_vocab_out": 6}, 7, "6 outputs"),
        ({"d_vocab": 8, "n_ctx": 1}, 7, "n_ctx 1"),
        ({"d_vocab": 8}, modular_arithmetic(p=7, operation="x"), r"operation='\+'"),
        ({"d_vocab": 8}, 1, "at least 2"),
    ],
)
def test_a_model_that_cannot_have_been_trained_on_this_is_refused(changes, data, seen):
    with pytest.raises(InputError, match=seen):
        run_pairs(tiny_model(**changes), data)


def test_other_wrong_arguments():
    model = tiny_model(d_vocab=8)
    with refused(WrongType, says="modular_arithmetic"):
        run_pairs(model, "7")
    with refused(WrongType, says="HookedTransformer"):
        run_pairs(torch.nn.Linear(2, 2), 7)
    with refused(InputError, says="needs its task"):
        classify_neurons(model)
    with refused(InputError, says="threshold"):
        classify_neurons(model, 7, threshold=-1)
    for function in (measure_fourier_spectrum, classify_neurons):
        with refused((InputError, NameNotFound), says="layer"):
            function(model, 7, layer=2)
    with refused(InputError, says="different sums"):
        patch_neurons(model, 7, [[1, 2]], [[2, 1]])
    with refused(InputError, says="equally many pairs"):
        patch_neurons(model, 7, [[1, 2]], [[2, 1], [3, 4]])
    with refused(InputError, says="from 0 to 6"):
        patch_neurons(model, 7, [[1, 7]], [[2, 1]])
    with refused(InputError, says="no Fourier circuit"):
        read_sum_directions(tiny_model(d_vocab=14), 13)


def test_shuffled_answers_have_no_analysis_of_sums():
    """The losses were those of a + b, beside the accuracy of the shuffled answers."""
    data = modular_arithmetic(7, fraction=0.5, shuffled=True)
    with pytest.raises(InputError, match=r"answers of this control are shuffled, .* with p = 7 in place of the data"):
        run_pairs(tiny_model(d_vocab=8), data)


def test_the_table_of_another_model_was_taken_for_the_models_own(model, table):
    other = tiny_model(d_vocab=len(table.logits) + 1)
    p = table.modulus
    assert find_key_frequencies(model, p, table=table).keys == find_key_frequencies(model, table=table).keys
    for read in (find_key_frequencies, read_sum_directions):
        with refused(InputError, says="not that of this model: the logits differ"):
            read(other, p, table=table)
        with refused(InputError, says=f"one of p = {p}, and data of p = 7"):
            read(other, 7, table=table)


def test_neurons_of_another_layer_or_of_nowhere_were_taken_for_the_models_own(model, table):
    """The logits of a table do not say which layer its neurons are of."""
    deep, p = tiny_model(d_vocab=8, n_layers=2), 7
    with refused(InputError, says="the neurons of layer -1 differ"):
        read_sum_directions(deep, p, frequencies=[2], table=run_pairs(deep, p, layer=0))
    assert read_sum_directions(deep, p, frequencies=[2], table=run_pairs(deep, p)).waves == ["cos 2", "sin 2"]
    drawn = torch.randn(table.post.shape, generator=torch.Generator().manual_seed(0))
    with refused(InputError, says="the neurons of layer -1 differ"):
        find_key_frequencies(model, table.modulus, table=tabulate(table.logits, post=drawn))


def test_neurons_of_another_model_were_patched_as_if_they_were_its_own():
    model, pairs = tiny_model(d_vocab=8), ([[1, 2]], [[1, 4]])
    own = classify_neurons(model, 7, threshold=0.01)
    assert bool(patch_neurons(model, 7, *pairs, neurons=own).frequency.any())  # with their own threshold
    with refused(InputError, says="their spectra differ"):
        patch_neurons(model, 7, *pairs, neurons=classify_neurons(tiny_model(d_vocab=8, seed=5), 7))
    with refused(InputError, says="16 neurons were given, classified modulo 7, and this layer has 32"):
        patch_neurons(model, 7, *pairs, neurons=classify_neurons(tiny_model(d_vocab=8, d_mlp=16), 7))
    with refused(WrongType, says="those of classify_neurons"):
        patch_neurons(model, 7, *pairs, neurons="x")


def test_p_and_layers_of_other_types_or_of_nowhere():
    model = tiny_model(d_vocab=8)
    assert run_pairs(model, np.int64(7)).modulus == 7
    for read in (find_key_frequencies, classify_neurons, measure_plane_spectrum):
        with refused(WrongType, says="layer is the number of a layer"):
            read(model, 7, layer="0")
    with refused(InputError, says="layer 99"):
        measure_plane_spectrum(model, 7, site="logits", layer=99)


def test_a_model_of_p_numbers_and_equals_was_read_as_one_of_p_plus_1_numbers():
    with refused(InputError, says="as models on 'a b =' modulo 7 have: give p = 7"):
        find_key_frequencies(tiny_model(d_vocab=8, n_ctx=3), 8)


def test_principal_components_are_drawn_in_pairs():
    with refused(InputError, says="n_components are drawn in pairs, so that their number is even; got 3"):
        project_embedding(tiny_model(d_vocab=8), 7, frequencies=[1], n_components=3)

"""Logits that are sums of cosines of a + b - c: every measure has a known answer."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refused import refused

from hooklens.core.errors import InputError, NameNotFound, WrongType
from hooklens.data.modular import modular_arithmetic
from hooklens.plugins.algorithmic.fourier import (
    ablate_logit_frequencies,
    classify_neurons,
    cross_entropy,
    excluded_logits,
    excluded_loss,
    explain_by_frequency,
    explain_by_sum,
    find_key_frequencies,
    find_smallest_set,
    fit_logit_formula,
    formula_coefficients,
    formula_logits,
    fourier_basis,
    gini,
    inverse_participation_ratio,
    keep_single_frequencies,
    logit_similarity,
    mean_by_sum,
    measure_plane_spectrum,
    restricted_logits,
    restricted_loss,
    sums,
    tabulate,
    transform_2d,
)
from hooklens.plugins.algorithmic.fourier.key_frequencies import by_sparsity
from hooklens.plugins.algorithmic.fourier.logit_formula import mean_by_offset

EPS = torch.finfo(torch.float64).eps
SETS = [(5, [2]), (7, [1, 3]), (13, [2, 5, 6]), (31, [3, 14]), (3, [1]), (2, [1]), (9, [2, 4]), (10, [1, 5]), (12, [4])]


def trained_half(p, seed=0):
    trained = torch.rand(p, p, generator=torch.Generator().manual_seed(seed)) < 0.5
    trained[0, 1] = True
    return trained


@pytest.mark.parametrize(("p", "frequencies"), SETS)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_restricted_loss_is_the_loss_and_excluded_loss_ln_p(p, frequencies, scale):
    table = tabulate(formula_logits(p, {k: scale * (1 + 0.1 * k) for k in frequencies}))
    precision = 100 * EPS * scale * p
    assert abs(restricted_loss(table.logits, frequencies) - table.loss) < precision
    assert abs(excluded_loss(table.logits, frequencies, trained_half(p)) - math.log(p)) < precision
    assert excluded_logits(table.logits, frequencies).abs().max() < precision
    assert torch.allclose(restricted_logits(table.logits, frequencies), table.logits, atol=precision)


@pytest.mark.parametrize(("p", "frequencies"), SETS)
def test_exactly_the_planted_frequencies_are_found(p, frequencies):
    planted = {k: 20.0 + k for k in frequencies}
    table = tabulate(formula_logits(p, planted))
    assert find_key_frequencies(table).by("logit similarity") == frequencies
    coefficients = formula_coefficients(table.logits)
    expected = torch.tensor([planted.get(k, 0.0) for k in range(1, p // 2 + 1)], dtype=torch.float64)
    assert torch.allclose(coefficients, expected, atol=1e-12 * p)
    formula = fit_logit_formula(table, frequencies=frequencies)
    assert abs(formula.explained - 1) < 1e-12 and abs(formula.explained_centred - 1) < 1e-12
    assert torch.allclose(formula.logits(), table.logits, atol=1e-10)
    ablation = ablate_logit_frequencies(table)
    assert {row[0] for row in ablation.top(len(frequencies)).rows} == set(frequencies)


@pytest.mark.parametrize(("p", "frequencies"), [s for s in SETS if s[0] not in (12,)])
def test_each_answer_is_right_where_the_frequencies_tell_all_apart(p, frequencies):
    assert tabulate(formula_logits(p, dict.fromkeys(frequencies, 100.0))).accuracy == 1


def test_of_composite_p_a_frequency_that_shares_a_factor_leaves_answers_tied():
    table = tabulate(formula_logits(12, {4: 1000.0}))
    assert abs(table.loss - math.log(4)) < 1e-9  # three answers are told apart, the other factor 4 is not
    key = find_key_frequencies(table)
    assert (key.keys, key.answers) == ([4], 3)
    assert fit_logit_formula(table).table(1).rows[0][-1] == 3


def test_the_mean_of_each_offset_is_that_of_a_plus_b_minus_c():
    values = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n = torch.arange(7)
    assert torch.allclose(mean_by_offset(values[(n[:, None, None] + n[:, None] - n) % 7]), values)


def test_similarity_is_the_cosine_of_the_two_cubes():
    logits = torch.randn(7, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    centred = (logits - logits.mean(-1, keepdim=True)).flatten()
    for k in (1, 2, 3):
        cube = formula_logits(7, {k: 1.0}).flatten()
        cosine = centred @ cube / (centred.norm() * cube.norm())
        assert abs(float(logit_similarity(logits)[k - 1] - cosine)) < 1e-12
        slope = logits.flatten() @ cube / (cube @ cube)
        assert abs(float(formula_coefficients(logits)[k - 1] - slope)) < 1e-12


@pytest.mark.parametrize("p", [7, 8])
def test_the_losses_are_those_of_projections_on_directions_of_pairs(p):
    """The authors' way: unit vectors over all p^2 pairs, and the constant put back by the mean over pairs."""
    logits = torch.randn(p, p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    frequencies, trained, answers = [2, p // 2], trained_half(p), sums(p).flatten()
    flat, kept = logits.flatten(0, 1), torch.zeros(p * p, p, dtype=torch.float64)
    for k in frequencies:
        for wave in fourier_basis(p)[2 * k - 1 : 2 * k + 1]:
            direction = wave[answers] / wave[answers].norm()
            kept += direction[:, None] * (direction @ flat)
    restricted = kept + (flat - kept).mean(0)
    loss = torch.nn.functional.cross_entropy
    assert abs(restricted_loss(logits, frequencies) - loss(restricted, answers).item()) < 1e-12
    mask = trained.flatten()
    expected = loss((flat - kept)[mask], answers[mask]).item()
    assert abs(excluded_loss(logits, frequencies, trained) - expected) < 1e-12


def test_the_smallest_set_leaves_out_what_the_loss_does_not_need():
    table = tabulate(formula_logits(13, {2: 8.0, 5: 8.0, 6: 0.001}))
    smallest = find_smallest_set(table)
    assert smallest.frequencies == [2, 5] and smallest.size == 2 and smallest.is_exact
    assert smallest.exact_loss <= 1.01 * table.loss + 1e-12
    assert abs(float(smallest.path[0]) - math.log(13)) < 1e-12
    greedy = find_smallest_set(table, most=0)
    assert not greedy.is_exact and greedy.frequencies == [2, 5]
    assert find_smallest_set(table, tolerance=1e9).size == 0


def test_the_exact_set_is_smaller_where_greedy_goes_wrong():
    """Greedy begins with 1, 4, which no good set of three contains; brute force over all sets of the losses agrees."""
    generator = torch.Generator().manual_seed(94)
    noise = torch.randn(11, 11, 11, dtype=torch.float64, generator=generator)
    amplitudes = (6 * torch.rand(5, generator=generator)).tolist()
    table = tabulate(noise + formula_logits(11, dict(zip(range(1, 6), amplitudes, strict=True))))
    smallest = find_smallest_set(table, tolerance=2.0)
    assert smallest.is_exact and smallest.greedy.tolist() == [1, 4, 2, 5] and smallest.frequencies == [1, 2, 5]
    good = [
        len(chosen)
        for n in range(1, 6)
        for chosen in combinations(range(1, 6), n)
        if restricted_loss(table.logits, chosen) <= 3 * table.loss
    ]
    assert smallest.size == min(good)
    assert abs(smallest.exact_loss - restricted_loss(table.logits, smallest.frequencies)) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_all_frequencies_are_good_enough(seed):
    """The cross-entropy is convex, so that mean logits of the pairs of a sum have no larger loss."""
    noise = torch.randn(7, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    table = tabulate(6 * torch.nn.functional.one_hot(sums(7), 7) + 3 * noise)
    assert restricted_loss(table.logits, [1, 2, 3]) <= table.loss < table.chance
    assert find_smallest_set(table).size <= 3


def test_a_model_that_is_no_better_than_chance_has_no_smallest_set():
    with refused(InputError, says="does not generalise"):
        find_smallest_set(tabulate(torch.zeros(7, 7, 7)))


@pytest.mark.parametrize(
    ("logits", "seen"),
    [
        (torch.zeros(7, 7), r"\[7, 7\]"),
        (torch.zeros(7, 7, 8), r"\[7, 7, 8\]"),
        (torch.zeros(1, 1, 1), r"\[1, 1, 1\]"),
        ([1], "list"),
    ],
)
def test_a_table_of_another_shape_is_refused(logits, seen):
    with refused(InputError, says=seen):
        tabulate(logits)


def test_what_a_table_lacks_is_said():
    table = tabulate(torch.zeros(5, 5, 5))
    with refused(InputError, says="no neurons"):
        classify_neurons(table)
    with refused(InputError, says="same p = 5"):
        tabulate(torch.zeros(5, 5, 5), post=torch.zeros(4, 4, 2))
    with refused(InputError, says="boolean"):
        tabulate(torch.zeros(5, 5, 5), trained=torch.zeros(5, 5))
    with refused(InputError, says="data of p = 7"):
        fit_logit_formula(table, 7)
    with refused(InputError, says="not finite"):
        tabulate(torch.full((5, 5, 5), math.nan))
    with refused(InputError, says="trained marks none"):
        excluded_loss(table.logits, [1], torch.zeros(5, 5, dtype=torch.bool))
    with refused(InputError, says="1 to p // 2 = 2"):
        restricted_loss(table.logits, [3])
    with refused(NameNotFound, says="logit similarity"):
        find_key_frequencies(table).by("logits similarity")
    assert math.isnan(table.mean_over(table.losses, table.held_out)) and len(table.table()) == 1


def test_losses_of_a_table_by_training_pairs():
    data = modular_arithmetic(p=5, fraction=0.4)
    trained = torch.zeros(5, 5, dtype=torch.bool)
    trained[tuple(data.pairs[0].T)] = True
    logits = torch.where(trained[:, :, None], formula_logits(5, {1: 50.0, 2: 50.0}), 0.0)
    table = tabulate(logits, trained=trained)
    rows = {row[0]: row[1:] for row in table.table().rows}
    assert rows["trained"][0] == 10 and rows["trained"][2] == 1 and rows["held out"][0] == 15
    assert abs(rows["held out"][1] - math.log(5)) < 1e-12 and rows["trained"][1] < 1e-12


def test_neurons_of_planted_waves():
    p, n = 11, torch.arange(11).double()
    w = 2 * math.pi / p
    of_sum, one_sided = torch.cos(w * 3 * sums(p)), torch.cos(w * 2 * n)[:, None].expand(p, p)
    product = torch.cos(w * 4 * n)[:, None] * torch.sin(w * 4 * n)
    mixed = torch.cos(w * 5 * n)[:, None] + 0.5 * torch.cos(w * n)  # 80 % and 20 % of the variance
    constant = torch.full((p, p), 3.3).double()
    constant[2] += 4 * EPS  # a neuron that varies by rounding only
    post = torch.stack([5 + of_sum, one_sided, product, mixed, constant], -1)
    neurons = classify_neurons(tabulate(torch.zeros(p, p, p), post=post))
    assert neurons.frequency.tolist() == [3, 2, 4, 5, 0]
    assert torch.allclose(neurons.explained, torch.tensor([1, 1, 1, 0.8, 0]).double())
    assert neurons.keys == [2, 3, 4] and neurons.n_explained == 3 and neurons.share_explained == 0.6
    assert torch.allclose(neurons.sum_spectrum[[0, 1, 2], [2, 1, 3]], torch.tensor([1, 0, 0.5]).double(), atol=1e-12)


def test_the_plane_spectrum_of_a_product():
    p, n = 7, torch.arange(7).double()
    post = 2 + torch.cos(2 * math.pi / p * 2 * n)[:, None] * torch.sin(2 * math.pi / p * 3 * n)
    spectrum = measure_plane_spectrum(tabulate(torch.zeros(p, p, p), post=post[:, :, None]))
    (row,) = spectrum.top(1).rows
    assert row[:2] == ("cos 2", "sin 3") and abs(row[2] - p / 2) < 1e-12 and abs(row[3] - 1) < 1e-12
    with refused(NameNotFound, says="post"):
        measure_plane_spectrum(tabulate(torch.zeros(p, p, p)), site="pots")


def test_sparsity_by_hand():
    assert (
        abs(gini(torch.tensor([1.0, 2.0, 3.0])).item() - (1 - 2 * (1 / 6 * 2.5 + 2 / 6 * 1.5 + 3 / 6 * 0.5) / 3)) < 1e-6
    )
    values = torch.tensor([0.5, -4.0, 3.0, 1.0]).double()
    differences = (values.abs()[:, None] - values.abs()).abs().sum() / (2 * 4 * values.abs().sum())
    assert abs(gini(values) - differences) < 1e-12  # the mean absolute difference form of the same coefficient
    assert abs(inverse_participation_ratio(values) - (values**4).sum() / (values**2).sum() ** 2) < 1e-12
    for size in (1e-12, 1e12):
        assert abs(inverse_participation_ratio(torch.full((3,), size)) - 1 / 3) < 1e-6
    assert gini(7 * values) == gini(values) and gini(torch.zeros(3)).isnan()


def test_cosines_and_sines_have_a_largest_norm_each():
    """Furuta et al., equation 5: with one maximum for both, frequency 3 (sine 0.9 of 1.0) would not be counted."""
    cosines, sines = torch.tensor([4.0, 1.9, 0.1, 2.1]), torch.tensor([1.0, 0.1, 0.9, 0.2])
    norms = torch.cat([torch.tensor([99.0]), torch.stack([cosines, sines], 1).flatten()])
    keys, scores = by_sparsity(norms)
    assert keys == [1, 3, 4]
    assert torch.equal(scores, torch.maximum(cosines / 4, sines / 1))
    assert by_sparsity(norms, eta=0.4)[0] == [1, 2, 3, 4]
    assert by_sparsity(norms[:-1])[0] == [1, 3, 4]  # an even modulus has no sine of frequency p / 2
    assert by_sparsity(torch.tensor([5.0, 2.0, 0.0]))[0] == [1]  # no sines at all


@settings(max_examples=25, deadline=None)
@given(data=st.data(), p=st.sampled_from([5, 7, 8, 11, 15, 17]))
def test_any_planted_set_is_found_and_explains_all(data, p):
    """Amplitudes within a factor of 20, so that each similarity is above the published threshold."""
    frequencies = data.draw(st.sets(st.integers(1, p // 2), min_size=1, max_size=5))
    planted = {k: data.draw(st.floats(1, 20)) for k in sorted(frequencies)}
    table = tabulate(formula_logits(p, planted))
    precision = 100 * EPS * p * sum(planted.values())
    assert find_key_frequencies(table).keys == sorted(frequencies)
    assert abs(restricted_loss(table.logits, frequencies) - table.loss) < precision
    assert abs(excluded_loss(table.logits, frequencies, trained_half(p)) - math.log(p)) < precision
    assert fit_logit_formula(table, frequencies=sorted(frequencies)).explained > 1 - 1e-12


def quadratic_network(p, k, phases=4):
    """Neurons (cos(w a + x) + cos(w b + y))^2 for a grid of phases, written to answers as cos(w c + x + y)."""
    w, n = 2 * math.pi * k / p, torch.arange(p).double()
    x, y = (2 * math.pi / phases * torch.cartesian_prod(torch.arange(phases), torch.arange(phases)).double()).T
    read = [(w * n[:, None] + phase).cos() for phase in (x, y)]  # number neuron: the rows of an MLP's first layer
    post = (read[0][:, None] + read[1]).square()
    return post, post @ (w * n + (x + y)[:, None]).cos() / phases**2


@pytest.mark.parametrize(("p", "k"), [(7, 2), (11, 1), (13, 6)])
def test_the_analytic_quadratic_network_without_a_transformer(p, k):
    """Its logits are cos(w (a + b - c)) / 2 exactly. Squares put a fifth of each neuron's variance at frequency 2k."""
    post, logits = quadratic_network(p, k)
    assert torch.allclose(logits, formula_logits(p, {k: 0.5}), atol=1e-12)
    table = tabulate(50 * logits, post=post)
    assert table.accuracy == 1 and find_key_frequencies(table).by("logit similarity") == [k]
    neurons = classify_neurons(table)
    double = min(2 * k, p - 2 * k)
    assert neurons.frequency.tolist() == [k] * len(neurons.frequency)
    assert torch.allclose(neurons.spectrum[:, k - 1], torch.full((16,), 0.8).double())
    assert torch.allclose(neurons.spectrum[:, double - 1], torch.full((16,), 0.2).double())
    assert neurons.keys == [] and classify_neurons(table, threshold=0.75).keys == [k]  # 85 % is a rule for ReLU


@pytest.mark.parametrize(
    "logits", [torch.zeros(49, 7), torch.zeros(7, 7, 6), torch.full((7, 7, 7), float("nan")), None]
)
def test_the_loss_of_logits_that_are_no_table_failed_inside_torch_or_was_nan(logits):
    with refused(InputError, "logits"):
        restricted_loss(logits, [1])
    with refused(InputError, "logits"):
        excluded_loss(logits, [1], torch.ones(7, 7, dtype=torch.bool))


def test_trained_pairs_given_as_zeros_and_ones_were_taken_for_rows():
    with refused(InputError, "a boolean tensor"):
        excluded_loss(formula_logits(7, {2: 9.0}), [2], torch.ones(7, 7, dtype=torch.long))


def test_an_operation_in_a_list_has_no_hash():
    with refused(NameNotFound, "no operation named"):
        modular_arithmetic(5, operation=["+"])


@pytest.mark.parametrize(
    "read",
    [cross_entropy, formula_coefficients, logit_similarity, lambda logits: restricted_logits(logits, [1])],
)
def test_logits_with_the_column_of_the_equals_sign_were_read_as_if_it_were_an_answer(read):
    with refused(InputError, says=r"\[5, 5, 6\]; reshape .* such as '='"):
        read(torch.zeros(5, 5, 6))


@pytest.mark.parametrize(
    ("post", "says"),
    [
        (torch.zeros(5, 5), r"\[a b neuron\] of real numbers for all p x p pairs, got \[5, 5\]"),
        (torch.zeros(5, 4, 2), r"got \[5, 4, 2\]"),
        (torch.full((5, 5, 2), math.inf), "activations are not finite"),
        (torch.zeros(5, 5, 2, dtype=torch.cfloat), "numbers with a point, got torch.complex64"),
    ],
)
def test_activations_that_are_none(post, says):
    for read in (explain_by_frequency, explain_by_sum, lambda post: tabulate(torch.zeros(5, 5, 5), post=post)):
        with refused(InputError, says=says):
            read(post)


def test_values_of_some_pairs_only_and_missing_training_pairs():
    for read in (transform_2d, mean_by_sum, lambda values: keep_single_frequencies(values, [1])):
        with refused(InputError, says=r"all p x p pairs, got \[5, 4\]"):
            read(torch.zeros(5, 4))
    with refused(InputError, says="boolean tensor .* got None"):
        excluded_loss(torch.zeros(5, 5, 5), [1], None)
    with refused(InputError, says="at least 0 and below 1; got 1.5"):
        classify_neurons(tabulate(torch.zeros(5, 5, 5), post=torch.zeros(5, 5, 2)), threshold=1.5)


@pytest.mark.parametrize(
    "read", [lambda x: restricted_logits(x, [1]), lambda x: excluded_logits(x, [1]), cross_entropy, logit_similarity]
)
@pytest.mark.parametrize(
    "logits", [torch.zeros(5, 5, 5) * 1j, torch.full((5, 5, 5), math.nan), torch.zeros(5, 5, 5).long()]
)
def test_logits_that_are_no_finite_real_numbers_lost_a_part_or_gave_nan(read, logits):
    with refused(InputError, says="not finite|p entries along each axis"):
        read(logits)


def test_shares_of_half_precision_were_above_one():
    post = formula_logits(7, {2: 9.0}).half()
    for read in (explain_by_frequency, explain_by_sum):
        assert bool((read(post) <= 1 + 1e-12).all())


def test_logits_that_are_equal_for_all_answers_named_keys_of_rounding():
    of_pairs = torch.randn(13, 13, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for logits in (of_pairs.expand(13, 13, 13).contiguous(), torch.zeros(13, 13, 13)):
        assert not logit_similarity(logits).any() and find_key_frequencies(tabulate(logits)).keys == []


def test_a_table_changed_with_the_tensors_it_was_made_of():
    logits, post, trained = formula_logits(5, {1: 2.0}), torch.ones(5, 5, 2).double(), torch.ones(5, 5) > 0
    table = tabulate(logits, post=post, trained=trained)
    for tensor in (logits, post, trained):
        tensor.zero_()
    assert bool(table.logits.any()) and bool(table.post.all()) and bool(table.trained.all())


@pytest.mark.parametrize(
    ("p", "coefficients", "says"),
    [
        (5, [1], "coefficients are a dict"),
        (5, {1: "a"}, "coefficients is a finite number, got 'a'"),
        (5, {1: math.nan}, "coefficients is a finite number, got nan"),
        (5.0, {1: 2.0}, "p is a whole number"),
        ("5", {1: 2.0}, "p is a whole number"),
    ],
)
def test_coefficients_that_are_none_failed_inside_python(p, coefficients, says):
    with refused((InputError, WrongType), says):
        formula_logits(p, coefficients)


def test_a_table_cannot_stand_for_a_model_and_its_table():
    table = tabulate(formula_logits(5, {1: 2.0}))
    with refused(InputError, "table= would have no effect"):
        find_key_frequencies(table, table=table)

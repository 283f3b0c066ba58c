"""Arguments, models and metrics that ended in another library's exception, in a crash, or in a wrong number."""

import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError, InputError
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.repeated import repeated_tokens
from hooklens.plugins import heads, weights
from hooklens.testing import tiny_model

MODEL = tiny_model()
TEXT = repeated_tokens(MODEL, 4)
BOTH = TEXT.tokens, TEXT.metric()


def known_pairs(**columns):
    tokens = {"clean": [[1, 2, 3], [2, 1, 3]], "corrupted": [[1, 2, 4], [2, 1, 4]]}
    return PromptPairs(**tokens, answer=[1, 2], wrong_answer=[2, 1], columns={"io": [0, 0], "end": [2, 2]} | columns)


CALLS = {
    "score_heads": lambda model: heads.score_heads(model),
    "find_induction_heads": lambda model: heads.find_induction_heads(model),
    "knock_out_keys": lambda model: heads.knock_out_keys(model, *BOTH),
    "score_copying": lambda model: heads.score_copying(model),
    "score_copy_suppression": lambda model: heads.score_copy_suppression(model),
    "score_composition": lambda model: heads.score_composition(model),
    "score_positions": lambda model: heads.score_positions(model),
    "measure_mediation": lambda model: heads.measure_mediation(model, *BOTH, ["L0H0"]),
    "measure_redundancy": lambda model: heads.measure_redundancy(model, *BOTH, ["L0H0", "L0H1"]),
    "find_name_movers": lambda model: heads.find_name_movers(model, known_pairs()),
    "classify_heads": lambda model: heads.classify_heads(model),
    "measure_spectrum": lambda model: weights.measure_spectrum(model),
    "measure_overlap": lambda model: weights.measure_overlap(model),
    "measure_angles": lambda model: weights.measure_angles(model, "L0H0", "L1H0.q"),
    "ov_directions": lambda model: weights.ov_directions(model, 0, 0),
    "mlp_write_directions": lambda model: weights.mlp_write_directions(model, 0),
    "read_neurons": lambda model: weights.read_neurons(model, 0),
}


@pytest.mark.parametrize("method", CALLS)
def test_a_model_that_is_none_was_an_attribute_error(method):
    for other in ("gpt2", None, torch.nn.Linear(2, 2)):
        with refused(HooklensError, r"needs a HookedTransformer, got (str|NoneType|Linear)"):
            CALLS[method](other)


BAD = {
    "score_heads draws": (lambda value: heads.score_heads(MODEL, draws=value), "draws is a whole number"),
    "score_heads n": (lambda value: heads.score_heads(MODEL, n=value), "n is a whole number|sequences of"),
    "find_induction_heads": (lambda value: heads.find_induction_heads(MODEL, n=value), "n is a whole|two sequences"),
    "induction length": (lambda value: heads.find_induction_heads(MODEL, length=value), "length is a whole|a period"),
    "score_copying draws": (lambda value: heads.score_copying(MODEL, draws=value), "draws is a whole number"),
    "score_copying n": (lambda value: heads.score_copying(MODEL, n_tokens=value), "n_tokens is a whole number"),
    "score_composition": (lambda value: heads.score_composition(MODEL, draws=value), "draws is a whole number"),
    "score_positions": (lambda value: heads.score_positions(MODEL, n_pos=value), "n_pos is a whole|two positions"),
    "classify_heads n": (lambda value: heads.classify_heads(MODEL, n=value), "n is a whole|n is the number"),
    "classify_heads alpha": (lambda value: heads.classify_heads(MODEL, alpha=value), "alpha lies between 0 and 1"),
    "measure_overlap": (lambda value: weights.measure_overlap(MODEL, draws=value), "draws is a whole number"),
    "measure_angles": (lambda value: weights.measure_angles(MODEL, "L0H0", "L1H0.q", draws=value), "draws is a whole"),
    "read_neurons draws": (lambda value: weights.read_neurons(MODEL, 0, [1], draws=value), "draws is a whole number"),
    "read_neurons top": (lambda value: weights.read_neurons(MODEL, 0, [1], top=value), "top is a whole number"),
    "ov_directions k": (lambda value: weights.ov_directions(MODEL, 0, 0, k=value), "k is a whole number"),
    "ov_directions head": (lambda value: weights.ov_directions(MODEL, 0, value), "no head is called|needs the number"),
    "criteria": (lambda value: heads.Criteria(top_k=value), "top_k is a whole number"),
}


@pytest.mark.parametrize("asked", BAD)
def test_numbers_of_draws_and_layers_that_are_none_failed_inside_torch(asked):
    call, message = BAD[asked]
    for value in (-1, 1.5, "a", None):
        with refused(InputError, message):
            call(value)


def test_weights_that_are_nan_ended_the_process():
    """LAPACK's eigenvalues of NaN crashed Python, and other decompositions raised torch's own error."""
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].attn.W_V[0, 0, 0] = float("nan")
    for method in ("score_copying", "score_composition", "measure_spectrum", "measure_overlap", "ov_directions"):
        with pytest.raises(InputError, match="NaN"):
            CALLS[method](model)


def test_a_metric_that_is_nan_had_a_q_value_of_0():
    """No sign flip reached the mean, which compares with nothing."""
    for method in (heads.measure_mediation, heads.measure_redundancy):
        with pytest.raises(InputError, match="the metric is NaN"):
            method(MODEL, TEXT.tokens, lambda logits: logits[:, -1, 1] * float("nan"), ["L0H0", "L0H1"])
    p = hl.results.statistics.sign_flip_p(torch.tensor([[1.0, float("nan")], [1.0, 2.0], [1.0, 3.0]]))
    assert p[0] == 0.25 and bool(p[1].isnan())


def test_tokens_masks_and_kinds_in_other_forms():
    one, same = heads.knock_out_keys(MODEL, TEXT.tokens[0], lambda logits: logits[:, -1, 1]), TEXT.tokens[:1].tolist()
    assert torch.equal(one.fall, heads.knock_out_keys(MODEL, same, lambda logits: logits[:, -1, 1]).fall)
    for mask in ([[1]], "previous", torch.zeros(4, 25, 25)):
        with refused(HooklensError, "mask is a boolean tensor"):
            heads.knock_out_keys(MODEL, *BOTH, mask=mask)
    with refused(HooklensError, "no kind of key named '3'"):
        heads.knock_out_keys(MODEL, *BOTH, kind=3)
    with pytest.raises(HooklensError, match="closest: previous"):
        heads.score_heads(MODEL, n=2, draws=5).top_heads(3, "prev")
    with refused(HooklensError, "no writer named"):
        weights.measure_angles(MODEL, None, "L1H0.q")


def test_positions_of_name_movers_may_be_lists_and_lie_in_the_prompt():
    tensors = known_pairs(io=torch.tensor([0, 0]), end=torch.tensor([-1, -1]))
    lists, other = (heads.find_name_movers(MODEL, pairs) for pairs in (known_pairs(), tensors))
    assert torch.equal(lists.direct, other.direct) and torch.equal(lists.attention, other.attention)
    for wrong in ({"io": [9, 0]}, {"end": [3, 2]}, {"io": [0.5, 0.5]}, {"io": ["a", "b"]}):
        with pytest.raises(HooklensError, match="one position per pair, an integer"):
            heads.find_name_movers(MODEL, known_pairs(**wrong))
    with refused(HooklensError, "are found on PromptPairs"):
        heads.find_name_movers(MODEL, ([[1, 2, 3]], [[1, 2, 4]]))


def test_an_unembedding_inside_another_module_has_name_movers_too():
    """Its bias was asked for, and a wrapper has none."""
    plain, wrapped = tiny_model(), tiny_model()
    wrapped.unembed.linear = torch.nn.Sequential(wrapped.unembed.linear)
    first, second = (heads.find_name_movers(model, known_pairs()) for model in (plain, wrapped))
    torch.testing.assert_close(first.written, second.written)


def test_neurons_are_a_list_of_numbers():
    for neurons in (3, "a", ["L0N3"], [1.5], [[1, 2]], [True], [], [-1], [99]):
        with refused(HooklensError, "neurons must be a list of indices from 0 to 31"):
            weights.read_neurons(MODEL, 0, neurons)
    assert weights.read_neurons(MODEL, 0, torch.tensor([1, 2]), draws=5).neurons.tolist() == [1, 2]


def test_a_prompt_without_such_keys_counted_as_a_score_of_0_in_the_interval():
    repeating, others = [[1, 2, 3, 2, 3], [4, 5, 6, 4, 6], [7, 8, 8, 7, 9]], [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]
    alone, mixed = (heads.score_heads(MODEL, prompts, draws=5) for prompts in (repeating, repeating + others))
    intervals = [[row[:4] for row in found.top_heads(4, "duplicate").rows] for found in (alone, mixed)]
    for (name, *expected), (same, *values) in zip(*intervals, strict=True):
        assert name == same and values == pytest.approx(expected, abs=1e-6)


def test_the_map_of_overlaps_has_one_row_per_layer():
    """MLPs of all layers were one nameless row, and each shared key head had a column of its own."""
    model = tiny_model(n_heads=4, n_key_value_heads=2)
    drawn = weights.measure_overlap(model, draws=2).figure()
    assert list(drawn.layout.yaxis.ticktext) == list(drawn.layout.xaxis.ticktext) == ["L0", "L1"]

"""Heads asked for by number or name, and models that cannot be asked: alike in every method."""

import pytest
import torch

from hooklens.core.errors import InputError
from hooklens.data.repeated import repeated_tokens
from hooklens.plugins.heads.copy_suppression import score_copy_suppression
from hooklens.plugins.heads.copying import score_copying
from hooklens.plugins.heads.head_scores import score_heads
from hooklens.plugins.heads.induction import find_induction_heads
from hooklens.plugins.heads.knockout import knock_out_keys
from hooklens.plugins.heads.mediation import measure_mediation
from hooklens.plugins.heads.previous_token import score_positions
from hooklens.plugins.heads.redundancy import measure_redundancy
from hooklens.plugins.heads.taxonomy import classify_heads
from hooklens.sweeps.nodes import read_heads
from hooklens.testing import check_plugin, tiny_model

PLUGINS = [
    *(
        "classify_heads",
        "score_heads",
        "knock_out_keys",
        "find_induction_heads",
        "score_copying",
        "score_copy_suppression",
        "score_composition",
        "measure_redundancy",
    ),
    *("score_positions", "measure_mediation", "find_name_movers"),
]


def asked(model, heads):
    text = repeated_tokens(model, 4)
    both = model, text.tokens, text.metric()
    return {
        "mediation": lambda: measure_mediation(*both, heads).heads,
        "redundancy": lambda: measure_redundancy(*both, heads).heads,
        "knockout": lambda: knock_out_keys(*both, heads=heads).heads,
        "copy_suppression": lambda: score_copy_suppression(model, n=4, heads=heads).calibration.heads,
        "induction_heads": lambda: [
            f"L{a}H{b}" for a, b in (~find_induction_heads(model, n=4, heads=heads).rise[0].isnan()).nonzero().tolist()
        ],
    }


@pytest.mark.parametrize("method", asked(tiny_model(), None))
def test_heads_are_pairs_or_names_and_layers_count_from_the_end(method):
    model = tiny_model()
    for heads in ([(0, 1), (1, 0)], ["L0H1", "L1H0"], [(-2, 1), "L-1H0"]):
        assert asked(model, heads)[method]() == ["L0H1", "L1H0"]
    for heads in ([(2, 0)], ["L0H7"], ["head 3"], [], [(0, 0), (-2, 0)]):
        with pytest.raises(InputError, match=r"layers 0 to 1|heads 0 to 1|no head is called|names none|one twice"):
            asked(model, heads)[method]()


def test_no_heads_is_every_head_and_one_name_is_one_head():
    assert read_heads(tiny_model(), None) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert read_heads(tiny_model(), "L1H1") == [(1, 1)]


def test_dropout_that_is_on_is_refused_by_every_method_that_runs_the_model():
    """Each pass drew masks of its own, and differences between passes were taken for effects."""
    model = tiny_model()
    model.add_module("dropout", torch.nn.Dropout(0.1))
    text = repeated_tokens(model, 4)
    calls = [classify_heads, score_heads, score_copying, score_positions, *asked(model, [(0, 0), (0, 1)]).values()]
    for call in calls:
        with pytest.raises(InputError, match="dropout"):
            call(model) if call in (classify_heads, score_heads, score_copying, score_positions) else call()
    model.eval()
    assert len(measure_mediation(model, text.tokens, text.metric(), ["L0H0"]).heads) == 1


@pytest.mark.parametrize("plugin", PLUGINS)
def test_models_in_bfloat16_are_answered_and_keep_the_contract(plugin):
    """Six of these died on quantile, eigvals, qr or mixed dtypes."""
    rotary = {"n_heads": 4, "n_key_value_heads": 2, "positional_embedding_type": "rotary", "normalization_type": "RMS"}
    models = {"rotary": tiny_model(dtype=torch.bfloat16, **rotary)}
    if plugin in ("score_positions", "score_composition"):  # learned positions and LayerNorm take another way there
        models["bfloat16"] = tiny_model(dtype=torch.bfloat16)
    check_plugin(plugin, models=models)


def test_effects_of_a_bfloat16_model_are_not_rounded_to_eight_bits():
    found = classify_heads(tiny_model(dtype=torch.bfloat16), n=6, draws=50, ioi=0)
    assert found.effect.dtype == found.placebo.dtype == torch.float32

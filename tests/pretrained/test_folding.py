"""Foldings: log-probabilities stay, the model given stays, and where they could not stay the folding is refused."""

import copy

import pytest
import torch
from families import FAMILIES, tiny, tiny_tokens

from hooklens.core.errors import InputError
from hooklens.model.config import Biases, LinearScore, PreNorm, RMSNormPart, VectorEmbed
from hooklens.pretrained.folding import (
    FOLDINGS,
    center_unembed,
    center_writing_weights,
    fold_all,
    fold_ln,
    fold_value_biases,
)
from hooklens.pretrained.model_check import check, random_inputs
from hooklens.testing import tiny_model

BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-9}
LAYER_NORM = ("gpt2", "gpt_neox", "gpt_neox_serial")
SOFT_CAPPED = ("gemma2",)


def applies(fold: str, name: str) -> bool:
    if fold == "center_writing_weights":
        return name in LAYER_NORM
    return fold != "center_unembed" or name not in SOFT_CAPPED


CASES = [(fold, name) for fold in FOLDINGS for name in FAMILIES if applies(fold, name)]


def log_probs(model, x=None):
    with torch.no_grad():
        return model(tiny_tokens() if x is None else x).log_softmax(-1)


def shaken(model):
    """The model with every parameter random, its norms' too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.mark.parametrize(("fold", "name"), CASES)
def test_log_probabilities_stay_and_the_model_given_is_untouched(fold, name):
    dtype = torch.float32 if name == "llama" else torch.float64
    model = tiny(name, dtype)
    before, cfg = copy.deepcopy(model.state_dict()), model.cfg
    folded = FOLDINGS[fold](model)
    assert (log_probs(folded) - log_probs(model)).abs().max() < BOUNDS[dtype]
    assert folded.cfg.folded == (fold,) and folded.dtype == dtype
    with torch.no_grad():
        for p in folded.parameters():
            p.fill_(7.0)
    assert model.cfg == cfg and all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_after_fold_ln_norms_before_a_layer_have_unit_weight(name):
    model = fold_ln(tiny(name))
    for norm in [model.ln_final, *(n for block in model.blocks for n in (block.ln1, block.ln2))]:
        assert torch.equal(norm.gain(), torch.ones_like(norm.gain()))
        assert norm.bias is None or not norm.bias.any()
    assert not model.cfg.tie_word_embeddings


def test_fold_ln_keeps_the_norms_that_no_layer_reads():
    raw, folded = tiny("gemma3"), fold_ln(tiny("gemma3"))
    for mine, theirs in zip(raw.blocks, folded.blocks, strict=True):
        for path in ("ln1_post", "ln2_post", "attn.q_norm", "attn.k_norm"):
            assert torch.equal(mine.get_submodule(path).weight, theirs.get_submodule(path).weight)


def test_folding_twice_changes_nothing_more():
    once = fold_ln(tiny("gpt2", torch.float64))
    twice = fold_ln(once)
    assert twice.cfg == once.cfg
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_all_four_together():
    model = tiny("gpt2", torch.float64)
    folded = fold_all(model, list(FOLDINGS))
    assert (log_probs(folded) - log_probs(model)).abs().max() < 1e-9
    assert folded.W_E.mean(-1).abs().max() < 1e-12 and folded.W_U.mean(-1).abs().max() < 1e-12
    assert check(folded).ok


def test_fold_ln_makes_biases_where_a_layer_had_none():
    model = shaken(tiny_model(biases=Biases(qkv=False, o=False, mlp=False), gated_mlp=True, dtype=torch.float64))
    folded = fold_ln(model)
    x = random_inputs(model, batch=2, pos=6, seed=0)
    assert (log_probs(folded, x) - log_probs(model, x)).abs().max() < 1e-9
    assert folded.cfg.biases == Biases(qkv=True, o=False, mlp=True, unembed=True)


def test_a_gate_without_a_bias_stays_without_one_unless_a_norms_bias_is_folded_into_it():
    bare = Biases(qkv=False, o=False, gate=False)
    for norm, biased in (("RMS", False), ("LN", True)):
        model = shaken(tiny_model(biases=bare, gated_mlp=True, normalization_type=norm, dtype=torch.float64))
        folded = fold_ln(model)
        x = random_inputs(model, batch=2, pos=6, seed=0)
        assert (log_probs(folded, x) - log_probs(model, x)).abs().max() < 1e-9
        assert (folded.blocks[0].mlp.gate.bias is not None) == biased and folded.b_in is not None


def test_fold_value_biases_makes_an_output_bias_where_there_was_none():
    model = tiny("qwen2", torch.float64)  # biases on q, k and v only, and keys shared by two heads
    folded = fold_value_biases(model)
    assert model.blocks[0].attn.b_O is None and folded.blocks[0].attn.b_O.abs().max() > 0
    assert not folded.b_V.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"block": "parallel"},
        {"attn_only": True},
        {"embed": VectorEmbed(d_in=3, bias=True)},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_foldings_of_models_of_our_own(changes):
    model = shaken(tiny_model(dtype=torch.float64, **changes))
    x = random_inputs(model, batch=2, pos=6, seed=0)
    for fold in FOLDINGS.values():
        assert (log_probs(fold(model), x) - log_probs(model, x)).abs().max() < 1e-9


def test_centred_weights_write_a_stream_without_mean():
    model = center_writing_weights(shaken(tiny_model(dtype=torch.float64)))
    _, cache = model.run_with_cache([[1, 2, 3]])
    assert max(cache["resid_post", layer].mean(-1).abs().max() for layer in range(2)) < 1e-12


@pytest.mark.parametrize(
    ("fold", "changes", "why"),
    [
        (fold_ln, {"block": "post"}, "the norm's output is the residual stream"),
        (center_unembed, {"output_logits_soft_cap": 5.0}, "soft cap"),
        (center_writing_weights, {"normalization_type": RMSNormPart()}, "RMSNorm, which does not subtract it"),
        (center_writing_weights, {"normalization_type": None}, "no norm"),
        (center_writing_weights, {"block": PreNorm(final_norm=False)}, "no norm"),
        (center_writing_weights, {"block": "sandwich"}, "a norm writes to the residual stream"),
        (center_writing_weights, {"block": "post"}, "a norm writes to the residual stream"),
        (center_writing_weights, {"positional_embedding_type": "sinusoidal"}, "sinusoidal"),
        (fold_value_biases, {"score_fn": LinearScore()}, "need not sum to 1"),
    ],
)
def test_a_folding_that_would_not_be_exact_is_refused_with_the_reason(fold, changes, why):
    with pytest.raises(InputError, match=f"{fold.__name__} would not be exact.*{why}"):
        fold(tiny_model(**changes))


def test_a_folded_model_has_no_hooks_and_keeps_its_tokenizer():
    model = tiny("gpt2")
    model.tokenizer = object()
    model.add_hook(("z", 0), lambda act, hook: act * 0)
    folded = fold_ln(model)
    assert folded.tokenizer is model.tokenizer
    assert not any(point.handles for point in folded.hook_points().values())


def test_a_model_that_forbids_a_token_is_folded_and_checked():
    """The mean of b_U was -inf, and every folded logit NaN."""
    model = tiny_model(biases=Biases(unembed=True), d_vocab=11)
    with torch.no_grad():
        model.b_U[7] = float("-inf")
    assert check(model).ok
    tokens = torch.tensor([[1, 2, 3]])
    folded = center_unembed(model)
    torch.testing.assert_close(folded(tokens).log_softmax(-1), model(tokens).log_softmax(-1), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.b_U[6] = float("inf")
    assert not check(model).ok

"""Random tokens that repeat."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.data.repeated import repeated_tokens
from hooklens.testing import induction_model, or_gate, tiny_model


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(3, 40), st.integers(3, 60), st.integers(0, 1000))
def test_every_sequence_repeats_its_pattern_and_no_token_comes_twice_in_one(n, length, d_vocab, seed):
    model = tiny_model(d_vocab=d_vocab, n_ctx=32)
    found = repeated_tokens(model, n, length=length, seed=seed)
    assert len(found) == n and found.tokens.shape[1] == min(length, 32)
    for row, period in zip(found.tokens.tolist(), found.period.tolist(), strict=True):
        assert len({*row[1 : 1 + period], row[0]}) == period + 1
        assert all(row[i] == row[i - period] for i in range(1 + period, len(row)))
    assert found.first_part == 1 + int(found.period.min()) <= found.first_query < found.tokens.shape[1]


def test_periods_differ_and_seeds_give_other_tokens():
    model = tiny_model(d_vocab=60)
    found = repeated_tokens(model, 8)
    assert len(set(found.period.tolist())) == 5 and found.period.max() == 12
    assert torch.equal(found.tokens, repeated_tokens(model, 8).tokens)
    assert not torch.equal(found.tokens, repeated_tokens(model, 8, seed=1).tokens)


def test_the_metric_is_minus_the_mean_loss_of_the_repeated_tokens():
    model = tiny_model(dtype=torch.float64)
    found = repeated_tokens(model, 3)
    with torch.no_grad():
        logits = model(found.tokens)
    losses = torch.nn.functional.cross_entropy(
        logits[:, found.first_query : -1].transpose(1, 2), found.tokens[:, found.first_query + 1 :], reduction="none"
    )
    torch.testing.assert_close(found.metric()(logits), -losses.mean(1), atol=1e-12, rtol=0)
    sweep = hl.patch(model, found.tokens, found.tokens, found.metric(), site="z", value="zero")
    assert sweep.how == "engine" and sweep.largest_error < 1e-10


def test_the_induction_model_knows_every_repeat_and_nothing_before():
    model = induction_model()
    found = repeated_tokens(model, 4)
    with torch.no_grad():
        assert bool((found.metric()(model(found.tokens)) > -0.01).all())


def test_special_tokens_are_not_drawn_and_bos_begins():
    from hooklens.pretrained.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer(" ".join(f"w{i}" for i in range(40)))
    model = tiny_model(d_vocab=60)
    model.tokenizer = tokenizer
    found = repeated_tokens(model, 6)
    special = {i for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) if i is not None}
    if tokenizer.bos_id is not None:
        assert set(found.tokens[:, 0].tolist()) == {tokenizer.bos_id}
    assert not special & set(found.tokens[:, 1:].flatten().tolist())


def test_what_cannot_repeat_is_refused():
    with pytest.raises(InputError, match="the period must fit twice"):
        repeated_tokens(tiny_model(), 2, length=2)
    with pytest.raises(InputError, match="period of 9"):
        repeated_tokens(tiny_model(), 2, length=13, period=9)
    with pytest.raises(InputError, match="cannot draw 0 sequences"):
        repeated_tokens(tiny_model(), 0)
    with pytest.raises(InputError, match="reads vectors"):
        repeated_tokens(tiny_model(embed={"part": "vectors", "d_in": 3}), 2)
    assert repeated_tokens(or_gate(), 2).period.tolist() == [1, 1]

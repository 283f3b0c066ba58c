"""Mediation, redundancy and positions, on models in which the answer is known."""

import pytest
import torch

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.data.repeated import repeated_tokens
from hooklens.plugins.heads.mediation import measure_mediation
from hooklens.plugins.heads.previous_token import score_positions
from hooklens.plugins.heads.redundancy import measure_redundancy
from hooklens.testing import induction_model, or_gate, tiny_model


def logit(logits):
    return logits[:, -1, 1]


def test_the_previous_token_head_acts_through_the_induction_head_alone():
    model = induction_model()
    both = repeated_tokens(model, 8)
    text, others = both.part(0, 4), both.part(4, 8)
    found = measure_mediation(model, text.tokens, text.metric(), [(0, 0), (1, 1)], value=hl.Mean(others.tokens))
    assert bool((found.total > 1).all())
    assert found.direct[:, 0].abs().max() == 0 and found.mlps.abs().max() == 0
    torch.testing.assert_close(found.later_heads[:, 0], found.total[:, 0])
    torch.testing.assert_close(found.direct[:, 1], found.total[:, 1])
    rows = {(row[0], row[1]): row[2:] for row in found.roads().rows}
    value, low, high, q = rows["L0H0", "through heads"]
    assert 1 < low < value < high and q == pytest.approx(10 / 4 * 2 / 2**4)  # 4 of 10 tests are as small as can be
    assert rows["L0H0", "direct"] == (0.0, 0.0, 0.0, 1.0)
    assert found.table(1).rows[0][-1] == pytest.approx(q)


def test_the_gates_head_acts_through_the_mlp_alone():
    gate = or_gate()
    with torch.no_grad():
        gate.blocks[0].attn.b_V[1] = 0.0  # one head on
    found = measure_mediation(gate, torch.zeros(2, 3, dtype=torch.long), logit, [(0, 0)])
    assert found.total.abs().max() == 0  # the mean of a constant is that constant
    with torch.no_grad():
        gate.blocks[0].attn.b_V[0] = 0.0
        gate.W_E[1, 0] = gate.blocks[0].attn.W_V[0, 0, 0] = gate.blocks[0].attn.W_O[0, 0, 0] = 1.0
    tokens = torch.tensor([[1, 1], [1, 1]])
    found = measure_mediation(gate, tokens, logit, [(0, 0)], value=hl.Mean(torch.tensor([[0, 0]])))
    assert found.direct.abs().max() == 0 and found.later_heads.abs().max() == 0
    torch.testing.assert_close(found.mlps, found.total)


@pytest.mark.parametrize("changes", [{}, {"block": "parallel"}, {"block": "sandwich"}, {"attn_only": True}])
def test_total_and_direct_are_plain_hooked_runs(changes):
    model = tiny_model(dtype=torch.float64, n_layers=3, **changes)
    both = repeated_tokens(model, 4)
    text, others = both.part(0, 2), both.part(2, 4)
    layer, head = 1, 1
    found = measure_mediation(model, text.tokens, text.metric(), [(layer, head)], value=hl.Mean(others.tokens))
    with torch.no_grad():
        logits, cache = model.run_with_cache(text.tokens)
        _, other = model.run_with_cache(others.tokens, "z")
        mean = other["z", layer].mean(0)

        def without(z, hook):
            z[:, :, head] = mean[:, head]
            return z

        edited, live = model.run_with_hooks(text.tokens, fwd_hooks=[(("z", layer), without)]), {}
        _, live = _with_hook(model, text.tokens, layer, without)
        moved = live["attn_out", layer] - cache["attn_out", layer]
        direct = model.read_out(cache["resid_post", -1] + moved)
    base = text.metric()(logits)
    torch.testing.assert_close(found.total[:, 0], base - text.metric()(edited), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.direct[:, 0], base - text.metric()(direct), atol=1e-10, rtol=0)
    parts = found.direct + found.mlps + found.later_heads + found.interaction
    torch.testing.assert_close(parts, found.total, atol=1e-12, rtol=0)


def _with_hook(model, tokens, layer, edit):
    with model.hooks(fwd_hooks=[(("z", layer), edit)]):
        return model.run_with_cache(tokens, "attn_out")


def test_in_the_last_attention_only_layer_all_is_direct():
    model = tiny_model(attn_only=True, dtype=torch.float64)
    text = repeated_tokens(model, 3)
    found = measure_mediation(model, text.tokens, text.metric(), [(1, 0)])
    torch.testing.assert_close(found.direct, found.total, atol=1e-12, rtol=0)
    assert found.later_heads.abs().max() < 1e-12


def test_two_heads_of_which_one_is_enough_are_redundant():
    gate = or_gate()
    with torch.no_grad():  # after token 1 both heads write 2 over the -1 that is there, after token 0 nothing
        gate.blocks[0].attn.b_V.zero_()
        gate.W_E[1, 0] = -1.0
        gate.blocks[0].attn.W_V[:, 0, 0] = -2.0
    one, zero = torch.ones(3, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)

    def said(logits):
        return logits[:, -1, 1]

    found = measure_redundancy(gate, one, said, [(0, 0), (0, 1)], value=hl.Mean(zero))
    assert found.single.abs().max() == 0
    assert found.joint[:, 0, 1].tolist() == [2.0, 2.0, 2.0] == found.interaction[:, 0, 1].tolist()
    assert found.cosine[0, 1] == pytest.approx(1.0)


def test_heads_on_one_road_are_complementary():
    model = induction_model()
    both = repeated_tokens(model, 12)
    text, others = both.part(0, 6), both.part(6, 12)
    found = measure_redundancy(
        model, text.tokens, text.metric(), [(0, 0), (1, 1), (0, 1)], value=hl.Mean(others.tokens)
    )
    single = found.single.mean(0)
    assert bool((single[:2] > 1).all()) and single[2].abs() < 1e-5
    assert found.interaction.mean(0)[0, 1] < -0.5 * single.min(dim=0).values.clamp_min(1)
    assert found.interaction.mean(0)[2].abs().max() < 1e-5
    assert found.top(1).rows[0][0] == "L0H0 L1H1"


def test_joint_ablation_is_one_hooked_run_and_likeness_is_within_bounds():
    model = tiny_model(dtype=torch.float64)
    text = repeated_tokens(model, 4)
    found = measure_redundancy(model, text.tokens, text.metric(), [(0, 1), (1, 0), (1, 1)])
    with torch.no_grad():
        _, cache = model.run_with_cache(text.tokens, "z")

        def without(z, hook):
            heads = {0: [1], 1: [1]}[int(hook.name.split(".")[1])]
            z[:, :, heads] = cache[hook.name].mean((0, 1))[heads]
            return z

        logits = model.run_with_hooks(text.tokens, fwd_hooks=[("z", without)])
    expected = found.base_per_sequence - text.metric()(logits)
    torch.testing.assert_close(found.joint[:, 0, 2], expected, atol=1e-10, rtol=0)
    assert torch.equal(found.interaction, found.interaction.mT)
    for square in (found.cka, found.cosine):
        torch.testing.assert_close(square.diagonal(), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
        torch.testing.assert_close(square, square.T)
    off = ~torch.eye(3, dtype=torch.bool)
    assert bool((found.cka_shuffled[off] < 1).all())
    x = model.blocks[0].attn.results(cache["z", 0][:, 1:])[:, :, 1].flatten(0, 1)
    y = model.blocks[1].attn.results(cache["z", 1][:, 1:])[:, :, 0].flatten(0, 1)
    x, y = (a - a.mean(0) for a in (x, y))
    linear = (
        (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    ).detach()  # Kornblith's equation 3 as it stands
    assert float(found.cka[0, 1]) == pytest.approx(float(linear), abs=1e-9)


def test_positions_of_the_hand_set_head():
    found = score_positions(induction_model())
    assert found.share[0].tolist() == pytest.approx([1.0, found.chance], abs=1e-6)  # a head of zeros ties everywhere
    assert found.margin[0, 0] >= 0 and found.order()[0] == (0, 0)


def test_the_table_is_the_product_of_the_weights():
    model = tiny_model(dtype=torch.float64)
    found = score_positions(model, n_pos=6)
    with torch.no_grad():
        w = model.W_pos[:6]
        w = w - w.mean(1, keepdim=True)
        expected = w @ model.blocks[1].attn.QK.AB @ w.T / 2
    torch.testing.assert_close(found.scores[1], expected, atol=1e-12, rtol=0)


def test_a_rotary_head_set_to_look_one_back():
    model = tiny_model(
        n_layers=1, n_heads=1, positional_embedding_type="rotary", normalization_type=None, dtype=torch.float64
    )
    attn = model.blocks[0].attn
    with torch.no_grad():  # constant query and key; the query turned on by one step, so that distance 1 scores highest
        for p in (attn.W_Q, attn.W_K, attn.b_Q, attn.b_K):
            p.zero_()
        attn.b_K[0, 0] = attn.b_Q[0, 4] = 1.0
        angle = torch.tensor(1.0, dtype=torch.float64)
        attn.b_Q[0, 0], attn.b_Q[0, 4] = 10 * angle.cos(), -10 * angle.sin()
        attn.b_K[0, 0] = 1.0
    found = score_positions(model, n_pos=4)
    kernel = [float(found.scores[0, 0, p, p - 1] - found.scores[0, 0, p, p]) for p in range(1, 4)]
    assert kernel[0] == pytest.approx(kernel[1]) == pytest.approx(kernel[2])  # of the distance alone
    assert found.share[0, 0] == 1.0 and kernel[0] > 0


def test_the_position_share_has_a_null_that_freshly_initialised_models_follow():
    """A rotary head's rows go together: a head drawn at random had a share of 1 about once in n_pos."""
    families = ({}, {"positional_embedding_type": "rotary", "n_key_value_heads": 2}, {"attn_only": True})
    p = []
    for seed in range(18):
        model = tiny_model(seed=seed, n_heads=4, d_model=32, n_ctx=16, d_vocab=30, **families[seed % 3])
        p.append(score_positions(model, n_pos=8, n=4, seed=seed).p.flatten())
    p = torch.cat(p)
    for level in (0.05, 0.1, 0.5):
        assert abs(float((p <= level).float().mean()) - level) < 4 * (level * (1 - level) / len(p)) ** 0.5 + 0.01
    assert float(p.min()) >= 0.001


def test_bad_input_says_what_would_work():
    model = tiny_model()
    text = repeated_tokens(model, 2)
    with pytest.raises(InputError, match="layers 0 to 1"):
        measure_mediation(model, text.tokens, text.metric(), [(5, 0)])
    with pytest.raises(InputError, match="one twice"):
        measure_redundancy(model, text.tokens, text.metric(), [(0, 0), (0, 0)])
    with pytest.raises(InputError, match="at least two"):  # the table was empty, without a word
        measure_redundancy(model, text.tokens, text.metric(), [(0, 0)])
    with pytest.raises(InputError, match="post-norm"):
        measure_mediation(tiny_model(block="post"), text.tokens, text.metric(), [(0, 0)])
    with pytest.raises(InputError, match="without one"):
        score_positions(tiny_model(positional_embedding_type="none"))
    with pytest.raises(InputError, match="queries are normalised"):
        score_positions(tiny_model(qk_norm="RMS"))

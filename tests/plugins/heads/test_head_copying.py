"""OV copying, copy suppression and calibration."""

import pytest
import torch

from hooklens.core.errors import InputError
from hooklens.data.repeated import repeated_tokens
from hooklens.plugins.heads.copy_suppression import _another, score_copy_suppression
from hooklens.plugins.heads.copying import _streams, score_copying
from hooklens.plugins.heads.ece_change import calibration_change
from hooklens.plugins.lens.calibration import measure_calibration
from hooklens.testing import induction_model, tiny_model


def negated():
    """The induction model, its induction head writing the opposite of what it copies."""
    model = induction_model()
    with torch.no_grad():
        model.blocks[1].attn.W_O[1] *= -1
    return model


def test_the_copying_head_copies_and_its_negative_suppresses():
    found, turned = score_copying(induction_model()), score_copying(negated())
    assert found.positive[1, 1] == pytest.approx(1, abs=1e-5) and found.top_share(1)[1, 1] == 1
    assert turned.positive[1, 1] == pytest.approx(-1, abs=1e-5) and turned.bottom_share(1)[1, 1] == 1
    assert turned.z[1, 1] == pytest.approx(-float(found.z[1, 1]), rel=1e-5)
    assert found.copies[1, 1] < 0.05 and turned.suppresses[1, 1] < 0.05 < turned.copies[1, 1]
    assert found.copies[0].tolist() == [1.0, 1.0]  # these write nothing into the logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block": "sandwich"},
        {"n_heads": 4, "n_key_value_heads": 2, "d_head": 4, "normalization_type": "RMS"},
        {"block": "parallel", "normalization_type": None, "attn_only": True},
    ],
)
def test_the_eigenvalues_are_those_of_the_token_by_token_circuit(changes):
    model = tiny_model(dtype=torch.float64, **changes)
    found = score_copying(model, n_tokens=40, draws=10)
    tokens, streams = _streams(model, 40, 0)
    assert torch.equal(tokens, found.tokens)
    with torch.no_grad():
        for layer in range(2):
            block, attn = model.blocks[layer], model.blocks[layer].attn
            x = streams[min(layer, 1)]
            x = x if block.ln1 is None else block.ln1(x)
            for head in range(model.cfg.n_heads):
                kv = head // (attn.n_heads // attn.n_kv_heads)
                out = x @ attn.W_V[kv] @ attn.W_O[head]
                if block.ln1_post is not None:
                    out = block.ln1_post.linearised(out, torch.ones_like(out[:, :1]))
                if model.ln_final is not None:
                    out = model.ln_final.linearised(out, torch.ones_like(out[:, :1]))
                circuit = out @ model.W_U[:, tokens]
                values = torch.linalg.eigvals(circuit)
                share = values.real.sum() / values.abs().sum()
                torch.testing.assert_close(found.positive[layer, head], share, atol=1e-6, rtol=1e-6)
                own = circuit.diagonal() - circuit.mean(1)
                torch.testing.assert_close(found.own[:, layer, head], own, atol=1e-10, rtol=0)


def test_p_values_of_freshly_initialised_heads_are_uniform():
    p = []
    for seed in range(25):
        model = tiny_model(seed=seed, n_heads=4, d_model=32, d_vocab=50, tie_word_embeddings=bool(seed % 2))
        found = score_copying(model, n_tokens=64, seed=seed)
        p.append(torch.stack([found.copies, found.suppresses]).flatten())
    p = torch.cat(p)
    for level in (0.05, 0.1, 0.5):
        assert abs(float((p <= level).float().mean()) - level) < 4 * (level * (1 - level) / len(p)) ** 0.5 + 0.01


def test_post_norm_blocks_are_refused():
    for method in (score_copying, score_copy_suppression):
        with pytest.raises(InputError, match="post-norm"):
            method(tiny_model(block="post"))


def test_the_negative_head_lowers_the_token_it_looks_at_and_the_control_does_not_move():
    found = score_copy_suppression(negated())
    assert found.order()[0] == (1, 1) and found.calibration.heads[0] == "L1H1"
    assert found.direct.mean(0)[1, 1] < -1 < found.control.mean(0)[1, 1]
    assert found.direct[:, 0].abs().max() == 0


def test_the_direct_effect_is_a_run_in_which_everything_else_is_held():
    model = tiny_model(dtype=torch.float64, normalization_type="RMS", n_heads=4, n_key_value_heads=2)
    tokens = torch.tensor([[1, 5, 2, 7, 5, 2], [3, 8, 9, 4, 8, 9]])
    found = score_copy_suppression(model, tokens, heads=[(0, 1)])
    layer, head = 0, 1
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        z = cache["z", layer]
        moved = (z[:, :, head] - z[:, :, head].mean((0, 1))) @ model.blocks[layer].attn.W_O[head]
        logits_without = model.read_out(cache["resid_post", -1] - moved)
        change = logits - logits_without
        weight, key = cache["pattern", layer][:, head, :, 1:].max(-1)
        effect = change.gather(2, tokens.gather(1, key + 1)[..., None])[..., 0] - change.mean(-1)
        weight[:, 0] = 0
    expected = (effect * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(found.direct[:, layer, head], expected, atol=1e-10, rtol=0)


def test_the_control_of_the_anti_copy_effect_is_never_the_token_itself():
    """It was drawn among positions, and so the very token in one of twelve."""
    tokens = repeated_tokens(induction_model(), 50).tokens
    other = _another(tokens, 11, 0)
    assert not bool((other == tokens).any())
    assert not bool((other[:, 1:] == tokens[:, :1]).any())  # the first position is where heads rest
    assert bool((other[..., None] == tokens[:, None]).any(-1).all())  # of the same prompt wherever there is one
    alike = _another(torch.tensor([[3, 3, 3]]), 11, 0)
    assert not bool((alike == 3).any()) and int(alike.max()) < 11


def test_ablating_an_idle_head_changes_no_calibration():
    found = score_copy_suppression(induction_model(), heads=[(0, 1), "L1H1"]).calibration
    assert found.heads == ["L0H1", "L1H1"]
    assert found.change[0] == 0 and found.low[0] == found.high[0] == 0
    assert found.change[1] != 0


def test_the_calibration_change_is_that_of_a_hooked_run_on_the_untouched_runs_bins():
    model = tiny_model(dtype=torch.float64, n_heads=4, n_key_value_heads=2, normalization_type="RMS")
    tokens = repeated_tokens(model, 12).tokens
    found = calibration_change(model, tokens, [(1, 2)], "repeats")
    base = measure_calibration(model, tokens)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, "z")
        mean = cache["z", 1][:, :, 2].mean((0, 1))

        def ablate(z, hook):
            z[:, :, 2] = mean
            return z

        log_probs = model.run_with_hooks(tokens, fwd_hooks=[(("z", 1), ablate)])[:, :-1].log_softmax(-1)
    best, token = log_probs.max(-1)
    gap = best.exp() - (token == tokens[:, 1:]).to(best)
    which = torch.bucketize(best.exp(), base.edges[1:-1])
    error = sum(float(gap[which == i].sum().abs()) for i in range(len(base.edges) - 1)) / gap.numel()
    assert float(found.change[0]) == pytest.approx(error - base.expected_error, abs=1e-9)
    assert float(found.low[0]) <= float(found.change[0]) <= float(found.high[0])


def test_the_calibration_change_has_a_control_and_most_heads_of_random_models_do_not_beat_it():
    """It had none: any ablation moves the error. The controls write as large a change as the ablated head loses."""
    p = []
    for seed in range(6):
        model = tiny_model(seed=seed, n_heads=4, d_model=32, d_vocab=50)
        tokens = repeated_tokens(model, 12, seed=seed).tokens
        found = calibration_change(model, tokens, [(0, 1), (1, 2)], "repeats", seed=seed)
        assert found.control.shape == (2, 6) and bool((found.p >= 1 / 7).all())  # never a called head as a control
        p.append(found.p)
    assert 0.3 < float(torch.cat(p).mean()) < 0.8  # uniform over 1/7 to 1 would give 0.57


def test_calibration_is_measured_on_text_where_there_is_a_tokenizer():
    assert score_copy_suppression(induction_model()).data == "random tokens that repeat"
    assert score_copy_suppression(induction_model(), [[1, 2, 3, 4]] * 4).calibration.data == "prompts"
    found = score_copy_suppression(induction_model(), [[1, 2, 3, 4]] * 4, calibrate_on=[[5, 6, 7]] * 3, heads=[(1, 1)])
    assert found.calibration.loss_change.shape == (3, 1) and found.direct.shape[0] == 4

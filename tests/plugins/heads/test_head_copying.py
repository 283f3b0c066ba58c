"""OV copying, copy suppression and calibration."""

import pytest
import torch

from hooklens.core.errors import InputError
from hooklens.plugins.heads.copy_suppression import calibration_error, copy_suppression
from hooklens.plugins.heads.copying import _streams, copying
from hooklens.testing import induction_model, tiny_model


def negated():
    """The induction model, its induction head writing the opposite of what it copies."""
    model = induction_model()
    with torch.no_grad():
        model.blocks[1].attn.W_O[1] *= -1
    return model


def test_the_copying_head_copies_and_its_negative_suppresses():
    found, turned = copying(induction_model()), copying(negated())
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
    found = copying(model, n_tokens=40, draws=10)
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
    for seed in range(50):
        model = tiny_model(seed=seed, n_heads=4, d_model=32, d_vocab=50, tie_word_embeddings=bool(seed % 2))
        found = copying(model, n_tokens=64, seed=seed)
        p.append(torch.stack([found.copies, found.suppresses]).flatten())
    p = torch.cat(p)
    for level in (0.05, 0.1, 0.5):
        assert abs(float((p <= level).float().mean()) - level) < 4 * (level * (1 - level) / len(p)) ** 0.5 + 0.01


def test_post_norm_blocks_are_refused():
    for method in (copying, copy_suppression):
        with pytest.raises(InputError, match="post-norm"):
            method(tiny_model(block="post"))


def test_the_negative_head_lowers_the_token_it_looks_at_and_the_control_does_not_move():
    found = copy_suppression(negated())
    assert found.order()[0] == (1, 1) and found.ablated[0] == "L1H1"
    assert found.direct.mean(0)[1, 1] < -1 < found.control.mean(0)[1, 1]
    assert found.direct[:, 0].abs().max() == 0


def test_the_direct_effect_is_a_run_in_which_everything_else_is_held():
    model = tiny_model(dtype=torch.float64, normalization_type="RMS", n_heads=4, n_key_value_heads=2)
    tokens = torch.tensor([[1, 5, 2, 7, 5, 2], [3, 8, 9, 4, 8, 9]])
    found = copy_suppression(model, tokens, heads=[(0, 1)])
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


def test_calibration_of_known_confidences():
    confidence = torch.tensor([[0.95, 0.95, 0.55, 0.55]])
    right = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    assert calibration_error(confidence, right, torch.ones(1, 1)).item() == pytest.approx((0.1 + 0.1) / 4)
    twice = calibration_error(confidence.repeat(2, 1), right.repeat(2, 1), torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
    assert twice.tolist() == pytest.approx([0.05, 0.05])


def test_ablating_an_idle_head_changes_no_calibration():
    found = copy_suppression(induction_model(), heads=[(0, 1), (1, 1)])
    assert found.ece_change[0] == 0 and found.low[0] == found.high[0] == 0
    assert found.ece_change[1] != 0

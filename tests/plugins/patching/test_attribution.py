"""attribution_patching: equal to patching where the path is linear, not where it is not, and its control says which."""

import json

import pytest
import torch
from model.zoo import ZOO, zoo_model

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.model.config import PreNorm
from hooklens.plugins.patching.attribution_patching import AttributionPatching, attribution_patch
from hooklens.sweeps.sites import SITES as KINDS
from hooklens.testing import or_gate, tiny_model

CORRUPTED = torch.tensor([[1, 5, 2, 7], [4, 4, 9, 0], [8, 1, 1, 3]])
CLEAN = torch.tensor([[1, 5, 8, 7], [4, 3, 9, 0], [3, 1, 1, 3]])

SITES = {
    "resid_pre": "layer x pos",
    "resid_mid": "layer",
    "resid_post": "layer x pos",
    "attn_out": "layer x pos",
    "mlp_out": "layer",
    "post": "layer x neuron",
    "z": "layer x head x pos",
    "q": "layer x head",
    "k": "layer x head",
    "v": "layer x head",
    "pattern": "layer x head",
    "result": "layer x head",
}


def metric_of(model):
    return hl.logit_diff(model, answer=[3, 1, 4], wrong_answer=[4, 2, 3])


def linear_model(*, dtype=torch.float64, **changes):
    """No norm, no MLP, and patterns that nothing can move: queries and keys are 0."""
    model = tiny_model(attn_only=True, normalization_type=None, dtype=dtype, **changes)
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attn.q, block.attn.k):
                for p in linear.parameters():
                    p.zero_()
    return model


# -- where it is exact


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "z", "v", "pattern", "result"])
def test_on_a_linear_path_it_is_activation_patching(site):
    model = linear_model(n_heads=4, n_key_value_heads=2)
    by = SITES[site]
    found = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), site=site, by=by)
    exact = hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site=site, by=by)
    moved = exact.per_pair - exact.corrupted_per_pair.view(-1, *[1] * (exact.per_pair.ndim - 1))
    torch.testing.assert_close(found.per_pair, moved, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.clean_per_pair, exact.clean_per_pair, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.corrupted_per_pair, exact.corrupted_per_pair, atol=1e-12, rtol=1e-9)
    assert not len(found.checked) or found.largest_error < 1e-12


def test_a_frozen_pattern_makes_it_exact_too():
    """Any weights without norm and MLP: both methods run under other people's hooks, which hold the patterns."""
    model = tiny_model(attn_only=True, normalization_type=None, dtype=torch.float64)
    with torch.no_grad():
        held = model.run_with_cache(CORRUPTED, names="pattern")[1]

    def freeze(pattern, hook):
        return held[hook.name]

    with model.hooks(fwd_hooks=[("pattern", freeze)]):
        found = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), site="z", exact=4)
        exact = hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site="z")
    assert exact.how.startswith("plain loop")
    torch.testing.assert_close(found.effect, exact.effect, atol=1e-12, rtol=1e-9)
    unfrozen = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), site="z", exact=4)
    assert found.largest_error < 1e-12 < 1e-5 < unfrozen.largest_error


def test_a_linear_mlp_keeps_it_exact_and_a_relu_does_not():
    def error(act_fn):
        model = tiny_model(normalization_type=None, act_fn=act_fn, dtype=torch.float64)
        with torch.no_grad():
            for block in model.blocks:
                for linear in (block.attn.q, block.attn.k):
                    for p in linear.parameters():
                        p.zero_()
        return attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), site="z", exact=4).largest_error

    assert error("identity") < 1e-12
    assert error("relu") > 1e-4


def test_the_last_stream_without_a_norm_is_linear_in_any_model():
    model = tiny_model(block=PreNorm(final_norm=False), dtype=torch.float64)
    found = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), site="resid_post", by="layer")
    assert float(found.effect[-1]) == pytest.approx(found.clean - found.corrupted, abs=1e-12)


# -- where it is not


def test_a_saturated_gate_has_no_gradient():
    """Both heads keep the OR gate on: its gradient is 0 and so is the estimate. The clean values switch it off."""
    gate = or_gate(dtype=torch.float64)
    with torch.no_grad():  # after token 1 each head writes -1/2, and 1 + 2 (-1/2) = 0 switches the gate off
        gate.W_E[1, 0] = 1.0
        gate.W_V[0, :, 0, 0] = -1.5

    def says(logits):
        return logits[:, -1, 1]

    found = attribution_patch(gate, [[1]], [[0]], says, site="z", by="layer", exact=1)
    assert found.corrupted == 1 and found.clean == 0
    assert found.effect.tolist() == [0.0] and found.exact.tolist() == [-2.0] and found.largest_error == 2.0


# -- every family, every site, against an own backward pass


@pytest.mark.parametrize("name", [name for name in ZOO if "d_vocab_out" not in ZOO[name]])
def test_every_family_and_site_is_the_gradient_times_the_difference(name):
    model = zoo_model(name, dtype=torch.float64)
    metric = metric_of(model)
    for site, by in SITES.items():
        if f"blocks.0.{KINDS[site].point}" not in model.hook_points():
            continue
        found = attribution_patch(model, CLEAN, CORRUPTED, metric, site=site, by=by, exact=0)
        layers = [small_step(model, metric, site, layer) for layer in range(model.cfg.n_layers)]
        summed = found.per_pair.flatten(2).sum(2) if found.per_pair.ndim > 2 else found.per_pair
        torch.testing.assert_close(summed, torch.stack(layers, 1), atol=1e-5, rtol=1e-4)


def small_step(model, metric, site, layer, h=1e-5):
    """The metric's change along (clean - corrupted) at a whole layer, by a central difference."""
    with torch.no_grad():
        clean = model.run_with_cache(CLEAN, names=(site, layer))[1][site, layer]
        there = model.run_with_cache(CORRUPTED, names=(site, layer))[1][site, layer]
        ends = [
            metric(
                model.run_with_hooks(
                    CORRUPTED, fwd_hooks=[((site, layer), lambda act, hook, s=s: act + s * (clean - there))]
                )
            )
            for s in (h, -h)
        ]
    return (ends[0] - ends[1]) / (2 * h)


def test_grids_are_in_the_order_asked_for():
    model = tiny_model(dtype=torch.float64)
    metric = metric_of(model)
    one = attribution_patch(model, CLEAN, CORRUPTED, metric, site="z", by="layer x head x pos")
    other = attribution_patch(model, CLEAN, CORRUPTED, metric, site="z", by="layer x pos x head")
    torch.testing.assert_close(one.per_pair, other.per_pair.transpose(2, 3))
    heads = attribution_patch(model, CLEAN, CORRUPTED, metric, site="z")
    torch.testing.assert_close(one.per_pair.sum(3), heads.per_pair)


def test_pairs_together_are_pairs_alone_whatever_the_memory():
    model = tiny_model(dtype=torch.float64)
    metric = metric_of(model)
    together = attribution_patch(model, CLEAN, CORRUPTED, metric)
    with hl.engine(memory=1):
        apart = attribution_patch(model, CLEAN, CORRUPTED, metric)
    torch.testing.assert_close(together.per_pair, apart.per_pair, atol=1e-12, rtol=1e-10)
    for i in range(3):
        alone = attribution_patch(model, CLEAN[i : i + 1], CORRUPTED[i : i + 1], metric.pairs(torch.tensor([i])))
        torch.testing.assert_close(together.per_pair[i], alone.per_pair[0], atol=1e-12, rtol=1e-10)


def test_metrics_of_every_kind():
    model = tiny_model(dtype=torch.float64)
    reading = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model))
    plain = attribution_patch(model, CLEAN, CORRUPTED, lambda logits: metric_of(model)(logits))
    torch.testing.assert_close(reading.per_pair, plain.per_pair, atol=1e-12, rtol=1e-10)
    single = attribution_patch(model, CLEAN, CORRUPTED, lambda logits: logits[:, -1, 3].mean())
    by_pair = attribution_patch(model, CLEAN, CORRUPTED, lambda logits: logits[:, -1, 3])
    torch.testing.assert_close(single.per_pair, by_pair.per_pair, atol=1e-12, rtol=1e-10)
    attribution_patch(model, CLEAN, CORRUPTED, hl.loss(model, CLEAN))


def test_prompts_of_different_length():
    """Between the shared ends nothing is written, as in hl.patch; on a linear path the two agree."""
    model = linear_model()
    clean, corrupted = [[1, 5, 8, 7], [4, 3, 9]], [[1, 5, 2, 6, 7], [4, 2, 9]]
    metric = hl.logit_diff(model, answer=[3, 1], wrong_answer=[4, 2])
    found = attribution_patch(model, clean, corrupted, metric, site="z", exact=2)
    exact = hl.patch(model, clean, corrupted, metric, site="z")
    torch.testing.assert_close(found.effect, exact.effect, atol=1e-12, rtol=1e-9)


# -- the control, and what the result says


def test_the_control_is_what_patching_finds(tmp_path):
    model = tiny_model(n_heads=4, dtype=torch.float64)
    found = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), site="z", exact=3, group=[0, 0, 1])
    exact = hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site="z").effect
    cells = [tuple(index) for index in found.checked.tolist()]
    assert len(set(cells)) == 6 and cells[:3] == found.order()[:3] and found.n_top == 3
    torch.testing.assert_close(found.exact, torch.stack([exact[cell] for cell in cells]), atol=1e-12, rtol=1e-9)
    estimated = torch.stack([found.effect[cell] for cell in cells])
    expected = torch.corrcoef(torch.stack([estimated, found.exact]))[0, 1]
    assert found.correlation == pytest.approx(float(expected)) and -1 <= found.rank_correlation <= 1
    assert [row[-1] is None for row in found.table(None).rows].count(False) == 6
    assert f"{found.correlation:.2f}" in found.figure().layout.title.text and len(found.check_figure().data) == 1
    found.save(tmp_path / "found.safetensors")
    assert str(AttributionPatching.load(tmp_path / "found.safetensors").table()) == str(found.table())
    json.dumps(found.to_json(), allow_nan=False)


def test_cells_that_no_patch_changes_are_no_control():
    """Before the first difference everything is equal: agreeing there is no agreement."""
    model = tiny_model()
    found = attribution_patch(model, CLEAN[:1], CORRUPTED[:1], hl.log_prob(model, answer=3), exact=99)
    assert {pos for _, pos in found.checked.tolist()} == {2, 3} and len(found.checked) == 3
    none = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), exact=0)
    assert none.correlation != none.correlation and not len(none.checked) and none.table(2).rows[0][-1] is None


def test_frozen_weights_and_switched_off_gradients_are_no_obstacle():
    model = tiny_model()
    expected = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), site="z")
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        found = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), site="z")
    torch.testing.assert_close(found.per_pair, expected.per_pair)


def test_what_has_no_gradient_is_refused():
    model = tiny_model()
    with pytest.raises(InputError, match="no gradient"):
        attribution_patch(model, CLEAN, CORRUPTED, lambda logits: (logits[:, -1].argmax(-1) == 3).float())
    with pytest.raises(InputError, match="at least 0, got -1"):
        attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), exact=-1)
    with pytest.raises(InputError, match="has no mlp_out"):
        attribution_patch(tiny_model(attn_only=True), CLEAN, CORRUPTED, metric_of(model), site="mlp_out")
    with pytest.raises(InputError, match="same length"):
        attribution_patch(model, [[1, 2]], [[1, 2, 3]], metric_of(model))

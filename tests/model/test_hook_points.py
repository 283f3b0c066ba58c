"""HOOK_POINTS.md on every kind of model: names, order, shapes, identities, and every point causal."""

import pytest
import torch
from close import close
from zoo import TOKENS, ZOO, vector_model, zoo_model

from hooklens.core.names import LAZY, axes, parse
from hooklens.testing import tiny_model

NORM = ["hook_scale", "hook_normalized"]


def documented(cfg) -> list[str]:
    """The names in the order of HOOK_POINTS.md, written out from its table rather than from the modules."""
    rotary = cfg.rotary_at(0) is not None
    has_mlp, normed = not cfg.attn_only, cfg.normalization_type is not None
    ln = lambda name: [f"{name}.{h}" for h in NORM] if normed else []  # noqa: E731
    block = ["hook_resid_pre"] + ["hook_attn_in"] * (cfg.n_heads == cfg.n_key_value_heads)
    block += ["hook_q_input", "hook_k_input", "hook_v_input"]
    block += ln("ln1") if cfg.block.name != "post" else []
    block += ["attn.hook_q", "attn.hook_k", "attn.hook_v"]
    block += [f"attn.{n}_norm.{h}" for n in "qk" for h in NORM] if cfg.qk_norm is not None else []
    block += ["attn.hook_rot_q", "attn.hook_rot_k"] if rotary else []
    block += ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "attn.hook_result"]
    block += ln("ln1_post") if cfg.block.name == "sandwich" else []
    block += ["hook_attn_out"]
    block += ["hook_resid_mid"] if has_mlp and cfg.block.name != "parallel" else []
    block += ln("ln1") if cfg.block.name == "post" and has_mlp else []
    if has_mlp:
        block += ["hook_mlp_in"] + (ln("ln2") if cfg.block.name != "post" else [])
        block += ["mlp.hook_pre"] + ["mlp.hook_pre_linear"] * cfg.gated_mlp + ["mlp.hook_post"]
        block += ln("ln2_post") if cfg.block.name == "sandwich" else []
        block += ["hook_mlp_out"]
    block += ["hook_resid_post"] + (ln("ln2") if cfg.block.name == "post" else [])
    names = ["hook_embed"] + ["hook_pos_embed"] * (not rotary and cfg.positional_embedding_type.name != "none")
    names += [f"blocks.{layer}.{name}" for layer in range(cfg.n_layers) for name in block]
    names += [f"ln_final.{h}" for h in NORM] if cfg.final_norm is not None else []
    return [*names, "unembed.hook_in", "unembed.hook_out"]


@pytest.mark.parametrize("kind", ZOO)
def test_points_exist_and_fire_in_the_documented_order(kind):
    model, fired = zoo_model(kind), []
    assert model.hook_names() == documented(model.cfg)
    model.run_with_hooks(TOKENS, fwd_hooks=[(model.hook_names(), lambda act, hook: fired.append(hook.name))])
    assert fired == model.hook_names()


@pytest.mark.parametrize("kind", ZOO)
def test_shapes_are_those_of_the_named_axes(kind):
    model = zoo_model(kind)
    cfg, (batch, pos) = model.cfg, TOKENS.shape
    size = {
        "batch": batch,
        **dict.fromkeys(("pos", "query_pos", "key_pos"), pos),
        "d_model": cfg.d_model,
        "head": cfg.n_heads,
        "kv_head": cfg.n_key_value_heads,
        "d_head": cfg.d_head,
        "d_mlp": cfg.d_mlp,
        "d_vocab": cfg.d_vocab_out,
        "one": 1,
    }
    _, cache = model.run_with_cache(TOKENS, names=model.hook_names())
    assert list(cache) == model.hook_names()
    for name, act in cache.items():
        assert tuple(act.shape) == tuple(size[axis] for axis in axes(name)), name


@pytest.mark.parametrize("kind", ZOO)
def test_both_residual_identities_hold_exactly(kind):
    model = zoo_model(kind)
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(model.cfg.n_layers):
        pre, attn, post = (cache[name, layer] for name in ("resid_pre", "attn_out", "resid_post"))
        if model.cfg.attn_only:
            assert torch.equal(post, pre + attn)
            continue
        mlp = cache["mlp_out", layer]
        if model.cfg.block.name == "parallel":
            assert torch.equal(post, pre + attn + mlp)
            continue
        mid = cache["resid_mid", layer]
        assert torch.equal(mid, pre + attn)
        stream = mid if model.cfg.block.name != "post" else model.blocks[layer].ln1(mid)
        assert torch.equal(post, stream + mlp)
        if model.cfg.block.name == "post" and layer:
            assert torch.equal(pre, model.blocks[layer - 1].ln2(cache["resid_post", layer - 1]))


def edit(act, hook):
    """Another value at every entry, different along every axis, masked scores left masked."""
    noise = torch.randn(act.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float32).to(act.dtype)
    return act + noise.abs() + 0.1


@pytest.mark.parametrize("kind", ZOO)
def test_every_point_is_causal(kind):
    model = zoo_model(kind)
    # A linear score reads no scale from a lone normalised direction; everything else must move the logits.
    with torch.no_grad():
        plain = model(TOKENS)
        for name in model.hook_names():
            edited = model.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)])
            assert torch.isfinite(edited).all(), name
            assert (edited - plain).abs().max() > 1e-4, f"{name} is served but does not count"


@pytest.mark.parametrize("kind", ZOO)
def test_an_edit_changes_what_fires_after_it_and_nothing_before(kind):
    model = zoo_model(kind)
    names = model.hook_names()
    with torch.no_grad():
        _, plain = model.run_with_cache(TOKENS, names=names)
        for name in names[:: max(1, len(names) // 12)]:
            scope, cache = model.capture(names)
            with scope, model.hooks(fwd_hooks=[(name, edit)]):
                model(TOKENS)
            before = names[: names.index(name)]
            assert all(close(cache[n], plain[n], ulps=20, equal_nan=True) for n in before), name
            assert not torch.allclose(cache[name], plain[name])


@pytest.mark.parametrize("kind", ZOO)
def test_listening_to_any_point_changes_no_number(kind):
    model = zoo_model(kind, dtype=torch.float64)
    with torch.no_grad():
        plain = model(TOKENS)
        listened, _ = model.run_with_cache(TOKENS, names=model.hook_names())
        echoed = model.run_with_hooks(TOKENS, fwd_hooks=[(model.hook_names(), lambda act, hook: act)])
    assert torch.allclose(listened, plain, atol=1e-12) and torch.allclose(echoed, plain, atol=1e-12)


def test_a_cache_of_everything_leaves_the_lazy_points_out():
    model = tiny_model()
    _, cache = model.run_with_cache(TOKENS)
    left_out = set(model.hook_names()) - set(cache)
    assert {parse(name).name for name in left_out} == set(LAZY)


def test_pattern_rows_sum_to_one_and_masked_scores_are_minus_infinity():
    _, cache = zoo_model("gemma2").run_with_cache(TOKENS)
    scores, pattern = cache["attn_scores", 0], cache["pattern", 0]
    distance = torch.arange(5)[:, None] - torch.arange(5)
    seen = (distance >= 0) & (distance < 3)
    assert (torch.isinf(scores) == ~seen).all() and (pattern[..., ~seen] == 0).all()
    assert torch.allclose(pattern.sum(-1), torch.ones(2, 4, 5))
    assert scores[..., seen].abs().max() < 2.0  # the soft cap stands before the mask


def test_result_sums_over_heads_to_what_the_linear_layer_writes():
    model = zoo_model("llama")
    _, cache = model.run_with_cache(TOKENS, names=["result", "attn_out"])
    assert close(cache["result", 0].sum(2), cache["attn_out", 0])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "neox", "post", "qwen3"])
@pytest.mark.parametrize("which, others", [("q", "kv"), ("k", "qv"), ("v", "qk")])
def test_an_edited_head_input_is_normalised_on_its_own_path_and_reaches_its_own_projection_only(kind, which, others):
    model = zoo_model(kind, dtype=torch.float64)
    shift = torch.randn(2, 5, 1, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = {}

    def add_to_first_head(act, hook):
        act[:, :, :1] += shift
        given["stream"] = act[:, :, 0].clone()
        return act

    scope, cache = model.capture(["q", "k", "v", "normalized"])
    _, plain = model.run_with_cache(TOKENS, names=["q", "k", "v", "normalized"])
    with torch.no_grad(), scope, model.hooks(fwd_hooks=[((f"{which}_input", 0), add_to_first_head)]):
        model(TOKENS)
    block = model.blocks[0]
    linear = getattr(block.attn, which)
    expected = linear(block.before_attn(given["stream"])).unflatten(-1, (-1, model.cfg.d_head))[:, :, 0]
    assert torch.allclose(cache[which, 0][:, :, 0], expected, atol=1e-12)
    assert torch.allclose(cache[which, 0][:, :, 1:], plain[which, 0][:, :, 1:], atol=1e-12)
    for other in others:
        assert torch.equal(cache[other, 0], plain[other, 0])
    if kind != "post":
        assert torch.equal(cache["normalized", 0, "ln1"], plain["normalized", 0, "ln1"])


@pytest.mark.parametrize("kind", ["gpt2", "neox", "post", "sandwich_ln"])
def test_an_edited_attn_in_flows_into_all_three_inputs(kind):
    model = zoo_model(kind, dtype=torch.float64)
    add = lambda act, hook: act + 0.5 * torch.arange(8)  # noqa: E731
    scope, cache = model.capture(["q_input", "k_input", "v_input"])
    with torch.no_grad(), scope, model.hooks(fwd_hooks=[(("attn_in", 0), add)]):
        edited = model(TOKENS)
    assert all(torch.equal(cache[f"{n}_input", 0], cache["q_input", 0]) for n in "kv")
    with torch.no_grad():
        one_by_one = model.run_with_hooks(TOKENS, fwd_hooks=[((f"{n}_input", 0), add) for n in "qkv"])
    assert torch.allclose(edited, one_by_one, atol=1e-12)


def test_an_edit_of_the_shared_norm_reaches_only_the_paths_without_an_input_of_their_own():
    model = zoo_model("gpt2", dtype=torch.float64)
    own = [(("q_input", 0), lambda act, hook: act)]
    shared = [(("normalized", 0, "ln1"), lambda act, hook: act * 0)]
    names = ["q", "k", "v"]
    scope, cache = model.capture(names)
    _, plain = model.run_with_cache(TOKENS, names=names)
    with torch.no_grad(), scope, model.hooks(fwd_hooks=own + shared):
        model(TOKENS)
    assert torch.allclose(cache["q", 0], plain["q", 0], atol=1e-12)
    assert not torch.allclose(cache["k", 0], plain["k", 0]) and not torch.allclose(cache["v", 0], plain["v", 0])


def test_a_head_input_whose_listener_returned_nothing_stays_on_the_shared_path():
    model = zoo_model("gpt2")
    plain = model(TOKENS)
    names = ["attn_in", "q_input", "k_input", "v_input"]
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[(names, lambda act, hook: None)]), plain)
    assert torch.equal(model.run_with_cache(TOKENS, names=names)[0], plain)


def test_a_model_of_vectors_has_the_same_points():
    model = vector_model()
    out, cache = model.run_with_cache(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (2, 4, 1) and cache["embed"].shape == (2, 4, 8)

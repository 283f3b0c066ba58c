"""Forward passes whole, partial, padded and transformed; weights and their views."""

import copy
import inspect

import pytest
import torch
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from zoo import TOKENS, ZOO, vector_model, zoo_model

from hooklens.core.errors import InputError, WrongType
from hooklens.model.attention import differentiable_attention
from hooklens.model.config import HookedTransformerConfig, NormalInit, RMSNormPart
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model

KINDS = ["gpt2", "llama", "gemma2", "neox", "post", "linear_gqa", "attn_only", "qwen3"]
CAUSAL = [kind for kind in ZOO if kind != "bidirectional"]


# padding


def padded(side: str, *, extra: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    pads = torch.full((2, extra), 6)
    real, no = torch.ones(2, 5, dtype=torch.long), torch.zeros(2, extra, dtype=torch.long)
    parts = [(pads, no), (TOKENS, real)] if side == "left" else [(TOKENS, real), (pads, no)]
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_equals_no_padding_with_finite_gradients(kind, side):
    model = zoo_model(kind, dtype=torch.float64)
    model(TOKENS).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    tokens, mask = padded(side)
    real = slice(2, None) if side == "left" else slice(0, 5)
    logits = model(tokens, attention_mask=mask)
    with torch.no_grad():
        assert torch.allclose(logits[:, real], model(TOKENS), atol=1e-11)
        written_out, _ = model.run_with_cache(tokens, names="pattern", attention_mask=mask)
        assert torch.allclose(written_out, logits, atol=1e-11)
    logits[:, real].square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-8), name
    model.zero_grad()
    model.run_with_cache(tokens, names="pattern", attention_mask=mask)[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_prompts_of_different_length_in_one_batch_equal_one_by_one():
    model = zoo_model("llama", dtype=torch.float64)
    tokens, mask = padded("left", extra=3)
    tokens[1, :3], mask[1, :3] = torch.tensor([8, 8, 1]), 1
    with torch.no_grad():
        both = model(tokens, attention_mask=mask)
        assert torch.allclose(both[0, 3:], model(TOKENS[:1])[0], atol=1e-11)
        assert torch.allclose(both[1], model(tokens[1:])[0], atol=1e-11)


def test_a_mask_of_another_shape_is_refused():
    model = tiny_model()
    for mask in (torch.ones(2, 4), torch.ones(3, 5), torch.ones(2, 9)):
        with pytest.raises(InputError, match="attention_mask has shape"):
            model(TOKENS, attention_mask=mask.long())
    assert close(model([1, 2], attention_mask=torch.tensor([1, 1])), model([1, 2]), ulps=20)


# partial forwards


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_and_starting_at_a_layer_is_the_whole(kind):
    model = zoo_model(kind)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
        for layer in (0, 1, 2, -1):
            stream = model(TOKENS, stop_at_layer=layer)
            if layer != 2:
                assert close(stream, cache["resid_pre", layer], ulps=20)
            assert close(model(stream, start_at_layer=layer), logits, ulps=20)
        between = model(cache["resid_pre", 0], start_at_layer=0, stop_at_layer=1)
        assert close(between, cache["resid_pre", 1], ulps=20)
        tokens, mask = padded("left")
        stream = model(tokens, attention_mask=mask, stop_at_layer=1)
        rest = model(stream, attention_mask=mask, start_at_layer=1)
        assert close(rest[:, 2:], logits)


def test_layers_out_of_range_are_refused():
    model = tiny_model()
    for layers in ({"stop_at_layer": 3}, {"start_at_layer": -3}, {"start_at_layer": 2, "stop_at_layer": 1}):
        with pytest.raises(InputError, match=r"layers 0 to 1|lies before"):
            model(torch.zeros(1, 2, 8) if "start_at_layer" in layers else TOKENS, **layers)


# logits at one position


@pytest.mark.parametrize("kind", ZOO)
def test_logits_at_positions_equal_those_of_the_full_pass(kind):
    model = zoo_model(kind)
    tokens, mask = padded("right")
    with torch.no_grad():
        full = model(TOKENS)
        for at in (0, 3, -1, -5):
            assert close(model(TOKENS, logits_at=at), full[:, at][:, None])
        each = model(TOKENS, logits_at=torch.tensor([1, -2]))
        assert close(each[:, 0], torch.stack([full[0, 1], full[1, -2]]))
        assert close(model(tokens, attention_mask=mask, logits_at=-1)[:, 0], full[:, 4])
        tokens, mask = padded("left")
        assert close(model(tokens, attention_mask=mask, logits_at=-2)[:, 0], full[:, 3])
        stream = model(TOKENS, stop_at_layer=-1)
        assert close(model(stream, start_at_layer=-1, logits_at=2)[:, 0], full[:, 2])
        through = model(model(TOKENS, stop_at_layer=model.cfg.n_layers), start_at_layer=model.cfg.n_layers, logits_at=2)
        assert close(through[:, 0], full[:, 2])


@pytest.mark.parametrize("kind", ZOO)
def test_with_logits_at_every_listener_sees_all_positions_except_at_the_unembedding(kind):
    model = zoo_model(kind)
    last = f"blocks.{model.cfg.n_layers - 1}"
    with torch.no_grad():
        logits, full = model.run_with_cache(TOKENS, names=model.hook_names())
        for name in [name for name in model.hook_names() if name.startswith((last, "ln_final", "unembed"))]:
            scope, cache = model.capture(name)
            with scope:
                chosen = model(TOKENS, logits_at=3)
            expected = full[name][:, 3:4] if name.startswith("unembed") else full[name]
            assert cache[name].shape == expected.shape, name
            assert close(cache[name], expected), name
            assert close(chosen, logits[:, 3:4])


def test_with_logits_at_the_last_block_works_for_one_query_only():
    model = tiny_model()
    seen = []
    model.blocks[-1].mlp.in_.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model(TOKENS, logits_at=-1)
    model.run_with_cache(TOKENS)
    scope, _ = model.capture(("resid_pre", -1))
    with scope:
        model(TOKENS, logits_at=-1)
    assert seen == [1, 5, 1]
    with pytest.raises(InputError, match=r"logits_at=5 is out of range for 5 tokens"):
        model(TOKENS, logits_at=5)
    with pytest.raises(InputError, match="out of range"):
        model(TOKENS, logits_at=torch.tensor([0, -6]))


# causality and batching


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(CAUSAL), data=st.data())
def test_changing_token_j_changes_nothing_before_j(kind, data):
    model = zoo_model(kind)
    tokens = torch.tensor([data.draw(st.lists(st.integers(0, 10), min_size=3, max_size=7))])
    j = data.draw(st.integers(1, tokens.shape[1] - 1))
    other = tokens.clone()
    other[0, j] = (other[0, j] + data.draw(st.integers(1, 10))) % 11
    names = [name for name in model.hook_names() if "attn_scores" not in name and "pattern" not in name]
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names=names)
        changed, cache_2 = model.run_with_cache(other, names=names)
    assert close(logits[:, :j], changed[:, :j])
    assert all(close(cache[n][:, :j], cache_2[n][:, :j]) for n in names)


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(list(ZOO)), data=st.data())
def test_batched_equals_one_by_one(kind, data):
    model = zoo_model(kind)
    n = data.draw(st.integers(1, 6))
    rows = data.draw(st.lists(st.lists(st.integers(0, 10), min_size=n, max_size=n), min_size=1, max_size=4))
    with torch.no_grad():
        together = model(rows)
        assert close(together, torch.cat([model([row]) for row in rows]))


# transforms


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_parameters_it_is_given_and_leaves_the_models_own(kind):
    model, other = zoo_model(kind), zoo_model(kind)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
        before = {name: p.clone() for name, p in model.named_parameters()}
        got = torch.func.functional_call(model, dict(other.named_parameters()), (TOKENS,))
        assert torch.equal(got, other(TOKENS))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients_under_vmap_equal_a_loop(kind):
    model = zoo_model(kind, dtype=torch.float64)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, row):
        logits = torch.func.functional_call(model, params, (row[None],))
        return F.cross_entropy(logits[0, :-1], row[1:])

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, TOKENS)
    for i, row in enumerate(TOKENS):
        model.zero_grad()
        F.cross_entropy(model(row[None])[0, :-1], row[1:]).backward()
        for name, p in model.named_parameters():
            assert torch.allclose(together[name][i], p.grad, atol=1e-9), name


def test_hooks_and_padding_work_under_vmap_over_parameters():
    model = zoo_model("llama", dtype=torch.float64)
    stacked = {name: torch.stack([p.detach(), p.detach() * 1.1]) for name, p in model.named_parameters()}
    tokens, mask = padded("left")

    def run(params):
        return torch.func.functional_call(model, params, (tokens,), {"attention_mask": mask, "logits_at": -1})

    zero = lambda act, hook: act.mul_(0)  # noqa: E731
    with torch.no_grad(), model.hooks(fwd_hooks=[(("z", 0), zero)]):
        got = torch.func.vmap(run)(stacked)
        assert torch.allclose(got[0], model(TOKENS, logits_at=-1), atol=1e-11)
    assert not torch.allclose(got[0], got[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_hessian_vector_product_inside_differentiable_attention_equals_finite_differences(kind):
    model = zoo_model(kind, dtype=torch.float64, act_fn="gelu_new")
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]

    def gradient(create_graph=False):
        loss = F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten() % model.cfg.d_vocab_out)
        return torch.autograd.grad(loss, params, create_graph=create_graph)

    with differentiable_attention():
        slope = sum((g * d).sum() for g, d in zip(gradient(create_graph=True), direction, strict=True))
        product = torch.autograd.grad(slope, params)
    step, moved = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(params, direction, alpha=sign * step)
        moved.append(gradient())
        with torch.no_grad():
            torch._foreach_add_(params, direction, alpha=-sign * step)
    for got, plus, minus in zip(product, *moved, strict=True):
        assert torch.allclose(got, (plus - minus) / (2 * step), rtol=1e-4, atol=1e-5)


# torch loads its own deprecated scripting for forward mode
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode_works_inside_differentiable_attention_and_its_end_restores_the_fused_kernel():
    model = zoo_model("gpt2", dtype=torch.float64)
    stream = model(TOKENS, stop_at_layer=0).detach()
    run = lambda x: model(x, start_at_layer=0)  # noqa: E731
    with differentiable_attention(), differentiable_attention():
        _, slope = torch.func.jvp(run, (stream,), (torch.ones_like(stream),))
    numeric = (run(stream + 1e-6) - run(stream - 1e-6)) / 2e-6
    assert torch.allclose(slope, numeric, atol=1e-6)  # of central differences, not of rounding
    assert model.blocks[0].attn.fusable(torch.zeros(2, 5, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "post"])
def test_an_unhooked_forward_compiles_whole(kind):
    if hasattr(HookedTransformer.forward, "__wrapped__"):
        pytest.skip("the checks of executed types are not traceable")
    model = zoo_model(kind)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled(TOKENS), model(TOKENS))


# copies, dtypes, devices, seeds


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_state_dict_round_trip(kind):
    model = zoo_model(kind)
    twin = copy.deepcopy(model)
    fresh = HookedTransformer(model.cfg, seed=9)
    fresh.load_state_dict(model.state_dict())
    rebuilt = HookedTransformer(HookedTransformerConfig.from_json(model.cfg.to_json()), seed=3)
    rebuilt.load_state_dict(model.state_dict())
    for other in (twin, fresh, rebuilt):
        assert torch.equal(other(TOKENS), model(TOKENS))
        with torch.no_grad():
            other.W_E.zero_()
        assert not torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", ZOO)
def test_float64_and_bfloat16(kind):
    model = zoo_model(kind)
    exact = copy.deepcopy(model).double()
    rough = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        assert close(exact(TOKENS).float(), model(TOKENS), ulps=1000)
        logits, cache = rough.run_with_cache(TOKENS, names=rough.hook_names())
        assert logits.dtype == torch.bfloat16
        wide = {name for name, act in cache.items() if act.dtype != torch.bfloat16}
        assert wide == {name for name in cache if name.endswith("attn_scores")}  # rounded, they would move the pattern
        assert torch.nn.functional.cosine_similarity(logits.float().flatten(), model(TOKENS).flatten(), dim=0) > 0.98
        assert all(act.dtype == torch.float64 for act in exact.run_with_cache(TOKENS)[1].values())


def test_a_seed_gives_one_model_whatever_the_global_generator_which_it_leaves_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tiny_model(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = tiny_model(seed=5), tiny_model(seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.W_E, other.W_E)


def test_norms_start_as_identities_each_by_its_own_offset():
    model = tiny_model(normalization_type="LN", qk_norm=RMSNormPart(weight_offset=0.5))
    assert (model.blocks[0].ln1.weight == 1).all() and (model.ln_final.weight == 1).all()
    assert (model.blocks[0].attn.q_norm.weight == 0.5).all() and (model.blocks[0].ln1.bias == 0).all()


def test_initial_weights_have_the_asked_standard_deviation():
    made = NormalInit(std=0.1, unembed_std=0.3, residual_scale=True)
    model = tiny_model(n_layers=2, d_model=64, d_vocab=200, init=made)
    assert abs(model.W_E.std().item() - 0.1) < 0.01 and abs(model.W_U.std().item() - 0.3) < 0.01
    assert abs(model.W_O.std().item() - 0.05) < 0.005 and abs(model.W_in.std().item() - 0.1) < 0.01


def test_a_model_on_the_meta_device_has_shapes_and_no_memory():
    cfg = tiny_model().cfg.replace(tie_word_embeddings=True)
    model = HookedTransformer(cfg, device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.zeros(2, 5, dtype=torch.long, device="meta")).shape == (2, 5, 11)
    model.to_empty(device="cpu")
    assert model.unembed.linear.weight is model.embed.weight
    model.load_state_dict(HookedTransformer(cfg).state_dict())
    assert torch.equal(model(TOKENS), HookedTransformer(cfg)(TOKENS))


def test_a_tied_unembedding_stays_tied_when_moved_cast_or_copied():
    model = zoo_model("gpt2_bias_everywhere")
    for other in (model, copy.deepcopy(model), copy.deepcopy(model).double(), model.to("cpu")):
        assert other.unembed.linear.weight is other.embed.weight
        assert sum(p.shape == (11, 8) for p in other.parameters()) == 1


# weights


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_layers_weights_are_true_views(kind):
    model = zoo_model(kind)
    attn, mlp, cfg = model.blocks[1].attn, model.blocks[1].mlp, model.cfg
    shapes = {
        "W_Q": (cfg.n_heads, cfg.d_model, cfg.d_head),
        "W_K": (cfg.n_key_value_heads, cfg.d_model, cfg.d_head),
        "W_V": (cfg.n_key_value_heads, cfg.d_model, cfg.d_head),
        "W_O": (cfg.n_heads, cfg.d_head, cfg.d_model),
        "W_in": (cfg.d_model, cfg.d_mlp),
        "W_out": (cfg.d_mlp, cfg.d_model),
    }
    shapes |= {"W_gate": (cfg.d_model, cfg.d_mlp)} if cfg.gated_mlp else {}
    for name, shape in shapes.items():
        view = getattr(attn if hasattr(attn, name) else mlp, name)
        assert view.shape == shape and view._base is not None
        before = model(TOKENS)
        with torch.no_grad():
            view[0] *= 1.5
        assert not torch.allclose(model(TOKENS), before)


def test_heads_are_computed_as_the_weights_say():
    """q = x W_Q + b_Q a head, result = z W_O, with TransformerLens's shapes."""
    model = zoo_model("gpt2", dtype=torch.float64)
    _, cache = model.run_with_cache(TOKENS, names=["q", "k", "v", "z", "result", "normalized", "attn_out"])
    block = model.blocks[0]
    x = block.ln1.affine(cache["normalized", 0, "ln1"])
    for name in "QKV":
        weight, bias = getattr(block.attn, f"W_{name}"), getattr(block.attn, f"b_{name}")
        assert torch.allclose(torch.einsum("bpm,hmd->bphd", x, weight) + bias, cache[name.lower(), 0], atol=1e-12)
    result = torch.einsum("bphd,hdm->bphm", cache["z", 0], block.attn.W_O)
    assert torch.allclose(result, cache["result", 0], atol=1e-12)
    assert torch.allclose(result.sum(2) + block.attn.b_O, cache["attn_out", 0], atol=1e-12)


def test_QK_and_OV_expand_grouped_heads():
    model = zoo_model("llama")
    attn = model.blocks[1].attn
    for head in range(4):
        assert close(model.QK[1, head].AB, attn.W_Q[head] @ attn.W_K[head // 2].T, ulps=20)
        assert close(model.OV[1, head].AB, attn.W_V[head // 2] @ attn.W_O[head], ulps=20)
    assert model.OV.shape == (2, 4, 8, 8)


def test_weights_that_a_model_lacks_are_refused_in_words():
    with pytest.raises(InputError, match="no W_gate"):
        _ = tiny_model().W_gate
    with pytest.raises(InputError, match="no W_in"):
        _ = zoo_model("attn_only").W_in
    with pytest.raises(InputError, match="no position embedding"):
        _ = zoo_model("llama").W_pos


@pytest.mark.parametrize("kind", ["gpt2", "llama", "attn_only", "linear_attention"])
def test_a_weight_that_a_model_lacks_is_an_absent_attribute(kind):
    """`hasattr(model, "W_pos")` raised on rotary models, and `inspect.getmembers(model)` with it."""
    model = zoo_model(kind)
    assert hasattr(model, "W_pos") == (kind in ("gpt2", "attn_only"))
    assert hasattr(model, "b_Q") == (kind != "llama") and hasattr(model, "W_in") == (kind != "attn_only")
    assert getattr(model, "W_gate", None) is None or kind == "llama"
    assert {"W_Q", "blocks", "cfg"} <= {name for name, _ in inspect.getmembers(model)}
    with pytest.raises(AttributeError, match="has no attribute 'W_nothing'"):
        _ = model.W_nothing


# input


@pytest.mark.parametrize(
    "tokens, error, said",
    [
        ([[1, 11]], InputError, "between 0 and 10 here, got 1 to 11"),
        ([[-1]], InputError, "got -1 to -1"),
        ([], InputError, r"the prompt is empty, its tokens have shape \[0\]"),
        ([[]], InputError, r"the prompt is empty, its tokens have shape \[1, 0\]"),
        (torch.tensor([[]]), InputError, "the prompt is empty"),
        (torch.zeros(1, 0, dtype=torch.long), InputError, "the prompt is empty"),
        (torch.ones(1, 2), WrongType, "tokens are integers"),
        (torch.ones(1, 1, 2, dtype=torch.long), InputError, r"\[1, 1, 2\]"),
        ([[1] * 33], InputError, "33 tokens do not fit this model's n_ctx of 32"),
        ("text", InputError, "no tokenizer"),
    ],
)
def test_tokens_that_cannot_be_read_are_refused(tokens, error, said):
    with pytest.raises(error, match=said):
        tiny_model()(tokens)


def test_an_empty_text_is_named():
    model = tiny_model()
    model.tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match="the prompt '' is empty"):
        model("")
    with pytest.raises(InputError, match=r"the prompt '' \(number 1\) is empty"):
        model(["a", ""])


def test_vectors_of_another_shape_are_refused():
    for bad in (torch.zeros(2, 4), torch.zeros(2, 4, 5)):
        with pytest.raises(InputError, match=r"expected vectors \[batch pos 3\]"):
            vector_model()(bad)
    with pytest.raises(InputError, match=r"expected vectors of torch.float32, as the model's .* torch.float64; pass"):
        vector_model()(torch.zeros(2, 4, 3, dtype=torch.float64))
    with pytest.raises(InputError, match=r"expected vectors \[batch pos 8\]"):
        tiny_model()(torch.zeros(1, 2, 9), start_at_layer=1)


def test_padded_ids_need_their_mask_and_texts_bring_theirs():
    from hooklens.pretrained.tokenizer import tiny_tokenizer

    model = tiny_model(d_vocab=256)
    model.tokenizer = tiny_tokenizer()
    texts = ["abcd", "ef"]
    for side in ("left", "right"):
        tokens, mask = model.to_tokens(texts, padding_side=side, return_mask=True)
        assert torch.equal(tokens, model.to_tokens(texts, padding_side=side)) and mask.sum(1).tolist() == [4, 2]
        short = model(tokens, attention_mask=mask, logits_at=-1)[1]
        assert close(short, model("ef")[0, -1:])
        assert close(short, model(texts, logits_at=-1)[1])

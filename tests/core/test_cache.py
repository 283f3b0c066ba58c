"""The cache: what is kept, how it is asked for and sliced, the stream taken apart, files."""

import sys
from pathlib import Path

import pytest
import torch
from close import close
from refused import refused
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "model"))
from zoo import TOKENS, ZOO, LowRank, Peft, vector_model, wrap_layers, zoo_model

from hooklens.core import cache as cache_module
from hooklens.core.cache import ActivationCache
from hooklens.core.envelope import write_envelope
from hooklens.core.errors import FileRefused, HooklensError, InputError, NameNotFound
from hooklens.core.names import site
from hooklens.model.kv_cache import KVCache
from hooklens.testing import tiny_model

ADDITIVE = [kind for kind in ZOO if ZOO[kind].get("block") != "post"]


@pytest.fixture
def run():
    model = tiny_model()
    return model, *model.run_with_cache(TOKENS)


# asking


def test_short_forms_negative_layers_and_full_names_are_one_entry(run):
    _, _, cache = run
    z = cache["blocks.1.attn.hook_z"]
    for key in (
        ("z", 1),
        ("z", -1),
        site("z", 1),
        site("z", -1),
        ("z", 1, "attn"),
        lambda n: n.endswith("1.attn.hook_z"),
    ):
        assert cache[key] is z and key in cache
    assert cache["embed"] is cache["hook_embed"] and cache["pattern", 0] is cache["attn", 0]
    assert cache["scale", 1, "ln2"] is cache["blocks.1.ln2.hook_scale"]


@pytest.mark.parametrize(
    "key, said",
    [
        ("z", r"'z' matches 2 activations \(blocks\.0\.attn\.hook_z, blocks\.1\.attn\.hook_z"),
        (("zz", 0), "no site named 'zz'"),
        (("z", 2), "layers 0 to 1"),
        (("result", 0), r"\('result', 0\) was not captured; this cache holds 40 activations .* run_with_cache\(names"),
        ("blocks.0.hook_zz", "no hook point named"),
        (("z_grad", 0), "was not captured"),
    ],
)
def test_what_is_not_there_is_refused_with_what_would_work(run, key, said):
    with pytest.raises(NameNotFound, match=said):
        run[2][key]
    assert key not in run[2]


def test_in_answers_rather_than_raises(run):
    assert 5 not in run[2] and None not in run[2] and (lambda name: False) not in run[2]


def test_negative_layers_count_in_the_model_not_in_what_was_kept():
    model = tiny_model()
    logits, cache = model.run_with_cache(TOKENS, names=("z", 0), grads=True)
    logits.sum().backward()
    assert ("z", 0) in cache and ("z_grad", 0) in cache
    assert ("z", -1) not in cache and ("z_grad", -1) not in cache
    assert cache["z_grad", -2] is cache["blocks.0.attn.hook_z_grad"]


# keeping


@pytest.mark.parametrize("kind", ["gpt2", "llama", "post", "gemma2", "neox"])
def test_no_entry_is_stored_twice_also_after_save_and_load(kind, tmp_path):
    model = zoo_model(kind)
    names = model.hook_names()
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names=names)
    storages = {act.untyped_storage().data_ptr(): act.untyped_storage().nbytes() for act in cache.values()}
    assert cache.nbytes == sum(storages.values())
    if kind != "post":
        assert cache["resid_post", 0].data_ptr() == cache["resid_pre", 1].data_ptr()
    # A head's copies of the stream, an embedding that enters alone: views, not copies.
    assert cache["q_input", 0].data_ptr() == cache["resid_pre", 0].data_ptr()
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    loaded = ActivationCache.load(path, model)
    assert loaded["resid_post", 0].data_ptr() == loaded["resid_pre", 1].data_ptr() or kind == "post"
    assert list(loaded) == list(cache)
    assert all(torch.equal(loaded[name], cache[name]) and loaded[name].dtype == cache[name].dtype for name in cache)
    assert torch.equal(loaded["z", -1], cache["z", -1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_entries_are_cast_on_capture_each_once(dtype):
    model = tiny_model()
    _, plain = model.run_with_cache(TOKENS)
    _, cast = model.run_with_cache(TOKENS, dtype=dtype)
    assert all(act.dtype == dtype and torch.equal(act, plain[name].to(dtype)) for name, act in cast.items())
    assert cast["resid_post", 0] is cast["resid_pre", 1]
    assert cast.nbytes == plain.nbytes * torch.finfo(dtype).bits // 32  # positions, shared by all rows, too
    after = plain.to(dtype=dtype)
    assert after["resid_post", 0] is after["resid_pre", 1] and after["embed"].dtype == dtype
    assert plain["embed"].dtype == torch.float32 and after.nbytes == cast.nbytes


def test_entries_move_to_a_device_on_capture_and_later():
    model = tiny_model()
    logits, cache = model.run_with_cache(TOKENS, device="meta")
    assert all(act.is_meta for act in cache.values()) and not logits.is_meta
    assert all(act.is_meta for act in model.run_with_cache(TOKENS)[1].to("meta").values())


def test_only_what_is_asked_for_is_kept_and_it_is_detached():
    model = tiny_model()
    logits, cache = model.run_with_cache(TOKENS, names=["pattern", ("resid_post", -1)])
    assert list(cache) == ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern", "blocks.1.hook_resid_post"]
    assert logits.requires_grad and not any(act.requires_grad for act in cache.values())
    assert repr(cache).startswith("ActivationCache(3 activations, 0.0 MiB)")
    first, second = model.run_with_cache(TOKENS)[1], model.run_with_cache(TOKENS.flip(0))[1]
    kept = {name: act.clone() for name, act in first.items()}
    del second
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_a_second_pass_inside_the_scope_overwrites_the_first():
    model = tiny_model()
    scope, cache = model.capture("z")
    with scope:
        model(TOKENS)
        model(TOKENS[:1])
    assert cache["z", 0].shape[0] == 1


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma2", "neox", "post")]


@pytest.mark.parametrize("kind", ["gpt2", "llama", *SLOW])
def test_cached_gradients_equal_finite_differences(kind):
    model = zoo_model(kind, dtype=torch.float64)
    # Points whose gradient is asked for are paths of their own, so a head's inputs and the shared norm are asked apart.
    own = [name for name in model.hook_names() if name.endswith(("_input", "attn_in"))]
    for names in (own, [name for name in model.hook_names() if name not in own]):
        check_gradients(model, names)


def check_gradients(model, names):
    logits, cache = model.run_with_cache(TOKENS, names=names, grads=True)
    loss = lambda logits: logits.sin().sum()  # noqa: E731
    loss(logits).backward()
    generator = torch.Generator().manual_seed(4)
    for name in names:
        gradient = cache[name + "_grad"]
        assert gradient.shape == cache[name].shape and not gradient.requires_grad and cache[name].requires_grad
        if ".1." not in name and "blocks" in name:
            continue  # one layer is enough to differentiate by hand
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        direction = torch.where(cache[name].isinf(), 0, direction)
        moved = []
        for step in (1e-6, -1e-6):
            add = lambda act, hook, step=step: act + step * direction  # noqa: E731, B023
            with torch.no_grad():
                moved.append(loss(model.run_with_hooks(TOKENS, fwd_hooks=[(name, add)])))
        numeric = (moved[0] - moved[1]) / 2e-6
        assert torch.allclose(numeric, (gradient * direction).sum(), rtol=1e-5, atol=1e-6), name


# slicing


def test_slices_by_batch_position_and_layer(run):
    _, _, cache = run
    assert cache.slice(batch=1)["z", 0].shape == (5, 2, 4)
    assert cache.slice(batch=slice(0, 1))["z", 0].shape == (1, 5, 2, 4)
    assert torch.equal(cache.slice(batch=[1, 0])["z", 0], cache["z", 0].flip(0))
    last = cache.slice(pos=-1)
    assert torch.equal(last["resid_post", 1], cache["resid_post", 1][:, -1])
    assert torch.equal(last["pattern", 1], cache["pattern", 1][:, :, -1])
    both = cache.slice(batch=0, pos=[1, 3])
    assert torch.equal(both["pattern", 0], cache["pattern", 0][0][:, [1, 3]])
    one = cache.slice(layers=-1)
    assert ("z", 1) in one and ("z", 0) not in one and "embed" in one
    assert len(cache) == 40 and cache["z", 0].shape == (2, 5, 2, 4)
    first = cache.slice(layers=slice(0, 1))
    assert list(first) == list(cache.slice(layers=torch.tensor([0]))) and ("z", 1) not in first and ("z", 0) in first
    with pytest.raises(InputError, match=r"layers \[0, 2\] asked for; this cache has layers 0 to 1"):
        cache.slice(layers=[0, 2])
    with pytest.raises(InputError, match="already sliced"):
        last.slice(pos=0)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"pos": 99}, r"pos 99 asked for; hook_embed has pos 0 to 4 \(or -5 to -1\)"),
        ({"pos": [0, -6]}, r"pos \[0, -6\] asked for"),
        ({"pos": torch.tensor([True, False])}, "asked for; hook_embed has pos 0 to 4"),
        ({"pos": 1.5}, "pos 1.5 asked for"),
        ({"pos": "end"}, "pos 'end' asked for"),
        ({"batch": 9}, "batch 9 asked for; hook_embed has batch 0 to 1"),
        ({"batch": torch.tensor([2])}, "batch tensor"),
        ({"layers": 2}, "layers 2 asked for; this cache has layers 0 to 1"),
    ],
)
def test_a_slice_out_of_range_says_what_there_is(run, asked, said):
    with refused(InputError, said):
        run[2].slice(**asked)


def test_an_empty_slice_and_a_mask_are_slices(run):
    assert run[2].slice(pos=[])["z", 0].shape == (2, 0, 2, 4)
    mask = torch.tensor([True, False, False, True, False])
    assert torch.equal(run[2].slice(pos=mask)["z", 0], run[2]["z", 0][:, [0, 3]])


def test_taking_apart_out_of_range_says_what_there_is(run):
    _, _, cache = run
    stack = cache.decompose_resid(pos=-1)[0]
    for ask, said in (
        (lambda: cache.decompose_resid(pos=99), "pos 99 asked for; hook_embed has pos 0 to 4"),
        (lambda: cache.stack_neuron_results(neurons=99), "neurons 99 asked for; the MLP of layer 0 has neurons 0 to"),
        (lambda: cache.logit_attrs(stack, 99, pos=-1), "token ids lie between 0 and 10 here, got 99"),
        (lambda: cache.logit_attrs(stack, -1, pos=-1), "token ids lie between 0 and 10 here, got -1"),
        (lambda: cache.logit_attrs(stack, [1, 2, 3], pos=-1), r"tokens \[3\] do not fit a stack \[6, 2, 8\]"),
        (lambda: cache.logit_attrs(cache.decompose_resid()[0], [1, 2, 3]), r"tokens \[3, 1\] do not fit a stack"),
    ):
        with pytest.raises(InputError, match=said):
            ask()
    row = cache.slice(batch=0, pos=-1)
    with pytest.raises(InputError, match="do not fit a stack"):  # six tokens, six components: no sum over a mixture
        row.logit_attrs(row.decompose_resid()[0], [1, 2, 3, 4, 5, 6])


def test_stacks_a_site_over_layers(run):
    _, _, cache = run
    assert torch.equal(cache.stack("resid_post")[1], cache["resid_post", 1])
    with pytest.raises(InputError, match="several sites"):
        cache.stack("scale")


def test_a_cache_sliced_by_batch_row_is_taken_apart_like_a_whole_one():
    model = zoo_model("gemma2", dtype=torch.float64)
    _, cache = model.run_with_cache(TOKENS)
    row = cache.slice(batch=1)
    for method in ("accumulated_resid", "decompose_resid", "stack_head_results", "stack_neuron_results"):
        whole, labels = getattr(cache, method)()
        part, same = getattr(row, method)()
        assert torch.allclose(part, whole[:, 1], atol=1e-12) and labels == same


# the residual stream


@pytest.mark.parametrize("kind", ADDITIVE)
def test_decompositions_sum_to_the_stream(kind):
    model = zoo_model(kind, dtype=torch.float64)
    n, heads, neurons = model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_mlp
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    for layer, end, pos in (
        (None, n, None),
        (0, 0, -1),
        (n - 1, n - 1, slice(1, 4)),
        (-1, n, None),  # as in TransformerLens 3.9.0
        (n, n, [0, 2]),
    ):
        stream = cache["resid_post", -1] if end == n else cache["resid_pre", end]
        stream = stream if pos is None else stream[:, pos]
        stacks = [cache.decompose_resid(layer, pos=pos), cache.stack_head_results(layer, incl_remainder=True, pos=pos)]
        assert len(stacks[1][1]) == end * heads + 1
        if neurons:
            stacks.append(cache.stack_neuron_results(layer, incl_remainder=True, pos=pos))
            assert len(stacks[2][1]) == end * neurons + 1
        for parts, labels in stacks:
            assert torch.allclose(parts.sum(0), stream, atol=1e-10) and len(labels) == len(parts)


def test_layer_minus_one_left_out_the_last_layer():
    """In TransformerLens 3.9.0 it means all layers; it was "before the last", silently."""
    model = tiny_model(n_layers=3, dtype=torch.float64)
    _, cache = model.run_with_cache(TOKENS)
    for name in ("accumulated_resid", "decompose_resid", "stack_head_results", "stack_neuron_results"):
        whole, labels = getattr(cache, name)(apply_ln=True)
        for layer in (-1, 3):
            part, same = getattr(cache, name)(layer, apply_ln=True)
            assert same == labels and torch.equal(part, whole), name
        with refused(InputError, r"layer -2 asked for; .* None, -1 or 3. Count other layers from 0"):
            getattr(cache, name)(-2)
    assert "L2H1" in cache.stack_head_results(-1)[1]
    stack = cache.decompose_resid()[0]
    assert torch.equal(cache.apply_ln_to_stack(stack, -1), cache.apply_ln_to_stack(stack))
    with refused(InputError, "layer 4 asked for"):
        cache.apply_ln_to_stack(stack, 4)


@pytest.mark.parametrize("kind", ADDITIVE)
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logit_attributions_sum_to_the_uncapped_logit_minus_both_biases(kind, dtype, atol):
    model = zoo_model(kind, dtype=dtype)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    answer, wrong = torch.tensor([1, 3]), torch.tensor([0, 4])
    raw, column = cache["unembed.hook_out"], model.W_U
    norm_bias = getattr(model.ln_final, "bias", None)
    parts = cache.decompose_resid()[0], cache.stack_head_results(incl_remainder=True)[0]
    for stack in parts:
        for tokens in (3, answer):
            expected = raw[torch.arange(2), :, torch.as_tensor(tokens).expand(2)]
            for bias in (model.b_U, None if norm_bias is None else norm_bias @ column):
                expected = expected if bias is None else expected - bias[tokens].reshape(-1, 1)
            got = cache.logit_attrs(stack, tokens).sum(0)
            assert torch.allclose(got, expected, atol=atol * raw.abs().max().item()) and not got.requires_grad
    last = cache.decompose_resid(pos=-1)[0]
    difference = cache.logit_attrs(last, answer, wrong, pos=-1).sum(0)
    rows = torch.arange(2)
    expected = raw[rows, -1, answer] - raw[rows, -1, wrong]
    for bias in (model.b_U, None if norm_bias is None else norm_bias @ column):
        expected = expected if bias is None else expected - (bias[answer] - bias[wrong])
    assert torch.allclose(difference, expected, atol=atol * raw.abs().max().item())


@pytest.mark.parametrize("n_prompts", [1, 2])
def test_pos_forgotten_after_a_stack_at_one_position_raises(n_prompts):
    """One prompt used to broadcast, to numbers that were wrong; two raised torch's own error."""
    _, cache = tiny_model().run_with_cache(TOKENS[:n_prompts])
    stack = cache.decompose_resid(pos=-1)[0]
    for forgotten in (lambda: cache.logit_attrs(stack, 3), lambda: cache.apply_ln_to_stack(stack, 1)):
        with pytest.raises(InputError, match="give pos= here as it was given to the stack"):
            forgotten()
    assert cache.logit_attrs(stack, 3, pos=-1).shape == (6, n_prompts)


def biases(part):
    """What a linear layer, wrapped or not, writes for nothing."""
    return part(torch.zeros(part.base.weight.shape[1], dtype=torch.float64)).detach()


@pytest.mark.parametrize("kind", [LowRank, Peft])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_heads_of_a_wrapped_output_layer_are_what_it_writes(name, kind):
    """From z they were those of the weight inside the wrapper."""
    model = wrap_layers(zoo_model(name, dtype=torch.float64), "attn.o", kind)
    _, from_z = model.run_with_cache(TOKENS)
    _, with_result = model.run_with_cache(TOKENS, names=lambda name: True)
    assert ("result", 0) not in from_z and ("result", 0) in with_result
    assert torch.allclose(from_z.stack_head_results()[0], with_result.stack_head_results()[0], atol=1e-12)
    sliced = from_z.slice(batch=0, pos=-1).stack_head_results()[0]
    assert torch.allclose(sliced, from_z.stack_head_results()[0][:, 0, -1], atol=1e-12)
    if name == "gpt2":
        written = from_z.stack_head_results(1)[0].sum(0) + biases(model.blocks[0].attn.o)
        assert torch.allclose(written, from_z["attn_out", 0], atol=1e-12)


@pytest.mark.parametrize("kind", [LowRank, Peft])
def test_neurons_of_a_wrapped_output_layer_are_what_it_writes(kind):
    model = wrap_layers(zoo_model("gpt2", dtype=torch.float64), "mlp.out", kind)
    _, cache = model.run_with_cache(TOKENS)
    written = cache.stack_neuron_results(1)[0].sum(0) + biases(model.blocks[0].mlp.out)
    assert torch.allclose(written, cache["mlp_out", 0], atol=1e-12)


@pytest.mark.parametrize("kind", [LowRank, Peft])
def test_logit_attributions_go_through_a_wrapped_unembedding(kind):
    model = wrap_layers(zoo_model("gpt2", dtype=torch.float64), "unembed", kind)
    _, cache = model.run_with_cache(TOKENS)
    attributed = cache.logit_attrs(cache.decompose_resid()[0], 3).sum(0)
    expected = cache["unembed.hook_out"] - model.unembed.linear(model.ln_final.bias)
    assert torch.allclose(attributed, expected[..., 3], atol=1e-12)


def test_a_wrapped_layer_that_is_not_linear_is_refused():
    model = tiny_model()
    _, cache = model.run_with_cache(TOKENS)
    stack = cache.decompose_resid()[0]
    handle = model.unembed.linear.register_forward_hook(lambda part, args, out: out.relu())
    with pytest.raises(InputError, match=r"matrix of a Linear, which is not a linear map.*remove torch hooks"):
        cache.logit_attrs(stack, 3)
    handle.remove()
    for block in model.blocks:
        block.mlp.out = torch.nn.Sequential(torch.nn.Dropout(0.5), block.mlp.out)
    with pytest.raises(InputError, match=r"model.eval\(\)"):
        cache.stack_neuron_results()
    model.eval()
    written = cache.stack_neuron_results(1)[0].sum(0) + model.blocks[0].mlp.out[1].bias
    assert close(written, cache["mlp_out", 0])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_the_norm_of_a_full_decomposition_is_the_norms_output_without_its_bias(kind):
    model = zoo_model(kind, dtype=torch.float64)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        block = model.blocks[1]
        for stack, mlp_input, norm, read in (
            (cache.decompose_resid(1)[0], False, block.ln1, cache["resid_pre", 1]),
            (
                torch.cat((cache.decompose_resid(1)[0], cache["attn_out", 1][None])),
                True,
                block.ln2,
                cache["resid_mid", 1],
            ),
            (cache.decompose_resid()[0], False, model.ln_final, cache["resid_post", 1]),
        ):
            layer = None if norm is model.ln_final else 1
            got = cache.apply_ln_to_stack(stack, layer, mlp_input=mlp_input).sum(0)
            bias = 0 if getattr(norm, "bias", None) is None else norm.bias
            assert torch.allclose(got + bias, norm(read), atol=1e-10)


def test_accumulated_resid_with_the_final_norm_is_the_logit_lens():
    model = zoo_model("gpt2", dtype=torch.float64)
    _, cache = model.run_with_cache(TOKENS)
    stack, labels = cache.accumulated_resid(incl_mid=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    assert torch.equal(stack[1], cache["resid_mid", 0]) and torch.equal(stack[-1], cache["resid_post", 1])
    assert cache.accumulated_resid(1)[1] == ["0_pre", "1_pre"]
    normed, _ = cache.accumulated_resid(apply_ln=True)
    bias = model.ln_final.bias
    assert torch.allclose(model.unembed(normed[-1] + bias), model(TOKENS), atol=1e-10)


def test_post_norm_streams_are_accumulated_through_their_own_norms_and_never_summed():
    model = zoo_model("post", dtype=torch.float64)
    _, cache = model.run_with_cache(TOKENS)
    normed, _ = cache.accumulated_resid(apply_ln=True)
    assert torch.allclose(model.unembed(normed[-1] + model.blocks[1].ln2.bias), model(TOKENS), atol=1e-10)
    mid = cache.apply_ln_to_stack(cache["resid_mid", 1][None], 1, mlp_input=True)[0] + model.blocks[1].ln1.bias
    assert torch.allclose(mid, model.blocks[1].ln1(cache["resid_mid", 1]), atol=1e-10)
    for method in ("decompose_resid", "stack_head_results", "stack_neuron_results"):
        with pytest.raises(InputError, match="accumulated_resid works there"):
            getattr(cache, method)()
    with pytest.raises(InputError, match="no norm of this model reads the stream at layer 0"):
        cache.accumulated_resid(0, apply_ln=True)


def test_components_are_labelled_and_narrowed(run):
    model, _, cache = run
    assert cache.decompose_resid(1)[1] == ["embed", "pos_embed", "0_attn_out", "0_mlp_out"]
    assert cache.decompose_resid(mode="attn", incl_embeds=False)[1] == ["0_attn_out", "1_attn_out"]
    assert cache.decompose_resid(mode="mlp", incl_embeds=False)[1] == ["0_mlp_out", "1_mlp_out"]
    assert cache.stack_head_results(1)[1] == ["L0H0", "L0H1"]
    for neurons, labels in (
        (3, ["L0N3"]),
        ([3, 5], ["L0N3", "L0N5"]),
        (slice(0, 2), ["L0N0", "L0N1"]),
        ([-1], ["L0N31"]),
    ):
        stack, got = cache.stack_neuron_results(1, neurons=neurons)
        assert got == labels
        n = int(labels[0][3:])
        assert close(stack[0], cache["post", 0][..., n, None] * model.blocks[0].mlp.W_out[n], ulps=20)
    with pytest.raises(InputError, match="'all', 'attn' or 'mlp'"):
        cache.decompose_resid(mode="heads")
    with pytest.raises(InputError, match="no component of this kind below"):
        cache.stack_head_results(0)
    with pytest.raises(InputError, match="layer 3 asked for"):
        cache.decompose_resid(3)


def test_head_results_come_from_the_cached_result_where_there_is_one():
    model = tiny_model()
    scope, cache = model.capture(["result", "z", "resid_post"])
    with scope, model.hooks(fwd_hooks=[("result", lambda act, hook: act * 2)]):
        model(TOKENS)
    assert torch.equal(cache.stack_head_results()[0][0], cache["result", 0][:, :, 0])


def test_a_decomposition_of_one_step_of_a_generation_sums_to_that_step():
    model, past = zoo_model("gpt2", dtype=torch.float64), KVCache()
    model(TOKENS[:, :4], kv_cache=past)
    _, cache = model.run_with_cache(TOKENS[:, 4:], kv_cache=past)
    assert torch.allclose(cache.decompose_resid()[0].sum(0), cache["resid_post", -1], atol=1e-10)


def test_a_model_of_vectors_is_taken_apart_too():
    model = vector_model(dtype=torch.float64)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, cache = model.run_with_cache(x)
    attributed = cache.logit_attrs(cache.decompose_resid()[0], 0).sum(0)
    assert torch.allclose(attributed, cache["out"][..., 0], atol=1e-10)


# files


def test_a_damaged_or_foreign_file_is_refused(run, tmp_path):
    _, _, cache = run
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileRefused, match=r"cannot read an activation cache from"):
            ActivationCache.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(FileRefused, match=r"cannot read an activation cache from .* it is another file"):
        ActivationCache.load(path)
    for entries in ("{", ["a"], {"hook_embed": "b"}, {"hook_embed": ["a"]}):
        write_envelope(path, cache_module._SCHEMA, entries, {"a": torch.ones(1)})
        with pytest.raises(FileRefused, match="damaged"):
            ActivationCache.load(path)
    with pytest.raises(InputError, match="there is no such file"):
        ActivationCache.load(tmp_path / "none")


def test_a_saved_cache_holds_each_tensor_once_and_works_without_its_model(run, tmp_path):
    _, _, cache = run
    cache.save(tmp_path / "c")
    stored = load_file(tmp_path / "c")
    assert len(stored) == len(cache) - 1  # resid_post 0 is resid_pre 1
    loaded = ActivationCache.load(tmp_path / "c")
    assert torch.equal(loaded["z", -1], cache["z", -1]) and torch.equal(
        loaded.slice(pos=0)["z", 0], cache["z", 0][:, 0]
    )
    with pytest.raises(InputError, match=r"load\(path, model\)"):
        loaded.logit_attrs(cache["resid_post", 1][None], 1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"dtype": "float16"}, "dtype is a floating-point"),
        ({"dtype": torch.complex64}, "dtype is a floating-point"),
        ({"dtype": torch.int8}, "dtype is a floating-point"),
        ({"device": "banana"}, "device='banana' cannot be used here"),
    ],
)
def test_a_device_or_dtype_that_cannot_hold_a_cache_ended_in_torchs_own_error(asked, said):
    with refused(HooklensError, said):
        tiny_model().run_with_cache([[1, 2]], **asked)

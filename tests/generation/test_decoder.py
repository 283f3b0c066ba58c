"""The decoder of a generation: the numbers of the model's forward, for as long as nobody looks or edits."""

import pytest
import torch
from model.zoo import ZOO, zoo_model
from packing import needs_packing
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from hooklens.core.errors import InputError
from hooklens.generation import decoder
from hooklens.generation.continuation import Continuation
from hooklens.generation.decoder import Decoder
from hooklens.model import linear
from hooklens.model.attention import Attention
from hooklens.model.block import Block
from hooklens.model.kv_cache import KVCache
from hooklens.model.linear import packed_linears, packing_works
from hooklens.model.mlp import MLP, GatedMLP
from hooklens.model.norms import RMSNorm
from hooklens.testing import tiny_model


@pytest.fixture(params=[pytest.param("packed", marks=needs_packing), "plain"], autouse=True)
def weights(request, monkeypatch):
    """Both kinds of product are tested on every machine, whichever is the faster one there."""
    packed = request.param == "packed"
    monkeypatch.setattr(linear, "packing_pays", lambda rows: packed)
    return request.param


@pytest.fixture
def packs(monkeypatch):
    """How many weights a decoder packed."""
    count, plain = [], decoder.pack
    monkeypatch.setattr(decoder, "pack", lambda *args: count.append(1) or plain(*args))
    return count


@pytest.fixture
def counted(monkeypatch):
    """How many steps went through a decoder."""
    steps, plain = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, *args: steps.append(1) or plain(self, *args))
    return steps


def close(got, expected, ulps=1000):
    """Equal within a thousand roundings of the largest logit: the products are summed in another order."""
    bound = ulps * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(got, expected, atol=bound, rtol=0)


def kinds(served):
    models = {kind: zoo_model(kind) for kind in ZOO}
    return [kind for kind, model in models.items() if model.cfg.causal and (model.cfg.block.name != "post") == served]


@pytest.mark.parametrize("kind", kinds(served=True))
@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_the_whole_pass(kind, padded):
    model = zoo_model(kind)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [4, 1, 2, 0, 3, 5]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :2] = not padded
    with torch.no_grad():
        step, past = Decoder.of(model, rows=2), KVCache()
        model(tokens[:, :3], attention_mask=mask[:, :3] if padded else None, kv_cache=past)
        for at in range(3, 6):
            expected = model(tokens[:, : at + 1], attention_mask=mask[:, : at + 1] if padded else None)[:, -1]
            close(step(tokens[:, at : at + 1], past), expected)
    assert past.length == 6 and past.step == 4


def test_what_it_does_not_know_it_leaves_to_the_model():
    assert all(Decoder.of(zoo_model(kind), rows=1) is None for kind in kinds(served=False))
    mixed = tiny_model()
    mixed.blocks[0].attn.o.double()
    assert Decoder.of(mixed, rows=1) is None
    swapped, own = tiny_model(), tiny_model()
    swapped.blocks[0].attn.o = torch.nn.Sequential(swapped.blocks[0].attn.o)
    own.__class__ = type("Own", (type(own),), {})
    assert Decoder.of(swapped, rows=1) is None and Decoder.of(own, rows=1) is None
    assert Decoder.of(tiny_model(), rows=1) is not None


PARTS = ["", "embed", "blocks.0", "blocks.1.attn.k", "blocks.0.mlp", "ln_final", "unembed", "unembed.linear"]


@pytest.mark.parametrize("weights", ["plain"], indirect=True)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_torch_hooks_and_replaced_forwards_count(part, how, counted):
    def changed():
        model = zoo_model("llama")
        module = model.get_submodule(part)
        if how == "hook":
            module.register_forward_hook(lambda m, args, out: out * -1)
        elif how == "pre-hook":
            module.register_forward_pre_hook(lambda m, args: args)
        else:
            plain = module.forward
            module.forward = lambda *args, **kwargs: plain(*args, **kwargs) * -1
        return model

    expected = changed().generate([1, 2, 3], 5, stop=(), capture={0: "resid_post"}).new_tokens[0]
    assert torch.equal(changed().generate([1, 2, 3], 5, stop=()).new_tokens[0], expected) and not counted


@pytest.mark.parametrize("weights", ["plain"], indirect=True)
@pytest.mark.parametrize(
    ("cls", "name"),
    [(MLP, "forward"), (GatedMLP, "neurons"), (Attention, "mix"), (Block, "finish"), (RMSNorm, "forward")],
    ids=lambda one: getattr(one, "__name__", one),
)
@pytest.mark.parametrize("whole_class", [True, False])
def test_a_method_replaced_in_a_class_or_a_part_was_skipped_in_generation(cls, name, whole_class, counted, monkeypatch):
    model, plain = zoo_model("llama"), getattr(cls, name)
    parts = [model.get_submodule(part) for part in ("blocks.1", "blocks.1.attn", "blocks.1.mlp", "blocks.1.ln1")]
    part = next(part for part in parts if isinstance(part, cls))
    assert Decoder.of(model, rows=1) is not None
    if whole_class:
        monkeypatch.setattr(cls, name, lambda self, *args: plain(self, *args) * -1)
    else:
        monkeypatch.setattr(part, name, lambda *args: plain(part, *args) * -1)
    expected = model.generate([1, 2, 3], 5, stop=(), capture={0: "resid_post"}).new_tokens[0]
    assert torch.equal(model.generate([1, 2, 3], 5, stop=()).new_tokens[0], expected) and not counted


def test_an_edited_activation_function_is_that_of_the_steps_too(counted):
    model = zoo_model("llama")
    model.generate([1, 2, 3], 5, stop=())
    steps = len(counted)
    model.blocks[1].mlp.act = "tanh"
    expected = model.generate([1, 2, 3], 5, stop=(), capture={0: "resid_post"}).new_tokens[0]
    assert torch.equal(model.generate([1, 2, 3], 5, stop=()).new_tokens[0], expected) and len(counted) == 2 * steps


@pytest.mark.parametrize(("dtype", "ulps"), [(torch.float64, 1000), (torch.bfloat16, 10)])
def test_other_dtypes_take_the_same_steps_on_plain_weights(dtype, ulps, packs):
    model, past = zoo_model("llama").to(dtype), KVCache()
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        model(tokens[:, :3], kv_cache=past)
        close(Decoder.of(model, rows=1)(tokens[:, 3:], past), model(tokens)[:, -1], ulps=ulps)
    assert not packs


def test_where_packing_does_not_pay_a_generation_still_takes_the_short_way(counted, packs, weights):
    zoo_model("llama").generate([1, 2, 3], 26, stop=())
    assert len(counted) == 25 and bool(packs) == (weights == "packed")


def test_a_short_generation_takes_the_short_way_on_plain_weights(counted, packs):
    model = zoo_model("llama")
    expected = model.generate([1, 2, 3], 12, stop=(), capture={0: "resid_post"}).new_tokens[0]
    assert not counted
    assert torch.equal(model.generate([1, 2, 3], 12, stop=()).new_tokens[0], expected)
    assert len(counted) == 11 and not packs


class Counted(TorchDispatchMode):
    """How many operators ran: views, products and all."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_a_layer_of_a_step_takes_few_calls(weights):
    def calls(n_layers):
        model, past = zoo_model("llama", n_layers=n_layers), KVCache()
        with torch.no_grad():
            step = Decoder.of(model, rows=1)
            for tokens in torch.tensor([[1, 2]]), torch.tensor([[3]]), torch.tensor([[4]]):
                with Counted() as ops:
                    _ = step(tokens, past) if past.length else model(tokens, kv_cache=past)
        return ops.n

    # 7 products (or 4 and their outputs), 2 norms of 3 or 5, 3 to turn, 1 copy into the cache, attention, the MLP
    assert calls(3) - calls(2) <= (21 if weights == "plain" else 29)
    assert calls(2) <= (60 if weights == "plain" else 76)


@pytest.mark.parametrize("weights", ["plain"], indirect=True)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("grad", [True, False])
def test_steps_take_turns_with_passes_through_the_same_cache(kind, grad):
    model = zoo_model(kind)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 1, 2, 0, 3, 5, 2, 2, 1]])
    step, past, plain = Decoder.of(model, rows=2), KVCache(), KVCache()
    for start, end, by_step in [(0, 2, 0), (2, 3, 1), (3, 5, 0), (5, 6, 1), (6, 7, 1), (7, 8, 0), (8, 9, 1)]:
        new = tokens[:, start:end]
        with torch.inference_mode() if by_step else torch.set_grad_enabled(grad):
            got = step(new, past) if by_step else model(new, kv_cache=past)[:, -1]
        with torch.no_grad():
            close(got.detach(), model(new, kv_cache=plain)[:, -1])
        for kept, expected in zip(past.of_layer(1), plain.of_layer(1), strict=True):
            close(kept.detach(), expected)
    assert past.length == plain.length == 9 and past.step == plain.step


def test_a_step_goes_on_from_kept_rows_and_from_a_part_of_a_cache():
    model, past = zoo_model("llama"), KVCache()
    tokens = torch.tensor([[1, 2, 3, 4, 5], [4, 1, 2, 0, 3], [2, 2, 1, 5, 6]])
    with torch.no_grad():
        whole, step = model(tokens), Decoder.of(model, rows=3)
        model(tokens[:, :2], kv_cache=past)
        close(step(tokens[:, 2:3], past), whole[:, 2])
        part, kept = past.before(2), torch.tensor([2, 0])
        past.keep_rows(kept)
        close(step(tokens[kept, 3:4], past), whole[kept, 3])
        close(step(tokens[:, 2:3], part), whole[:, 2])
        close(step(tokens[kept, 4:], past), whole[kept, 4])
        with pytest.raises(InputError, match="has 2 rows, got 3"):
            step(tokens[:, 4:], past)
        model(tokens[:, :2], kv_cache=(below := KVCache()), stop_at_layer=1)
        with pytest.raises(InputError, match="no layer 1"):
            step(tokens[:, 2:3], below)


def test_steps_past_the_tables_that_were_computed_ahead_are_turned_as_far(monkeypatch):
    monkeypatch.setattr(decoder, "TURNS_AHEAD", 3)
    model, past, tokens = zoo_model("llama"), KVCache(), torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2]])
    with torch.no_grad():
        whole, step = model(tokens), Decoder.of(model, rows=1)
        model(tokens[:, :2], kv_cache=past)
        for at in range(2, 8):
            close(step(tokens[:, at : at + 1], past), whole[:, at])
        close(step(tokens[:, 2:3], past.before(2)), whole[:, 2])


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_where_blas_is_slower_with_vectors_a_row_is_multiplied_as_a_row(gain, weights, monkeypatch):
    monkeypatch.setattr(decoder, "vector_pays", lambda weights: gain > 1)
    model, past = zoo_model("llama"), KVCache()
    with torch.no_grad():
        step = Decoder.of(model, rows=1)
        model(torch.tensor([[1, 2]]), kv_cache=past)
        close(step(torch.tensor([[3]]), past), model(torch.tensor([[1, 2, 3]]))[:, -1])
    assert step.vector == (weights == "plain")
    if step.vector:
        product = torch.mv if gain > 1 else decoder._of_row
        assert {of.func for of in (*step.unembed.products, *step.layers[0].qkv.products)} == {product}


def test_a_model_that_drops_entries_is_not_stepped_through(counted):
    model = zoo_model("llama", dropout=0.5).eval()
    model.generate([1, 2, 3], 5, stop=())
    assert len(counted) == 4
    model.train().generate([1, 2, 3], 5, stop=())
    assert len(counted) == 4


def test_packing_switched_off_around_a_generation_is_off_in_it(packs):
    with packed_linears(enabled=False):
        zoo_model("llama").generate([1, 2, 3], 26, stop=())
    assert not packs
    if packing_works():
        with packed_linears(enabled=True):
            zoo_model("llama").generate([1, 2, 3], 26, stop=())
        assert packs


def test_a_generation_uses_it_and_finds_the_same_tokens(counted):
    model = zoo_model("llama")
    prompts, n = [[1, 2, 3], [4], [5, 6]], 30
    with torch.no_grad():
        expected = [model.generate(p, n, stop=(), capture={0: "resid_post"}).new_tokens[0] for p in prompts]
        assert not counted  # somebody listens
        got = model.generate(prompts, n, stop=()).new_tokens
    assert len(counted) == n - 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("edit", ["weight", "replaced", "hook", "torch hook", "bias", "no norm", "MLP", "global hook"])
def test_an_edit_in_the_middle_counts_from_its_step_on(edit, counted, monkeypatch):
    def change(model):
        with torch.no_grad():
            if edit == "weight":
                model.unembed.linear.weight.neg_()
            elif edit == "replaced":
                model.unembed.linear.weight = torch.nn.Parameter(-model.unembed.linear.weight)
            elif edit == "torch hook":
                model.ln_final.register_forward_hook(lambda m, args, out: -out)
            elif edit == "bias":
                model.unembed.linear.bias = torch.nn.Parameter(torch.arange(model.cfg.d_vocab_out).float())
            elif edit == "no norm":
                model.ln_final = None
            elif edit == "MLP":
                model.blocks[0].mlp = model.blocks[1].mlp
            elif edit == "global hook":
                norm = model.ln_final
                handles.append(register_module_forward_hook(lambda m, args, out: -out if m is norm else None))
            else:
                model.add_hook("unembed.hook_in", lambda act, hook: -act)

    def run(**options):
        model, added = zoo_model("llama"), []

        def add_and_change(self, token):  # as a function given as `stream` could
            plain(self, token)
            added.append(token)
            if len(added) == 10:
                change(model)

        monkeypatch.setattr(Continuation, "add", add_and_change)
        try:
            return model.generate([1, 2, 3], 30, stop=(), **options).new_tokens[0]
        finally:
            while handles:
                handles.pop().remove()

    plain, handles = Continuation.add, []
    expected = run(capture={0: "resid_post"})  # a capture keeps the generation off the decoder
    assert not counted
    assert torch.equal(run(), expected) and len(counted) == 9


def test_under_autocast_generation_stopped_with_an_error_of_an_addmv(counted):
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate([1, 2, 3], 5).new_tokens[0]
    assert len(tokens) == 5 and not counted
    assert len(model.generate([1, 2, 3], 5).new_tokens[0]) == 5 and counted

"""The parts against formulas: norms, positions, masks, scores, MLPs, both attention paths, configurations."""

import copy
import inspect
import json
import math
import re
from dataclasses import dataclass

import pytest
import torch
from refused import refused
from torch.nn import functional as F
from zoo import TOKENS, ZOO, LowRank, Peft, wrap_layers, zoo_model

from hooklens.core.errors import HooklensError, InputError, NameNotFound, WrongType
from hooklens.core.hooks import Handle
from hooklens.model import config
from hooklens.model.attention import differentiable_attention
from hooklens.model.block import Block
from hooklens.model.config import (
    Biases,
    BlockPart,
    Causal,
    DividedScaling,
    HookedTransformerConfig,
    LayerNormPart,
    LinearScaling,
    LinearScore,
    Llama3Scaling,
    NoMask,
    NoPositions,
    Parallel,
    PreNorm,
    RMSNormPart,
    Rotary,
    SlidingWindow,
    Softmax,
    part,
)
from hooklens.model.embed import rotary_tables, rotate, sinusoidal_table, soft_cap
from hooklens.model.mlp import ACTIVATIONS
from hooklens.model.norms import LayerNorm, RMSNorm
from hooklens.model.transformer import HookedTransformer
from hooklens.testing import tiny_model

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "norm",
    [
        LayerNorm(8, LayerNormPart(eps=0.1)),
        LayerNorm(8, LayerNormPart(affine=False)),
        LayerNorm(8, LayerNormPart(bias=False)),
        RMSNorm(8, RMSNormPart(eps=0.1)),
        RMSNorm(8, RMSNormPart(affine=False)),
        RMSNorm(8, RMSNormPart(weight_offset=1.0)),
    ],
    ids=str,
)
def test_norms_by_hand_and_by_kernel_agree_with_the_formula(norm, dtype):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(8, generator=generator))
    norm, x = norm.to(dtype), X.to(dtype)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True) if isinstance(norm, LayerNorm) else wide
    expected = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        expected = expected * (norm.weight.double() + getattr(norm, "offset", 0.0))
    expected = expected if norm.bias is None else expected + norm.bias.double()
    atol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    by_kernel = norm(x)
    for point in (norm.hook_scale, norm.hook_normalized):
        with Handle([point], lambda act, hook: act, False):
            by_hand = norm(x)
        assert by_hand.dtype == by_kernel.dtype == dtype
        assert torch.allclose(by_hand.double(), expected, atol=atol)
        assert torch.allclose(by_kernel.double(), expected, atol=atol)
    stack = torch.randn(4, 2, 3, 8, generator=generator, dtype=torch.float64).to(dtype)
    scale = norm.rms(norm.centred(x))
    whole = norm.linearised(stack.sum(0), scale)
    assert torch.allclose(norm.linearised(stack, scale).sum(0), whole, atol=max(atol, 1e-5) * 10)


def test_a_zero_vector_has_a_finite_norm_and_gradient():
    for norm in (LayerNorm(8, LayerNormPart()), RMSNorm(8, RMSNormPart())):
        x = torch.zeros(1, 8, requires_grad=True)
        norm(x).sum().backward()
        assert x.grad.isfinite().all()


def test_sinusoids_are_sines_and_cosines_of_position_over_wavelength():
    table = sinusoidal_table(7, 6)
    for p in range(7):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert math.isclose(table[p, 2 * i], math.sin(angle), abs_tol=1e-12)
            assert math.isclose(table[p, 2 * i + 1], math.cos(angle), abs_tol=1e-12)
    assert sinusoidal_table(3, 5).shape == (3, 5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 4])
def test_rotary_turns_pairs_by_position_so_that_scores_know_distance_only(interleaved, dim):
    made = Rotary(dim=dim, interleaved=interleaved)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def turned(x, position):
        cos, sin = rotary_tables(made, 8, torch.tensor([position]), torch.float64)
        return rotate(x, cos[None], sin[None], interleaved)

    for distance in (0, 1, 5):
        scores = [(turned(q, p + distance) * turned(k, p)).sum().item() for p in (0, 3, 40)]
        assert scores == pytest.approx([scores[0]] * 3, abs=1e-10)
    assert torch.equal(turned(q, 0), q)
    if dim is not None:
        assert torch.equal(turned(q, 5)[..., dim:], q[..., dim:])
    first = (0, 1) if interleaved else (0, (dim or 8) // 2)
    a, b = q[..., first[0]].item(), q[..., first[1]].item()
    assert turned(q, 2)[..., first[0]].item() == pytest.approx(a * math.cos(2) - b * math.sin(2))
    with pytest.raises(InputError, match="even number of at most d_head 8 dimensions, got 9"):
        rotary_tables(Rotary(dim=9), 8, torch.tensor([0]), torch.float32)


def test_rotary_scalings():
    freq = 1 / 10000 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert torch.equal(LinearScaling(factor=4.0).scale(freq), freq / 4)
    scaled = Llama3Scaling(factor=8.0, original_n_ctx=100).scale(freq)
    wavelength = 2 * math.pi / freq
    assert torch.equal(scaled[wavelength < 25], freq[wavelength < 25])
    assert torch.allclose(scaled[wavelength > 100], freq[wavelength > 100] / 8)
    blended = (wavelength >= 25) & (wavelength <= 100)
    assert blended.any() and (scaled[blended] < freq[blended]).all() and (scaled[blended] > freq[blended] / 8).all()
    made = DividedScaling(short=(1.0, 2.0), long=(4.0, 8.0), original_n_ctx=4, magnitude=1.5)
    two = torch.ones(2)
    assert made.scale(two, torch.tensor([4, 5])).tolist() == [[1.0, 0.5], [0.25, 0.125]]


def test_a_soft_cap_bounds_and_is_the_identity_near_zero():
    x = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4])
    assert soft_cap(x, 5.0).tolist() == pytest.approx([-5, -0.01, 0, 0.01, 5], abs=1e-6)
    assert soft_cap(x, None) is x


def test_masks_say_what_a_query_may_see():
    q, k = torch.arange(5)[:, None], torch.arange(5)
    assert torch.equal(Causal().allows(q, k), torch.ones(5, 5).tril().bool())
    assert torch.equal(SlidingWindow(2).allows(q, k), torch.ones(5, 5).tril().triu(-1).bool())
    assert NoMask().allows(q, k).all() and not NoMask().causal


def test_a_row_that_sees_nothing_has_a_zero_pattern_and_no_gradient():
    scores = torch.randn(1, 1, 2, 3).requires_grad_()
    seen = torch.tensor([[[[True, False, True], [False, False, False]]]])
    for score in (Softmax(), LinearScore()):
        pattern = score.pattern(scores.masked_fill(~seen, -torch.inf), seen)
        assert (pattern[..., 1, :] == 0).all() and (pattern[..., 0, 1] == 0).all() and pattern.isfinite().all()
        (grad,) = torch.autograd.grad(pattern.square().sum(), scores)
        assert grad.isfinite().all() and (grad[..., 1, :] == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in ZOO if "linear" not in kind and kind != "gemma2"])
def test_fused_and_written_out_attention_agree_in_value_and_gradient(kind):
    model = zoo_model(kind, dtype=torch.float64)
    tokens = torch.cat((torch.full((2, 1), 6), TOKENS), 1)
    for mask in (None, torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])):
        grads = []
        for written_out in (False, True):
            model.zero_grad()
            if written_out:
                with differentiable_attention():
                    logits = model(tokens, attention_mask=mask)
            else:
                assert model.blocks[0].attn.fusable(torch.zeros(1, 1, 1, 1))
                logits = model(tokens, attention_mask=mask)
            logits.square().sum().backward()
            grads.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*grads, strict=True))


def far_scores(dtype, size, **changes):
    """Every query and key share one large number, so that scores lie near size^2 / 2 and differ by a few."""
    model = tiny_model(d_model=16, n_heads=4, seed=1, **changes)
    with torch.no_grad():
        for block in model.blocks:
            for name in ("Q", "K"):
                weight, bias = getattr(block.attn, f"W_{name}"), getattr(block.attn, f"b_{name}")
                weight.mul_(2.0)
                weight[..., 0], bias[..., 0] = 0.0, size
    return model.requires_grad_(False).to(dtype)


SEEN_BY = {"pattern": ["pattern"], "scores": ["attn_scores"], "everything": None}
MANY = torch.arange(44).view(4, 11).remainder(11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "changes"), [(43.0, {}), (300.0, {}), (43.0, {"mask": SlidingWindow(window=3)})])
def test_looking_at_attention_moves_a_half_precision_model_no_further_than_its_own_rounding(dtype, size, changes):
    """Scores near 925 are 4 apart in bfloat16; near 45,000 their products overflow in float16."""
    model = far_scores(dtype, size, **changes)
    plain, exact = model(MANY).double(), copy.deepcopy(model).double()(MANY)
    rounding = (plain - exact).abs().max()
    for names in SEEN_BY.values():
        logits, _ = model.run_with_cache(MANY, names)
        assert logits.isfinite().all() and (logits - exact).abs().max() < 3 * rounding
    mask = torch.ones_like(MANY)
    mask[0, :4] = 0
    looked, _ = model.run_with_cache(MANY, "pattern", attention_mask=mask)
    assert (looked.double() - model(MANY, attention_mask=mask)).abs().max() < 3 * rounding


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 43.0), (torch.float16, 300.0), (torch.bfloat16, 43.0)])
def test_scores_under_autocast_were_rounded_to_half_precision_while_somebody_looked(dtype, size):
    model = far_scores(torch.float32, size)
    exact = copy.deepcopy(model).double()(MANY)
    with torch.autocast("cpu", dtype):
        plain, (looked, cache) = model(MANY), model.run_with_cache(MANY, ["attn_scores", "pattern"])
    rounding = (plain - exact).abs().max()
    assert all(cache["attn_scores", layer].dtype == torch.float32 for layer in range(model.cfg.n_layers))
    assert plain.dtype == looked.dtype == cache["pattern", 0].dtype == dtype
    assert looked.isfinite().all() and (looked - exact).abs().max() < 3 * rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_soft_cap_of_large_scores_is_taken_before_they_are_rounded(dtype):
    model = far_scores(dtype, 43.0, score_fn=Softmax(soft_cap=2000.0))
    exact = copy.deepcopy(model).double()(MANY)
    uncapped = far_scores(dtype, 43.0)
    rounding = (uncapped(MANY) - copy.deepcopy(uncapped).double()(MANY)).abs().max()  # of the fused kernel
    assert (model(MANY) - exact).abs().max() < 3 * rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_precision_attention_are_those_of_the_fused_kernel_while_somebody_looks(dtype):
    model = far_scores(dtype, 43.0 if dtype == torch.bfloat16 else 300.0)
    found = []
    for one, name in ((model, "z"), (model, "pattern"), (copy.deepcopy(model).double(), "z")):
        logits, cache = one.run_with_cache(MANY, [name, "resid_pre"], grads=True)
        logits.double().square().mean().backward()
        found.append(cache["blocks.0.hook_resid_pre_grad"].double())
    fused, looked, exact = found
    assert looked.isfinite().all() and (looked - exact).norm() < 3 * (fused - exact).norm()


@pytest.mark.parametrize("kind", [LowRank, Peft])
def test_an_edited_result_of_a_wrapped_output_layer_reaches_the_stream(kind):
    """It used to ask the wrapper for its bias."""
    model = wrap_layers(zoo_model("gpt2", dtype=torch.float64), "attn.o", kind)
    attn_out = model.run_with_cache(TOKENS)[1]["attn_out", 0]
    scope, cache = model.capture(("attn_out", 0))
    with scope, model.hooks(fwd_hooks=[(("result", 0), lambda result, hook: result * 2)]):
        model(TOKENS)
    written_for_nothing = model.blocks[0].attn.o(torch.zeros(8, dtype=torch.float64)).detach()
    assert torch.allclose(cache["attn_out", 0], 2 * attn_out - written_for_nothing, atol=1e-12)


def test_unnormalised_attention_is_a_sum_over_earlier_tokens():
    model = zoo_model("linear_attention", dtype=torch.float64)
    _, cache = model.run_with_cache(TOKENS, names=["q", "k", "v", "z", "pattern"])
    scores = torch.einsum("bqhd,bkhd->bhqk", cache["q", 0], cache["k", 0]) / 2.0  # sqrt of d_head 4
    assert torch.allclose(cache["pattern", 0], scores.tril(), atol=1e-12)
    assert torch.allclose(cache["z", 0], torch.einsum("bhqk,bkhd->bqhd", scores.tril(), cache["v", 0]), atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mlps_are_what_they_say(name):
    act = {
        **{"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x},
        "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    }[name]
    for gated in (False, True):
        mlp = tiny_model(act_fn=name, gated_mlp=gated, dtype=torch.float64).blocks[0].mlp
        x = X.double()
        inner = (
            act(x @ mlp.W_gate + mlp.gate.bias) * (x @ mlp.W_in + mlp.b_in) if gated else act(x @ mlp.W_in + mlp.b_in)
        )
        assert torch.allclose(mlp(x), inner @ mlp.W_out + mlp.b_out, atol=1e-10)


# the configuration


@pytest.mark.parametrize("kind", ZOO)
def test_a_configuration_survives_json(kind):
    cfg = tiny_model(**ZOO[kind]).cfg
    assert HookedTransformerConfig.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg
    assert cfg.replace(n_ctx=99).n_ctx == 99 and hash(cfg) == hash(cfg.replace())


@pytest.mark.parametrize(
    "changes, error, said",
    [
        ({"n_heads": 3}, InputError, "d_model 8 is not a multiple of n_heads 3; give d_head"),
        ({"n_heads": 4, "n_key_value_heads": 3}, InputError, "not a multiple of n_key_value_heads 3"),
        ({"n_layers": 0}, InputError, "the configuration: n_layers is 0; a whole number above 0 is needed"),
        ({"n_heads": 0}, InputError, "the configuration: n_heads is 0; a whole number above 0 is needed"),
        ({"d_head": -2}, InputError, "the configuration: d_head is -2; a whole number above 0 is needed"),
        ({"block": "prenorm"}, NameNotFound, "no block part named 'prenorm'; closest: pre"),
        ({"act_fn": "gelu_fast"}, NameNotFound, "no activation function named 'gelu_fast'; closest: gelu"),
        ({"mask": "causall"}, NameNotFound, "no mask part named 'causall'; closest: causal"),
        ({"mask": ("causal",)}, InputError, "tuple of 2"),
        ({"mask": "rotary"}, NameNotFound, "no mask part named 'rotary'"),
        ({"mask": Softmax()}, InputError, "is a score part, but mask was expected"),
        ({"normalization_type": ("LN", "RMS")}, InputError, "takes one part"),
        ({"tie_word_embeddings": True, "d_vocab_out": 3}, InputError, "tied embeddings"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, error, said):
    with pytest.raises(error, match=said):
        tiny_model(**changes)


def test_of_two_parts_with_one_name_the_second_was_taken_silently():
    with pytest.raises(InputError, match=r"Other.* is a block part named 'sandwich', and so is .*\.Sandwich; give it"):

        @dataclass(frozen=True)
        class Other(BlockPart):
            name = "sandwich"

    assert type(tiny_model(block="sandwich").blocks[0]).__name__ == "SandwichBlock"


@dataclass(frozen=True)
class Nameless(BlockPart):
    """A part without a name."""


@dataclass(frozen=True)
class Heir(PreNorm):
    """A part with the name of another one."""


@dataclass(frozen=True)
class Bare(BlockPart):
    """A part without a block."""

    name = "bare"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"block": Nameless()}, InputError, r"Nameless\(final_norm=True\) has no name of its own"),
        ({"block": Heir()}, InputError, "has no name of its own"),
        ({"block": Bare()}, InputError, r"no Block is defined for Bare.*; write a subclass of Block with part = Bare"),
        ({"block": 3}, WrongType, "block takes a part as an instance, a name, or a dict .*; got 3"),
        ({"block": Bare}, WrongType, "block takes a part as an instance"),
        ({"block": {"part": ["pre"]}}, WrongType, "block takes a part as an instance"),
        ({"mask": {"part": "sliding_window", "windw": 2}}, NameNotFound, "no field of SlidingWindow named 'windw'; cl"),
    ],
)
def test_a_misused_part_ended_in_a_bare_error(changes, error, said):
    with pytest.raises(error, match=said):
        tiny_model(**changes)


def test_a_block_with_a_misused_part_ended_in_a_bare_error_or_replaced_another_block():
    for part_of, error, said in (
        ("pre", WrongType, "must be a subclass of BlockPart with a name, got 'pre'"),
        (Nameless, WrongType, "must be a subclass of BlockPart with a name"),
        (Parallel, InputError, "has the part Parallel, and so has ParallelBlock"),
    ):
        with pytest.raises(error, match=said):
            type("Mine", (Block,), {"part": part_of})
    assert type(tiny_model(block="parallel").blocks[0]).__name__ == "ParallelBlock"


def test_names_stand_for_parts_and_an_unknown_field_is_refused():
    assert part("position", "none") == NoPositions() and part("mask", None) is None
    assert tiny_model(mask=["causal", "causal"]).cfg.mask == Causal()
    values = tiny_model(biases=Biases(qkv=False)).cfg.to_json()
    with pytest.raises(NameNotFound, match="no field of HookedTransformerConfig named 'n_layer'; closest: n_layers"):
        HookedTransformerConfig.from_json(values | {"n_layer": 1})


@pytest.mark.parametrize(
    ("biases", "there"), [((True, None), (1, 1)), ((True, False), (1, 0)), ((False, True), (0, 1))]
)
def test_the_gate_may_have_or_lack_a_bias_of_its_own(biases, there):
    model = tiny_model(gated_mlp=True, biases=Biases(mlp=biases[0], gate=biases[1]))
    mlp = model.blocks[0].mlp
    assert (mlp.in_.bias is not None, mlp.gate.bias is not None) == there and (mlp.out.bias is not None) == there[0]
    assert HookedTransformerConfig.from_json(model.cfg.to_json()) == model.cfg
    assert model.generate([1, 2], 3).new_tokens[0].shape == (3,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d_mlp": 0}, "d_mlp is 0; a whole number above 0"),
        ({"attn_only": True, "d_mlp": 9}, "leave d_mlp out"),
        ({"biases": False}, "Biases\\(qkv=False"),
        ({"positional_embedding_type": Rotary(scaling=DividedScaling((1.0,), (1.0,)))}, "needs 2 divisors"),
    ],
)
def test_a_size_that_would_be_ignored_is_refused(changes, says):
    with refused(HooklensError, says):
        tiny_model(**changes)


@pytest.mark.parametrize("divisors", [{}, {"short": (1.0,)}, {"short": (1.0,), "long": (1.0, 2.0)}, {"short": 5.0}])
def test_divided_scaling_without_its_divisors_is_refused(divisors):
    with refused(InputError, "per rotary frequency"):
        DividedScaling(**divisors)


def test_a_model_without_mlps_is_saved_and_changed_with_d_mlp_0():
    cfg = tiny_model(attn_only=True, d_mlp=0).cfg
    assert HookedTransformerConfig.from_json(cfg.to_json()) == cfg
    assert cfg.replace(attn_only=False).d_mlp == 32 and cfg.replace(attn_only=False).replace(attn_only=True) == cfg


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"biases": 5}, "biases is read from a dict"),
        ({"biases": None}, "biases is read from a dict"),
        ({"biases": {"qkw": True}}, "closest: qkv"),
        ({"folded": 5}, "folded is a list of names, got 5"),
        ({"attn_scale": 1.0}, "score_fn=Softmax"),
    ],
)
def test_a_wrong_field_in_json_is_named(changes, says):
    with refused(HooklensError, says):
        HookedTransformerConfig.from_json(tiny_model().cfg.to_json() | changes)


@pytest.mark.parametrize("values", ["", None, "config.json"])
def test_json_that_is_no_configuration_is_refused(values):
    with refused(WrongType, "a configuration is read from a dict"):
        HookedTransformerConfig.from_json(values)


def test_missing_fields_and_a_dict_in_place_of_a_configuration_were_raw_errors():
    with refused(InputError, "a configuration also needs n_ctx, n_heads, d_vocab; got a dict with n_layers, d_model"):
        HookedTransformerConfig.from_json({"n_layers": 2, "d_model": 8})
    with refused(WrongType, r"built from a HookedTransformerConfig\(\.\.\.\), got {'n_layers': 2}"):
        HookedTransformer({"n_layers": 2})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("attn_scale", r"is not a field of HookedTransformerConfig here.*Softmax\(scale"),
        ("attn_scores_soft_cap", r"Softmax\(soft_cap"),
        ("attn_softcap", r"Softmax\(soft_cap"),
        ("final_norm", r"PreNorm\(final_norm"),
        ("rotary_dim", r"Rotary\(dim"),
        ("rope_theta", r"Rotary\(base"),
        ("hidden_size", "give d_model"),
        ("num_layers", "give n_layers"),
        ("vocab_size", "give d_vocab"),
        ("n_layer", "no field of HookedTransformerConfig named 'n_layer'; closest: n_layers"),
    ],
)
def test_an_unknown_field_was_a_bare_type_error_of_the_constructor(name, says):
    sizes = {"n_layers": 1, "d_model": 4, "n_ctx": 4, "n_heads": 1, "d_vocab": 5}
    for call in (
        lambda: HookedTransformerConfig(**sizes, **{name: 1.0}),
        lambda: tiny_model().cfg.replace(**{name: 1}),
    ):
        with pytest.raises(NameNotFound, match=says):
            call()


def test_an_unknown_field_of_a_part_was_a_bare_type_error():
    for kind in (Softmax, Rotary, Biases):
        with pytest.raises(NameNotFound, match=f"no field of {kind.__name__} named 'soft_cab'"):
            kind(soft_cab=1.0)
    assert list(inspect.signature(Softmax).parameters) == ["scale", "soft_cap"]


def test_every_field_that_moved_names_one_that_exists():
    known = inspect.signature(HookedTransformerConfig).parameters
    for name, given in HookedTransformerConfig.moved.items():
        assert name not in known and given.partition("=")[0] in known
        for part_name, field in re.findall(r"(\w+)\((\w+)=", given):
            assert field in inspect.signature(getattr(config, part_name)).parameters

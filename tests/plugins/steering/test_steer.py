"""Adding and ablating directions: against hooks by hand, against recomputing whole prompts, and what is refused."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.zoo import TOKENS, ZOO, zoo_model

from hooklens.core.errors import InputError, NameNotFound, WrongType
from hooklens.plugins.steering.steering_edit import ablate_direction, project_out, steer, stream_sites
from hooklens.testing import tiny_model

CAUSAL = sorted(set(ZOO) - {"bidirectional"})
GENERATING = ["gpt2", "llama", "gemma2", "neox", "post", "window", "linear_attention"]
#: Positions as they are given while generating, and as numbers once a prompt of n tokens is part of a longer one.
POSITIONS = [
    ("all", lambda n: "all"),
    ("prompt", lambda n: slice(0, n)),
    ("generated", lambda n: slice(n, None)),
    (slice(-1, None), lambda n: slice(n - 1, None)),
    (slice(1, -1), lambda n: slice(1, n - 1)),
    (slice(2, 5), lambda n: slice(2, 5)),
    (-2, lambda n: n - 2),
    ([0, 5, -1], lambda n: [0, 5, n - 1]),
]


def direction(width=8, seed=0):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_adding_at_coefficient_0_changes_nothing_bit_for_bit(name):
    model = zoo_model(name)
    plain = model(TOKENS)
    with steer(model, direction(), 0.0, site="resid_post"):
        assert torch.equal(model(TOKENS), plain)
    with steer(model, direction(), torch.tensor([0.0, 2.0]), site=("resid_pre", 0)):
        rows = model(TOKENS)
    assert torch.equal(rows[0], plain[0]) and not torch.allclose(rows[1], plain[1])


def test_generation_at_coefficient_0_is_bit_for_bit_the_unsteered_one():
    model = tiny_model()
    logits = [model.generate([[1, 2, 3], [4]], 6, capture={5: "unembed.hook_out"}) for _ in "a"]
    with steer(model, direction(), 0, site="resid_post", positions="generated"):
        logits.append(model.generate([[1, 2, 3], [4]], 6, capture={5: "unembed.hook_out"}))
    a, b = (one.caches[5]["unembed.hook_out"] for one in logits)
    assert torch.equal(a, b) and all(map(torch.equal, logits[0].new_tokens, logits[1].new_tokens))


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "post"])
def test_adding_is_the_hook_written_by_hand(site):
    model = zoo_model("llama", dtype=torch.float64)
    v = direction(32 if site == "post" else 8)
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[((site, 1), lambda act, hook: act + 2.5 * v)])
    with steer(model, v, 2.5, site=(site, 1)):
        assert torch.equal(model(TOKENS), expected)
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=steer(model, v, 2.5, site=(site, 1)).hooks), expected)


def test_a_direction_a_layer_goes_to_its_own_layer():
    model = zoo_model("gpt2", dtype=torch.float64)
    each = torch.stack([direction(seed=1), direction(seed=2)])
    hooks = [(("resid_post", layer), lambda act, hook, v=each[layer]: act + v) for layer in range(2)]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    with steer(model, each, site="resid_post"):
        assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize(
    ("name", "positions", "absolute"),
    [(name, *some) for name in GENERATING for some in (POSITIONS if name in ("gpt2", "llama") else POSITIONS[3:5])],
    ids=lambda one: "" if callable(one) else str(one),
)
def test_steering_in_generation_equals_steering_by_recomputing_whole_prompts(name, positions, absolute):
    """Also for prompts of different lengths, which generation pads on the left."""
    model, prompts = zoo_model(name, dtype=torch.float64), [[1, 5, 2, 7], [3, 9], [4, 4, 10]]
    steps = 5
    wanted = dict.fromkeys(range(steps), "unembed.hook_out")
    with steer(model, direction(), 1.5, site=("resid_pre", 1), positions=positions):
        out = model.generate(prompts, steps, stop=(), capture=wanted)
    plain = model.generate(prompts, steps, stop=(), capture=wanted)
    moved = 0.0
    for row, prompt in enumerate(prompts):
        n, whole = len(prompt), out.tokens[row][None]
        with steer(model, direction(), 1.5, site=("resid_pre", 1), positions=absolute(n)):
            expected = model.run_with_cache(whole, names="unembed.hook_out")[1]["unembed.hook_out"]
        for step in range(steps):
            seen = out.caches[step]["unembed.hook_out"][row, -1]
            torch.testing.assert_close(seen, expected[0, n - 1 + step], atol=1e-10, rtol=1e-10)
            moved = max(moved, float((seen - plain.caches[step]["unembed.hook_out"][row, -1]).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize(("positions", "absolute"), POSITIONS, ids=lambda one: "" if callable(one) else str(one))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_position(side, positions, absolute):
    model, rows = zoo_model("llama", dtype=torch.float64), [[1, 5, 2, 7, 3, 6], [3, 9, 4]]
    short = [*rows[1], 0, 0, 0] if side == "right" else [0, 0, 0, *rows[1]]
    tokens, mask = torch.tensor([rows[0], short]), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    mask[1] = mask[1] if side == "right" else mask[1].flip(0)
    with steer(model, direction(), 1.5, site="resid_mid", positions=positions):
        both = model(tokens, attention_mask=mask)
    one_by_one = []
    for row in rows:
        here = [i for i in positions if i < len(row)] if isinstance(positions, list) else positions
        with steer(model, direction(), 1.5, site="resid_mid", positions=here):
            one_by_one.append(model([row]))
    torch.testing.assert_close(both[:1], one_by_one[0], atol=1e-10, rtol=1e-10)
    real = both[1:, :3] if side == "right" else both[1:, 3:]
    torch.testing.assert_close(real, one_by_one[1], atol=1e-10, rtol=1e-10)


def test_a_coefficient_a_row_is_the_rows_one_by_one():
    model = zoo_model("gpt2", dtype=torch.float64)
    with steer(model, direction(), torch.tensor([1.0, -3.0]), site="resid_post", positions=[1, 2]):
        both = model(TOKENS)
    for row, amount in enumerate((1.0, -3.0)):
        with steer(model, direction(), amount, site="resid_post", positions=[1, 2]):
            torch.testing.assert_close(both[row : row + 1], model(TOKENS[row : row + 1]), atol=1e-10, rtol=1e-10)


def test_an_edit_may_be_entered_again_and_leaves_nothing_when_something_raises():
    model, plain = tiny_model(), tiny_model()(TOKENS)
    edit = steer(model, direction(), 2.0, site="resid_post")
    with edit:
        once = model(TOKENS)
        with edit:
            twice = model(TOKENS)
    with pytest.raises(RuntimeError), edit:
        raise RuntimeError
    with edit:
        assert torch.equal(model(TOKENS), once)
    assert not torch.allclose(once, twice) and torch.equal(model(TOKENS), plain)


def test_a_direction_can_be_optimised():
    model = tiny_model(dtype=torch.float64)
    v = direction().requires_grad_()
    with steer(model, v, 2.0, site=("resid_post", 0)):
        loss = model([[1, 2, 3]])[0, -1, 4]
    (grad,) = torch.autograd.grad(loss, v)
    assert grad.abs().max() > 0 and all(p.grad is None for p in model.parameters())


# -- ablation


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), width=st.integers(1, 12))
def test_projecting_out_leaves_no_component_and_does_nothing_twice(seed, width):
    x, v = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()
    left = project_out(x, v[0])
    assert (left @ v[0]).abs().max() <= 1e-12 * x.norm() * v[0].norm()
    torch.testing.assert_close(project_out(left, 5 * v[0]), left, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(left + (x - left), x)
    assert (left.norm(dim=-1) <= x.norm(dim=-1) + 1e-12).all()


@pytest.mark.parametrize("name", [name for name in CAUSAL if not name.startswith("post")])
def test_an_ablated_direction_has_no_projection_at_any_stream_site(name):
    model, v = zoo_model(name, dtype=torch.float64), direction()
    with ablate_direction(model, v):
        _, cache = model.run_with_cache(TOKENS, names=stream_sites(model))
        out = model.generate([[1, 2, 3], [4]], 4, stop=(), capture={2: "resid_post"})
    for seen in (*cache.values(), *out.caches[2].values()):
        assert (seen @ v).abs().max() < 1e-12 * seen.norm() * v.norm()
    assert max(float((act @ v).abs().max()) for act in model.run_with_cache(TOKENS, "resid_post")[1].values()) > 0.1


@pytest.mark.parametrize("name", ["gpt2_bias_everywhere", "llama", "neox", "attn_only", "no_norm"])
def test_ablating_everywhere_equals_weights_that_cannot_write_the_direction(name):
    """Arditi et al. (2024), appendix E. Tied embeddings come apart first: only what writes is changed."""
    model, v = zoo_model(name, dtype=torch.float64, tie_word_embeddings=False), direction()
    with ablate_direction(model, v):
        ablated = model(TOKENS)
    edited = zoo_model(name, dtype=torch.float64, tie_word_embeddings=False)
    with torch.no_grad():
        edited.W_E.copy_(project_out(edited.W_E, v))
        if edited.pos_embed is not None:
            edited.W_pos.copy_(project_out(edited.W_pos, v))
        for block in edited.blocks:
            for layer in (block.attn.o, *([] if block.mlp is None else [block.mlp.out])):
                layer.weight.copy_(project_out(layer.weight.T, v).T)
                if layer.bias is not None:
                    layer.bias.copy_(project_out(layer.bias, v))
    torch.testing.assert_close(ablated, edited(TOKENS), atol=1e-10, rtol=1e-10)


def test_ablating_at_one_site_is_the_hook_written_by_hand():
    model, v = zoo_model("gpt2", dtype=torch.float64), direction()
    unit = v / v.norm()
    hand = [(("mlp_out", 0), lambda act, hook: act - (act @ unit)[..., None] * unit)]
    expected, plain = model.run_with_hooks(TOKENS, fwd_hooks=hand), model(TOKENS)
    with ablate_direction(model, v, sites=("mlp_out", 0)):
        torch.testing.assert_close(model(TOKENS), expected, atol=1e-12, rtol=1e-12)
    with ablate_direction(model, v, positions=[]):
        assert torch.equal(model(TOKENS), plain)


# -- what is refused


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"direction": torch.ones(7)}, InputError, r"shape \[8\] at each position.*got \[7\]"),
        ({"direction": torch.ones(3, 8)}, InputError, r"\[2, 8\] with one per layer; got \[3, 8\]"),
        ({"direction": torch.ones(8, dtype=torch.long)}, (WrongType, TypeError), "float tensor|'direction'"),
        ({"direction": torch.full((8,), torch.nan)}, InputError, "finite"),
        ({"coefficient": float("inf")}, InputError, "finite"),
        ({"coefficient": torch.ones(2, 2)}, InputError, "one per batch row"),
        ({"site": "z"}, InputError, r"shape \[2, 4\] at each position"),
        ({"site": "pattern"}, InputError, "one vector per position"),
        ({"site": "resid_pos"}, NameNotFound, "resid_post"),
        ({"positions": "generate"}, NameNotFound, "generated"),
        ({"positions": slice(0, 4, 2)}, InputError, "no step"),
        ({"positions": 1.5}, (WrongType, TypeError), "numbers or a slice|'positions'"),
    ],
)
def test_what_cannot_be_added_is_refused_with_a_reason(change, error, said):
    given = {"direction": torch.ones(8), "coefficient": 1.0, "site": "resid_post", "positions": "all"} | change
    with pytest.raises(error, match=said):
        steer(tiny_model(), given.pop("direction"), given.pop("coefficient"), **given)


def test_what_cannot_be_ablated_is_refused_with_a_reason():
    with pytest.raises(InputError, match="finite and not 0"):
        ablate_direction(tiny_model(), torch.zeros(8))
    with pytest.raises(InputError, match="post-norm"):
        ablate_direction(zoo_model("post"), torch.ones(8))
    with ablate_direction(zoo_model("post"), torch.ones(8), sites="attn_out") as edit:
        assert "2 points" in repr(edit)
    with (
        pytest.raises(InputError, match="the batch has 2"),
        steer(tiny_model(), torch.ones(8), torch.ones(3), site="embed") as e,
    ):
        e.model(TOKENS)


# -- heads


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("site", ["z", "q", "k", "v"])
def test_steering_at_heads_is_the_hook_written_by_hand(name, site):
    """llama has two query heads a key-value head: k and v then hold one vector for both."""
    model = zoo_model(name, dtype=torch.float64)
    n = model.cfg.n_key_value_heads if site in "kv" else model.cfg.n_heads
    generator = torch.Generator().manual_seed(0)
    each = torch.randn(2, n, model.cfg.d_head, generator=generator, dtype=torch.float64)
    one = [((site, 1), lambda act, hook: act + 2.5 * each[1])]
    by_hand = model.run_with_hooks(TOKENS, fwd_hooks=one)
    with steer(model, each[1], 2.5, site=(site, 1)):
        assert torch.equal(model(TOKENS), by_hand)
    there = torch.zeros(TOKENS.shape[1], 1, 1, dtype=torch.float64)
    there[[1, -1]] = 1
    both = [((site, layer), lambda act, hook, v=each[layer]: act + there * v) for layer in range(2)]
    with steer(model, each, site=site, positions=[1, -1]):
        steered = model(TOKENS)
    torch.testing.assert_close(steered, model.run_with_hooks(TOKENS, fwd_hooks=both), atol=1e-12, rtol=1e-12)


def test_steering_one_head_while_generating_equals_recomputing_the_whole_prompt():
    model, steps, prompts = zoo_model("llama", dtype=torch.float64), 4, [[1, 5, 2, 7], [3, 9]]
    v = torch.zeros(model.cfg.n_heads, model.cfg.d_head, dtype=torch.float64)
    v[1] = direction(model.cfg.d_head) * 5
    wanted = dict.fromkeys(range(steps), "unembed.hook_out")
    with steer(model, v, torch.tensor([1.0, -2.0]), site=("z", 1), positions=slice(-1, None)):
        out = model.generate(prompts, steps, stop=(), capture=wanted)
    for row, (prompt, amount) in enumerate(zip(prompts, (1.0, -2.0), strict=True)):
        with steer(model, v, amount, site=("z", 1), positions=slice(len(prompt) - 1, None)):
            _, cache = model.run_with_cache(out.tokens[row][None], names=["unembed.hook_out"])
        for step in range(steps):
            seen, expected = out.caches[step]["unembed.hook_out"][row, -1], cache["unembed.hook_out"]
            torch.testing.assert_close(seen, expected[0, len(prompt) - 1 + step], atol=1e-10, rtol=1e-10)


def test_a_head_loses_its_own_direction_and_one_without_a_direction_nothing():
    model = zoo_model("gpt2", dtype=torch.float64)
    v = torch.stack([direction(4), torch.zeros(4, dtype=torch.float64)])
    with ablate_direction(model, v, sites=("z", 1)):
        _, cache = model.run_with_cache(TOKENS, names=("z", 1))
    plain = model.run_with_cache(TOKENS, names=("z", 1))[1]["z", 1]
    assert torch.equal(cache["z", 1][:, :, 1], plain[:, :, 1])
    assert (cache["z", 1][:, :, 0] @ v[0]).abs().max() < 1e-12 < (plain[:, :, 0] @ v[0]).abs().max()


def test_directions_at_heads_that_do_not_fit_are_refused_with_a_reason():
    model = zoo_model("llama")
    wrong = torch.ones(model.cfg.n_heads, model.cfg.d_head)
    with pytest.raises(InputError, match=rf"shape \[{model.cfg.n_key_value_heads}, {model.cfg.d_head}\]"):
        steer(model, wrong, site=("k", 0))
    with pytest.raises(InputError, match="finite and not 0"):
        ablate_direction(model, torch.zeros_like(wrong), sites=("z", 0))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda edit: pickle.loads(pickle.dumps(edit))])
def test_an_edit_can_be_copied_and_pickled_also_while_it_is_entered(duplicate):
    model, direction, tokens = tiny_model(), torch.arange(8.0), torch.tensor([[1, 2, 3]])
    for edit in (steer(model, direction, 2.0, site=("resid_post", 0)), ablate_direction(model, direction)):
        with edit:
            other, expected = duplicate(edit), model(tokens)
        plain = other.model(tokens)
        with other:
            assert torch.equal(other.model(tokens), expected) and not torch.equal(plain, expected)
        assert torch.equal(other.model(tokens), plain)

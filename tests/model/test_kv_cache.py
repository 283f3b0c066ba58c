"""Keys and values from before: step by step equals at once, with padding, windows, hooks and gradients."""

import pytest
import torch
from close import close
from zoo import TOKENS, ZOO, zoo_model

from hooklens.core.errors import InputError
from hooklens.model.config import SlidingWindow
from hooklens.model.kv_cache import KVCache
from hooklens.testing import tiny_model

CAUSAL = [kind for kind in ZOO if kind != "bidirectional"]


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("grad", [True, False])
def test_step_by_step_equals_at_once(kind, grad):
    model = zoo_model(kind)
    with torch.set_grad_enabled(grad):
        past = KVCache()
        for chunk in (slice(0, 2), slice(2, 3), slice(3, 5)):
            at_once = model(TOKENS[:, : chunk.stop])  # long rotary: a token more changes what comes before it
            assert close(model(TOKENS[:, chunk], kv_cache=past), at_once[:, chunk])
            assert past.length == chunk.stop
        assert past.step == 3


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_continue_as_if_there_were_no_padding(kind, side):
    """A window counts tokens, not slots: right padding between prompt and continuation must not shrink it."""
    model, past = zoo_model(kind, dtype=torch.float64), KVCache()
    pads, zeros = torch.full((2, 3), 6), torch.zeros(2, 3, dtype=torch.long)
    ones = torch.ones(2, 3, dtype=torch.long)
    left = side == "left"
    tokens = torch.cat((pads, TOKENS[:, :3]) if left else (TOKENS[:, :3], pads), 1)
    mask = torch.cat((zeros, ones) if left else (ones, zeros), 1)
    with torch.no_grad():
        whole = model(TOKENS)
        model(tokens, attention_mask=mask, kv_cache=past)
        assert torch.allclose(model(TOKENS[:, 3:4], kv_cache=past), whole[:, 3:4], atol=1e-11)
        full_mask = torch.cat((mask, ones[:, :2]), 1)  # as transformers gives it: the earlier tokens included
        last = model(TOKENS[:, 4:], kv_cache=past, attention_mask=full_mask, logits_at=-1)
        assert torch.allclose(last, whole[:, 4:], atol=1e-11)


def test_gradients_flow_through_the_cache():
    model, past = zoo_model("llama", dtype=torch.float64), KVCache()
    model(TOKENS)[:, -1].sum().backward()
    expected = model.embed.weight.grad.clone()
    model.zero_grad()
    model(TOKENS[:, :3], kv_cache=past)
    model(TOKENS[:, 3:], kv_cache=past)[:, -1].sum().backward()
    assert torch.allclose(model.embed.weight.grad, expected, atol=1e-10)


def test_a_prompt_with_gradients_may_be_continued_without_and_the_other_way_round():
    model = zoo_model("llama")
    whole = model(TOKENS)
    for first in (True, False):
        past = KVCache()
        with torch.set_grad_enabled(first):
            model(TOKENS[:, :3], kv_cache=past)
        with torch.set_grad_enabled(not first):
            assert close(model(TOKENS[:, 3:], kv_cache=past), whole[:, 3:])


def test_hooks_are_told_the_step_and_the_first_new_position():
    model, past, told = tiny_model(), KVCache(), []
    with model.hooks(fwd_hooks=[(("z", 0), lambda act, hook: told.append((hook.step, hook.offset, act.shape[1])))]):
        for chunk in (TOKENS[:, :2], TOKENS[:, 2:3], TOKENS[:, 3:]):
            model(chunk, kv_cache=past)
        model(TOKENS)
    assert told == [(0, 0, 2), (1, 2, 1), (2, 3, 2), (0, 0, 5)]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("name", ["k", "v"])
def test_edits_to_k_and_v_enter_the_cache(kind, name):
    model, past = zoo_model(kind), KVCache()
    edit = [((name, 0), lambda act, hook: act * 1.5 if hook.step == 0 else None)]

    def first_two(act, hook):
        act[:, :2] *= 1.5
        return act

    with torch.no_grad():
        expected = model.run_with_hooks(TOKENS, fwd_hooks=[((name, 0), first_two)])
        with model.hooks(fwd_hooks=edit):
            model(TOKENS[:, :2], kv_cache=past)
        assert close(model(TOKENS[:, 2:], kv_cache=past), expected[:, 2:])


@pytest.mark.parametrize("grad", [True, False])
def test_rot_k_shows_all_keys_and_edits_there_hold_for_that_step_only(grad):
    model, past, shapes = zoo_model("llama"), KVCache(), []

    def zero_all(act, hook):
        shapes.append(act.shape[1])
        return act.mul_(0)

    with torch.set_grad_enabled(grad):
        whole = model(TOKENS)
        model(TOKENS[:, :2], kv_cache=past)
        with model.hooks(fwd_hooks=[("rot_k", zero_all)]):
            edited = model(TOKENS[:, 2:3], kv_cache=past)
        assert shapes == [3, 3] and not torch.allclose(edited, whole[:, 2:3])
        # The edit changed what layer 0 wrote and so layer 1's own keys, but not the keys that layer 0 keeps.
        kept, fresh = past.of_layer(0)[0], KVCache()
        model(TOKENS[:, :3], kv_cache=fresh)
        assert close(kept, fresh.of_layer(0)[0], ulps=20) and (kept != 0).any()


def test_a_cached_activation_is_not_rewritten_by_later_steps():
    model, past = zoo_model("llama"), KVCache()
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS[:, :2], kv_cache=past)
        kept = {name: act.clone() for name, act in cache.items()}
        for position in range(2, 5):
            model(TOKENS[:, position : position + 1], kv_cache=past)
    assert all(torch.equal(cache[name], act) for name, act in kept.items())


def test_an_exception_in_a_step_leaves_the_cache_as_it_was():
    model, past = zoo_model("gpt2"), KVCache()

    def breaks(act, hook):
        raise ZeroDivisionError

    with torch.no_grad():
        whole = model(TOKENS)
        model(TOKENS[:, :2], kv_cache=past)
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(TOKENS[:, 2:], kv_cache=past, fwd_hooks=[(("z", 1), breaks)])
        assert (past.length, past.step) == (2, 1)
        assert close(model(TOKENS[:, 2:], kv_cache=past), whole[:, 2:])


def test_rows_may_leave_and_be_reordered():
    model, past = zoo_model("gemma2"), KVCache()
    tokens = torch.cat((torch.full((2, 1), 6), TOKENS[:, :3]), 1)
    mask = torch.tensor([[0, 1, 1, 1]]).expand(2, 4)
    with torch.no_grad():
        whole = model(TOKENS)
        model(tokens, attention_mask=mask, kv_cache=past)
        past.keep_rows(torch.tensor([1, 0, 1]))
        got = model(TOKENS[[1, 0, 1], 3:], kv_cache=past)
    assert close(got, whole[[1, 0, 1], 3:])


def test_a_cache_that_lacks_a_layer_or_holds_other_rows_is_refused_rather_than_read_as_garbage():
    model = tiny_model()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            past = KVCache()
            model(TOKENS, kv_cache=past, stop_at_layer=1)
            with pytest.raises(InputError, match="5 tokens but no layer 1"):
                model(TOKENS, kv_cache=past)
            past = KVCache()
            model(TOKENS, kv_cache=past)
            with pytest.raises(InputError, match=r"has 2 rows, got 1; keep_rows"):
                model(TOKENS[:1], kv_cache=past)
    with pytest.raises(InputError, match="no layer 7"):
        past.of_layer(7)


def test_tokens_past_n_ctx_are_refused_before_anything_runs():
    model, past = tiny_model(n_ctx=6), KVCache()
    model(TOKENS, kv_cache=past)
    with pytest.raises(InputError, match="10 tokens do not fit this model's n_ctx of 6"):
        model(TOKENS, kv_cache=past)
    assert past.length == 5


def test_a_window_wider_than_the_text_is_no_window():
    wide = tiny_model(mask=SlidingWindow(window=100))
    assert close(wide(TOKENS), tiny_model()(TOKENS), ulps=20)


# -- long rotary: how far a position turns depends on how many tokens its row has


def test_a_short_row_beside_a_long_one_is_turned_as_it_is_alone():
    model = zoo_model("phi3", dtype=torch.float64)  # its original context is 3 tokens
    for start, end in ((0, 3), (2, 5)):  # padded on the right, on the left
        mask = torch.ones(2, 5, dtype=torch.bool)
        mask[1] = False
        mask[1, start:end] = True
        together = model(TOKENS, attention_mask=mask)
        assert torch.allclose(together[1, start:end], model(TOKENS[1:, start:end])[0], atol=1e-11)
        assert torch.allclose(together[:1], model(TOKENS[:1]), atol=1e-11)
        last = model(TOKENS, attention_mask=mask, logits_at=-1)
        assert torch.allclose(last[1, 0], model(TOKENS[1:, start:end])[0, -1], atol=1e-11)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("names", [["rot_k"], ["pattern", "rot_q"], None])
def test_a_cache_that_outgrows_the_original_context_holds_what_the_uncached_run_does(watched, names):
    model, past = zoo_model("phi3", dtype=torch.float64), KVCache()
    hooks = [("rot_k", lambda act, hook: act * 0.5)] if watched else []
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(TOKENS[:, :2], kv_cache=past)
        for end in (3, 4, 5):
            new = slice(end - 1, end)
            step, seen = model.run_with_cache(TOKENS[:, new], names, kv_cache=past)
            whole, at_once = model.run_with_cache(TOKENS[:, :end], names)
            assert torch.allclose(step, whole[:, new], atol=1e-11) and (past.length, past.step) == (end, end - 1)
            for name in seen:
                axis = 2 if name.endswith(("pattern", "scores")) else 1
                expected = at_once[name] if name.endswith("rot_k") else at_once[name].narrow(axis, end - 1, 1)
                assert torch.allclose(seen[name], expected, atol=1e-11), name


def test_what_a_hook_did_in_an_earlier_step_is_done_again_when_the_cache_is_rebuilt():
    model, past, told = zoo_model("phi3", dtype=torch.float64), KVCache(), []

    def steer(act, hook):
        told.append((hook.step, hook.offset, act.shape[1]))
        return act + 1.0 if hook.step == 0 else None

    def steer_prompt(act, hook):
        act[:, :2] += 1.0
        return act

    with torch.no_grad():
        with model.hooks(fwd_hooks=[(("resid_pre", 1), steer)]):
            for new in (slice(0, 2), slice(2, 3), slice(3, 4)):
                out = model(TOKENS[:, new], kv_cache=past)
        whole = model.run_with_hooks(TOKENS[:, :4], fwd_hooks=[(("resid_pre", 1), steer_prompt)])
    assert torch.allclose(out, whole[:, 3:], atol=1e-11)
    assert told == [(0, 0, 2), (1, 2, 1), (0, 0, 2), (1, 2, 1), (2, 3, 1)]


def test_chosen_rows_and_streams_outgrow_the_original_context_too():
    model = zoo_model("phi3", dtype=torch.float64)
    streams = model(TOKENS, stop_at_layer=1)
    with torch.no_grad():
        past = KVCache()
        model(TOKENS[:, :3], kv_cache=past)
        past.keep_rows(torch.tensor([1]))
        assert torch.allclose(model(TOKENS[1:, 3:], kv_cache=past), model(TOKENS[1:])[:, 3:], atol=1e-11)
        upper = KVCache()
        model(streams[:, :3], start_at_layer=1, kv_cache=upper)
        ours = model(streams[:, 3:], start_at_layer=1, kv_cache=upper)
        assert torch.allclose(ours, model(streams, start_at_layer=1)[:, 3:], atol=1e-11)


def test_the_beginning_of_a_cache_is_continued_to_the_length_it_had():
    model, whole = zoo_model("phi3", dtype=torch.float64), KVCache()
    with torch.no_grad():
        expected = model(TOKENS, kv_cache=whole)
        for pos in range(5):
            again = model(TOKENS[:, pos:], kv_cache=whole.before(pos))
            assert torch.allclose(again, expected[:, pos:], atol=1e-11)
        model(TOKENS[:, :3], kv_cache=(past := KVCache()))
        part = past.before(2)
        with pytest.raises(InputError, match="4 tokens exceed this model's original context"):
            model(TOKENS[:, 2:4], kv_cache=part)


def test_a_hook_that_raises_while_a_cache_is_rebuilt_leaves_the_cache_as_it_was():
    model, past = zoo_model("phi3", dtype=torch.float64), KVCache()

    def fail(act, hook):
        raise RuntimeError("no")

    with torch.no_grad():
        model(TOKENS[:, :2], kv_cache=past)
        model(TOKENS[:, 2:3], kv_cache=past)
        with pytest.raises(RuntimeError), model.hooks(fwd_hooks=[(("z", 1), fail)]):
            model(TOKENS[:, 3:4], kv_cache=past)
        assert past.length == 3
        assert torch.allclose(model(TOKENS[:, 3:], kv_cache=past), model(TOKENS)[:, 3:], atol=1e-11)

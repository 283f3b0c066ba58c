"""Generation: the same tokens as a plain loop, hooks and captures at chosen steps, stops, streaming, draws."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.zoo import zoo_model
from refused import refused

from hooklens.core.errors import InputError, NameNotFound, WrongType
from hooklens.generation.continuation import Continuation, Stops
from hooklens.generation.sampling import Sampling
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model

PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
ROTARY = {"positional_embedding_type": "rotary", "normalization_type": "RMS"}


def wide_model(**changes):
    """Float64 and far-apart logits, so that rounding decides nothing."""
    return tiny_model(dtype=torch.float64, **changes)


def plain_loop(model, prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model([tokens])[0, -1].argmax()))
    return tokens[len(prompt) :]


def text_model(**changes):
    tokenizer = tiny_tokenizer("", extra=("<bos>",))
    model = tiny_model(d_vocab=tokenizer.vocab_size, n_ctx=64, **changes)
    model.tokenizer = tokenizer
    return model


def saying(text, **changes):
    """A model that says one fixed text whatever the prompt is: hooks write its logits."""
    model = text_model(**changes)
    ids = model.tokenizer.encode(text)

    def say(logits, hook):
        token = ids[hook.step % len(ids)]
        return torch.nn.functional.one_hot(torch.full(logits.shape[:2], token), logits.shape[-1]).to(logits)

    model.add_hook("unembed.hook_out", say)
    return model


@pytest.mark.parametrize("changes", [{}, ROTARY, dict(n_key_value_heads=1, **ROTARY), {"block": "parallel"}])
def test_greedy_is_the_plain_loop_one_by_one_and_in_a_batch(changes):
    model = wide_model(**changes)
    expected = [plain_loop(model, prompt, 8) for prompt in PROMPTS]
    assert [model.generate(p, 8).new_tokens[0].tolist() for p in PROMPTS] == expected
    assert [row.tolist() for row in model.generate(PROMPTS, 8).new_tokens] == expected


LONG = [[1, 5], [4, 4, 9, 0], [10, 3, 2, 2, 7, 1], [6]]  # the original context is 3 tokens: two cross it on the way


@pytest.mark.parametrize("n", [4, 8])
def test_long_rotary_goes_on_as_the_uncached_run_when_the_original_context_is_passed(n):
    model = zoo_model("phi3", dtype=torch.float64)
    expected = [plain_loop(model, prompt, n) for prompt in LONG]
    assert [model.generate(p, n, stop=()).new_tokens[0].tolist() for p in LONG] == expected
    assert [row.tolist() for row in model.generate(LONG, n, stop=()).new_tokens] == expected
    ended = {int(expected[2][1])}  # some rows leave before others cross
    rows = [row[: row.index(next(iter(ended))) + 1] if ended & {*row} else row for row in expected]
    assert [row.tolist() for row in model.generate(LONG, n, stop=list(ended)).new_tokens] == rows
    double = [("rot_k", lambda act, hook: act * 2.0)]
    with model.hooks(fwd_hooks=double):
        expected = [plain_loop(model, prompt, n) for prompt in LONG]
        assert [row.tolist() for row in model.generate(LONG, n, stop=()).new_tokens] == expected
        alone = model.generate(LONG[0], n, stop=(), capture={2: ["rot_k", "pattern"]})
    with model.hooks(fwd_hooks=double):
        _, cache = model.run_with_cache(alone.tokens[0][None, :4], ["rot_k", "pattern"])
    assert alone.new_tokens[0].tolist() == expected[0]
    assert torch.allclose(alone.caches[2]["rot_k", 1], cache["rot_k", 1], atol=1e-10)
    assert torch.allclose(alone.caches[2]["pattern", 1], cache["pattern", 1][:, :, -1:], atol=1e-10)


def test_prompts_come_as_ids_tensors_or_text():
    model = wide_model()
    expected = model.generate([1, 2, 3], 4).new_tokens[0].tolist()
    for prompt in ((1, 2, 3), torch.tensor([1, 2, 3]), torch.tensor([[1, 2, 3]]), [torch.tensor([[1, 2, 3]])]):
        assert model.generate(prompt, 4).new_tokens[0].tolist() == expected
    model = text_model()
    one = model.generate("ab", 4)
    assert one.texts == [one.text] and one.prompts[0].tolist() == model.to_tokens("ab")[0].tolist()
    assert model.generate(["ab", "c"], 4).texts[0] == one.text


def test_nothing_is_left_behind():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model.generate(PROMPTS, 5, temperature=1.0, capture={1: None})
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(point.listening() for point in model.hook_points().values())


# -- draws


def test_a_seed_repeats_the_draw_and_the_result_names_it():
    model = tiny_model()
    first = model.generate(PROMPTS, 12, temperature=1.5)
    again = model.generate(PROMPTS, 12, temperature=1.5, seed=first.seed)
    assert [r.tolist() for r in first.new_tokens] == [r.tolist() for r in again.new_tokens]
    other = model.generate(PROMPTS, 12, temperature=1.5, seed=first.seed + 1)
    assert [r.tolist() for r in first.new_tokens] != [r.tolist() for r in other.new_tokens]
    generator = torch.Generator().manual_seed(5)
    seeded = model.generate(PROMPTS, 12, temperature=1.5, seed=generator)
    assert seeded.seed == 5
    repeated = model.generate(PROMPTS, 12, temperature=1.5, seed=5)
    assert [r.tolist() for r in seeded.new_tokens] == [r.tolist() for r in repeated.new_tokens]


def test_a_draw_does_not_depend_on_when_other_rows_stop():
    model = wide_model()
    free = model.generate(PROMPTS, 12, temperature=2.0, seed=0).new_tokens
    stop = int(free[0][2])
    ended = model.generate(PROMPTS, 12, temperature=2.0, seed=0, stop=stop).new_tokens
    for whole, cut in zip(free, ended, strict=True):
        assert whole[: len(cut)].tolist() == cut.tolist()
        assert len(cut) == 12 or cut[-1] == stop


def test_samples_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, -1)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = Sampling(0.5).choose(logits, draws).bincount(minlength=4) / 20_000
    assert torch.allclose(counts, (logits[0] / 0.5).softmax(-1), atol=0.01)
    assert counts[3] == 0


def test_temperature_near_zero_is_greedy():
    model = wide_model()
    greedy = model.generate(PROMPTS, 6).new_tokens
    cold = model.generate(PROMPTS, 6, temperature=1e-300, seed=0).new_tokens
    assert [r.tolist() for r in greedy] == [r.tolist() for r in cold]


def test_extreme_draws_never_reach_a_forbidden_token():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert Sampling(1.0).choose(logits, draws).tolist() == [1, 2]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.one_of(st.none(), st.integers(1, 12)))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed, p, k):
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed))
    probs, ids = Sampling(1.0, top_k=k, top_p=p).probabilities(logits)
    whole = logits[0].double().softmax(-1)
    allowed = whole.topk(min(k or 10, 10)).values
    allowed = allowed / allowed.sum()
    n = int((probs > 0).sum())
    assert n >= 1 and allowed[:n].sum() >= p - 1e-9 and (n == 1 or allowed[: n - 1].sum() < p)
    assert torch.isclose(probs.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(whole[ids[0, :n]] / whole[ids[0, :n]].sum(), probs[0, :n])


def test_top_k_of_one_is_greedy():
    model = wide_model()
    drawn = model.generate(PROMPTS, 6, temperature=3.0, top_k=1, seed=0).new_tokens
    assert [r.tolist() for r in drawn] == [r.tolist() for r in model.generate(PROMPTS, 6).new_tokens]


# -- hooks and captures


def test_a_patch_at_one_step_changes_what_follows_and_nothing_before():
    model = wide_model()
    plain = model.generate([1, 2, 3], 8).new_tokens[0].tolist()

    def forbid_at_3(logits, hook):
        if hook.step != 3:
            return None
        logits[..., plain[3]] = -torch.inf
        return logits

    with model.hooks(fwd_hooks=[("unembed.hook_out", forbid_at_3)]):
        patched = model.generate([1, 2, 3], 8).new_tokens[0].tolist()
    assert patched[:3] == plain[:3] and patched[3] != plain[3]
    assert patched[4:] == plain_loop(model, [1, 2, 3, *patched[:4]], 4)


def test_hooks_are_told_step_and_offset():
    seen = []
    with (model := tiny_model()).hooks(fwd_hooks=[(("z", 0), lambda z, hook: seen.append((hook.step, hook.offset)))]):
        model.generate([1, 2, 3], 3)
    assert seen == [(0, 0), (1, 3), (2, 4)]


def test_captures_are_those_of_a_forward_pass_over_the_same_tokens():
    model = wide_model(**ROTARY)
    out = model.generate([1, 2, 3], 6, capture={0: "resid_post", 5: ["resid_post", "pattern"]})
    assert sorted(out.caches) == [0, 5]
    _, whole = model.run_with_cache(out.tokens[0][None, :-1])
    assert torch.allclose(out.caches[0]["resid_post", -1], whole["resid_post", -1][:, :3])
    assert torch.allclose(out.caches[5]["resid_post", 1], whole["resid_post", 1][:, 7:])
    assert torch.allclose(out.caches[5]["pattern", 0], whole["pattern", 0][:, :, 7:])


def test_captures_can_enter_a_graph():
    out = tiny_model().generate([1, 2, 3], 2, capture={1: "resid_post"})
    probe = torch.nn.Linear(8, 1)
    probe(out.caches[1]["resid_post", 0]).sum().backward()
    assert probe.weight.grad is not None


def test_steps_that_were_not_reached_have_no_cache():
    model = saying("ab!")
    out = model.generate("x", 8, stop="!", capture=dict.fromkeys(range(8), "z"))
    assert sorted(out.caches) == [0, 1, 2]


def test_hooks_see_one_batch_even_when_rows_have_ended():
    model = wide_model()
    free = model.generate(PROMPTS, 10, stop=()).new_tokens
    stop, sizes = int(free[0][1]), []
    with model.hooks(fwd_hooks=[(("z", 0), lambda z, hook: sizes.append(len(z)))]):
        heard = model.generate(PROMPTS, 10, stop=stop)
    assert set(sizes) == {3}
    unheard = model.generate(PROMPTS, 10, stop=stop)
    assert [r.tolist() for r in heard.new_tokens] == [r.tolist() for r in unheard.new_tokens]


# -- stops and text


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    model = wide_model()
    free = [row.tolist() for row in model.generate(PROMPTS, 10).new_tokens]
    stop = free[0][2]
    out = model.generate(PROMPTS, 10, stop=stop)
    for whole, row, stopped in zip(free, out.new_tokens, out.stopped, strict=True):
        assert row.tolist() == (whole[: whole.index(stop) + 1] if stop in whole else whole)
        assert stopped == (stop in whole)
    padded, mask = out.padded()
    assert mask.sum(1).tolist() == [len(row) for row in out.tokens]
    assert padded[mask].tolist() == torch.cat(out.tokens).tolist()


def test_the_tokenizers_stop_tokens_are_the_default_and_an_empty_stop_never_stops():
    model = saying("ab<bos>c")
    object.__setattr__(model.tokenizer, "stop_ids", (model.tokenizer.bos_id,))
    assert model.generate("x", 8).text == "ab"
    assert model.generate("x", 8).stopped == [True]
    assert model.generate("x", 8, stop=()).text == "ab<bos>cab<bos>c"


def test_a_stop_text_may_lie_across_tokens_and_is_neither_in_the_text_nor_streamed():
    pieces = []
    out = saying("so STOP it").generate("x", 30, stop="STOP", stream=lambda row, piece: pieces.append((row, piece)))
    assert out.text == "so " and out.stopped == [True]
    assert "".join(piece for _, piece in pieces) == "so " and {row for row, _ in pieces} == {0}
    assert len(out.new_tokens[0]) == len("so STOP")


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("aé🙂S"), min_size=1, max_size=8), st.integers(1, 20))
def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(text, n):
    tokenizer, pieces = tiny_tokenizer(), []
    ids = tokenizer.encode(text)[:n]
    row = Continuation(tokenizer.to_tokens("a")[0], tokenizer, Stops(texts=("SS",)), pieces.append)
    for token in ids:
        row.add(token)
    assert all("\ufffd" not in piece for piece in pieces)
    row.finish()
    assert "".join(pieces) == row.text()


def test_streaming_to_the_terminal_writes_escapes_out(capsys):
    saying("a\x1b[31m\nbü").generate("x", 10, stream=True)
    assert capsys.readouterr().out == "a\\x1b[31m\nbü\n"


def test_ctrl_c_raises_and_carries_what_there_was():
    model = saying("abcdef")

    def interrupt(act, hook):
        if hook.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught, model.hooks(fwd_hooks=[(("z", 0), interrupt)]):
        model.generate("x", 20, capture={1: "z"})
    assert caught.value.generation.text == "abc" and list(caught.value.generation.caches) == [1]
    assert model.generate("x", 3).text == "abc"


def test_a_text_that_a_generation_does_not_have_is_an_absent_attribute():
    for out in (tiny_model().generate([1, 2], 2), text_model().generate(["ab", "cd"], 2)):
        assert not hasattr(out, "text") and out.tokens is not None and inspect.getmembers(out)
        with pytest.raises(InputError, match=r"a generation .* has no (single )?text"):
            _ = out.text


def test_the_result_shows_and_saves_itself(tmp_path):
    out = saying("ab").generate(["x", "yz"], 2)
    assert out.table().rows == ((0, "ab", 2, False), (1, "ab", 2, False))
    out.save(tmp_path / "out.safetensors")
    loaded = type(out).load(tmp_path / "out.safetensors")
    assert loaded.texts == out.texts and loaded.new_tokens[1].tolist() == out.new_tokens[1].tolist()
    with pytest.raises(InputError, match="2 prompts has no single text; read its texts"):
        _ = out.text


# -- refusals


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"temperature": -1.0}, InputError, "temperature must be 0"),
        ({"temperature": float("nan")}, InputError, "temperature must be 0"),
        ({"temperature": "hot"}, WrongType, "temperature is a number, got 'hot'"),
        ({"temperature": None}, WrongType, "temperature is a number, got None"),
        ({"temperature": 1.0, "seed": 1.5}, WrongType, "seed is a whole number or a torch.Generator, got 1.5"),
        ({"temperature": 1.0, "top_k": 2.5}, WrongType, "top_k is a whole number, got 2.5"),
        ({"temperature": 1.0, "top_k": 0}, InputError, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, InputError, "top_p"),
        ({"max_new_tokens": 0}, InputError, "max_new_tokens"),
        ({"stop": 2.5}, WrongType, "stop takes"),
        ({"stop": [None]}, WrongType, "stop takes"),
        ({"stop": ""}, InputError, "empty string"),
        ({"stop": "x"}, InputError, "needs a tokenizer"),
        ({"stream": True}, InputError, "needs a tokenizer"),
        ({"capture": {4: "z"}}, InputError, "step 4"),
        ({"capture": ["z"]}, WrongType, "maps steps"),
        ({"capture": {0: "zz"}}, NameNotFound, "no site"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, error, says):
    with refused(error, says):
        tiny_model().generate([1, 2], **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize("prompt", [[], "", [[]], [[1], []], torch.zeros(0, dtype=torch.long), [[99]], 5])
def test_prompts_that_cannot_be_read_are_refused(prompt):
    with pytest.raises((InputError, WrongType)):
        text_model().generate([[999]] if prompt == [[99]] else prompt, 2)


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs():
    model = tiny_model()
    assert len(model.generate([1] * 30, 3).new_tokens[0]) == 3
    with pytest.raises(InputError, match="generate at most 3"):
        model.generate([1] * 30, 4)


def test_models_that_cannot_be_continued_are_refused():
    with pytest.raises(InputError, match="causal"):
        tiny_model(mask="none").generate([1], 2)
    with pytest.raises(InputError, match="its own output tokens"):
        tiny_model(embed="vectors").generate([1], 2)


def test_nan_logits_are_named_by_step_and_row():
    model = tiny_model()
    with (
        model.hooks(fwd_hooks=[(("z", 0), lambda z, hook: z / 0 * 0 if hook.step == 2 else None)]),
        pytest.raises(InputError, match="row 0 is nan at step 2"),
    ):
        model.generate([1, 2], 5)


def test_stream_without_a_tokenizer_does_not_give_the_hint_of_stop():
    for stream in (True, lambda number, piece: None):
        with pytest.raises(InputError, match=r"stream= emits text.*leave stream out") as caught:
            tiny_model().generate([1, 2], 2, stream=stream)
        assert "token ids" not in str(caught.value)
    with pytest.raises(InputError, match="stop on token ids"):
        tiny_model().generate([1, 2], 2, stop="a")

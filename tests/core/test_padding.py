"""Padded batches: caches and logits know which tokens are real, and select positions in each row's own."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from refused import refused

sys.path.insert(0, str(Path(__file__).parent.parent / "model"))
from zoo import zoo_model

import hooklens as hl
from hooklens.core.cache import ActivationCache
from hooklens.core.errors import FileRefused, HooklensError, InputError
from hooklens.core.padding import PaddedTensor, padded
from hooklens.generation.sampling import _Batch
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model

TEXTS = ["abc", "abcdefgh"]
KINDS = ["gpt2", "llama", "gemma2", "post"]


def reading_model(**changes):
    model = tiny_model(d_vocab=256, dtype=torch.float64, **changes)
    model.tokenizer = tiny_tokenizer()
    return model


def ids_of(model, side):
    ids, mask = model.to_tokens(TEXTS, return_mask=True, padding_side=side)
    return {"tokens": ids, "attention_mask": mask}


WAYS = {
    "texts": lambda model: {"tokens": TEXTS},
    "right": lambda model: ids_of(model, "right"),
    "left": lambda model: ids_of(model, "left"),
}


@pytest.fixture(params=WAYS)
def given(request):
    model = reading_model()
    return model, WAYS[request.param](model)


def same(a, b):
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)


# caches


@pytest.mark.parametrize("pos", [-1, -3, 0, 2, [0, -1], slice(-2, None), slice(0, 3), torch.tensor([1, -2])])
def test_a_position_of_a_padded_cache_was_that_of_another_token(given, pos):
    """slice(pos=-1), decompose_resid(pos=-1) of the shorter prompt were its padding's, off by 2.04 and 1.63."""
    model, inputs = given
    _, cache = model.run_with_cache(**inputs)
    part, attrs = cache.slice(pos=pos), {}
    for name in ("decompose_resid", "accumulated_resid", "stack_head_results", "stack_neuron_results"):
        attrs[name] = getattr(cache, name)(pos=pos, apply_ln=True)[0]
    stack = cache.decompose_resid(pos=pos)[0]
    logits = cache.logit_attrs(stack, 5, 7, pos=pos)
    for row, text in enumerate(TEXTS):
        _, alone = model.run_with_cache(text)
        wanted = alone.slice(pos=pos)
        for name, act in part.items():
            keys = name.endswith(("pattern", "attn_scores"))
            got = act[row][..., cache.attention_mask[row]] if keys else act[row]
            assert same(got, wanted[name][0]), name
        for name, got in attrs.items():
            assert same(got[:, row], getattr(alone, name)(pos=pos, apply_ln=True)[0][:, 0]), name
        assert same(logits[:, row], alone.logit_attrs(alone.decompose_resid(pos=pos)[0], 5, 7, pos=pos)[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_queries_are_selected_in_each_row_too(kind):
    model = zoo_model(kind, dtype=torch.float64)
    tokens = torch.tensor([[0, 0, 1, 2, 3], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    names = [name for name in model.hook_names() if "pattern" in name or "rot_" in name]
    _, cache = model.run_with_cache(tokens, names, attention_mask=mask)
    _, alone = model.run_with_cache(tokens[:1, 2:], names)
    for pos in (-1, 0, [2, 0]):
        part, wanted = cache.slice(pos=pos), alone.slice(pos=pos)
        for name, act in part.items():
            got = act[0][..., 2:] if "pattern" in name else act[0]
            assert same(got, wanted[name][0]), (name, pos)


@pytest.mark.parametrize(
    ("pos", "said"),
    [
        (5, r"pos 5 asked for; a row with 3 real tokens has 0 to 2 \(or -3 to -1\), the rest of it is padding"),
        (-4, "pos -4 asked for; a row with 3 real tokens"),
        ([0, 7], "pos 7 asked for; a row with 3 real tokens"),
        (slice(None), r"\[3, 8\] positions of rows that have \[3, 8\] real tokens"),
        (slice(1, 5), r"\[2, 4\] positions"),
        (torch.tensor([True] * 8), "positions count real tokens; give integers"),
    ],
)
def test_what_cannot_be_selected_in_each_row_is_refused(given, pos, said):
    model, inputs = given
    logits, cache = model.run_with_cache(**inputs)
    for ask in (lambda: cache.slice(pos=pos), lambda: cache.decompose_resid(pos=pos)):
        with refused(InputError, said):
            ask()
    if not isinstance(pos, slice):
        with refused(InputError, said):
            logits[:, pos]


def test_a_position_needs_to_exist_in_the_chosen_rows_only(given):
    model, inputs = given
    _, cache = model.run_with_cache(**inputs)
    _, alone = model.run_with_cache(TEXTS[1])
    for batch in (1, [1], slice(1, 2), torch.tensor(1), torch.tensor([False, True])):
        assert same(cache.slice(batch=batch, pos=7)["z", 1].reshape(2, 4), alone["z", 1][0, 7])
    rows = cache.slice(batch=[1, 0])
    assert rows.attention_mask.sum(1).tolist() == [8, 3]
    assert same(rows.slice(pos=-1)["embed"], cache.slice(pos=-1)["embed"].flip(0))
    assert cache.slice(batch=0).attention_mask.sum() == 3
    assert cache.slice(pos=-1).attention_mask is None and cache.slice(layers=0).attention_mask is not None


def test_the_mask_goes_with_the_cache_into_a_file_and_another_dtype(given, tmp_path):
    model, inputs = given
    _, cache = model.run_with_cache(**inputs)
    cache.save(tmp_path / "cache")
    loaded = ActivationCache.load(tmp_path / "cache", model)
    assert torch.equal(loaded.attention_mask, cache.attention_mask) and list(loaded) == list(cache)
    assert torch.equal(loaded.slice(pos=-1)["z", 0], cache.slice(pos=-1)["z", 0])
    assert torch.equal(cache.to(dtype=torch.float32).attention_mask, cache.attention_mask)


def test_a_mask_that_is_no_mask_is_refused(tmp_path):
    from hooklens.core.cache import _SCHEMA
    from hooklens.core.envelope import read_envelope, write_envelope

    model, path = reading_model(), tmp_path / "cache"
    model.run_with_cache(TEXTS, "z")[1].save(path)
    file = read_envelope(path, _SCHEMA)
    write_envelope(path, _SCHEMA, file.content, dict(file.tensors()) | {"attention_mask": torch.ones(2, 8)})
    with refused(FileRefused, "its attention_mask is torch.float32"):
        ActivationCache.load(tmp_path / "cache", model)


def test_without_padding_nothing_changes():
    model = reading_model()
    whole = torch.ones(1, 3, dtype=torch.bool)
    for inputs in ({}, {"attention_mask": whole}):
        logits, cache = model.run_with_cache([[1, 2, 3]], **inputs)
        assert type(logits) is torch.Tensor and cache.attention_mask is None
        assert torch.equal(cache.slice(pos=slice(1, None))["z", 0], cache["z", 0][:, 1:])
    scope, cache = model.capture("z")
    with scope:
        model(TEXTS)
        assert cache.attention_mask is not None
        model("abc")
    assert cache.attention_mask is None  # a second pass overwrites the first, its mask too


# logits


def test_the_last_logits_of_a_shorter_text_were_those_of_its_padding(given):
    """logit_diff(...)(model(texts))[0] was 0.216, of the prompt alone -0.914."""
    model, inputs = given
    logits = model(**inputs)
    metrics = [
        hl.logit_diff(model, answer=5, wrong_answer=7),
        hl.prob(model, answer=5, pos=-2),
        hl.log_prob(model, answer=[5, 6], pos=[1, -1]),
        hl.kl(model, ["xyz", "uvw"]),
    ]
    for metric in metrics:
        value = metric(logits)
        assert type(value) is torch.Tensor
        for row, text in enumerate(TEXTS):
            assert same(value[row], metric.pairs(torch.tensor([row]))(model(text))[0]), metric
    alone = [model(text)[0] for text in TEXTS]
    for row, wanted in enumerate(alone):
        for got in (
            logits[:, -1][row],
            logits[row, -1],
            logits[row][-1],
            list(logits)[row][-1],
            logits[[0, 1], -1][row],
        ):
            assert same(got, wanted[-1])
        assert same(logits[:, -1, 5][row], wanted[-1, 5]) and same(logits[..., -1, :][row], wanted[-1])
        assert same(logits[:, [0, -1]][row], wanted[[0, -1]]) and same(logits[:, -2:][row], wanted[-2:])
        assert same(logits.log_softmax(-1)[:, -1][row], wanted.log_softmax(-1)[-1])
        assert logits.argmax(-1)[:, -1][row] == wanted.argmax(-1)[-1]
        assert same((logits / 2 - logits.mean(-1, keepdim=True))[row, 1], wanted[1] / 2 - wanted[1].mean())
        assert torch.equal(logits.topk(3).indices[row, -1], wanted.topk(3).indices[-1])
        assert same(logits[row : row + 1, -1][0], wanted[-1])
    assert same(logits[:, -1, torch.tensor([5, 6])], torch.stack([one[-1, [5, 6]] for one in alone]))
    picked = logits[torch.arange(2), torch.tensor([-1, 0]), torch.tensor([5, 6])]
    assert same(picked, torch.stack([alone[0][-1, 5], alone[1][0, 6]]))
    assert same(logits[:, None, -1].squeeze(1), logits[:, -1])
    real = inputs.get("attention_mask", logits.attention_mask)
    assert same(logits[real], torch.cat(alone))


def test_slices_from_the_start_leave_out_columns_and_keep_the_mask(given):
    model, inputs = given
    logits = model(**inputs)
    rest = logits[:, :-1]
    assert torch.equal(rest.attention_mask, logits.attention_mask[:, :-1])
    assert torch.equal(rest.as_subclass(torch.Tensor), logits.as_subclass(torch.Tensor)[:, :-1])
    assert type(logits[1]) is torch.Tensor  # nothing of the longest row is padding


def test_other_operations_give_plain_tensors(given):
    model, inputs = given
    logits = model(**inputs)
    other = model(**inputs)
    plain = logits.as_subclass(torch.Tensor)
    for out in (
        logits.sum(),
        logits.transpose(0, 1),
        logits.softmax(1),
        torch.stack([logits, other]),
        plain @ plain.mT,
    ):
        assert type(out) is torch.Tensor
    assert type(logits - other) is PaddedTensor
    assert type(padded(plain, torch.ones(2, 8).bool().index_fill(1, torch.tensor(4), False)) - logits) is torch.Tensor
    logits.sum().backward()
    assert model.W_E.grad is not None
    kept = copy.deepcopy(logits.detach())
    assert torch.equal(kept[:, -1], logits[:, -1]) and "PaddedTensor" in repr(kept)


def three_rows():
    """Rows of 2, 3 and 1 real tokens, whose values are their row and column."""
    x = torch.arange(3)[:, None, None] * 10.0 + torch.arange(3)[:, None] + torch.zeros(4)
    return padded(x, torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]]).bool())


ROWS = torch.tensor([2, 0, 2])
BY_ROW = {
    "index_select": (lambda x: [x.index_select(0, ROWS)], [[2, 0, 2]]),
    "torch.index_select": (lambda x: [torch.index_select(x, dim=-3, index=ROWS)], [[2, 0, 2]]),
    "flip": (lambda x: [x.flip(0)], [[2, 1, 0]]),
    "flip of a list": (lambda x: [torch.flip(x, [-3])], [[2, 1, 0]]),
    "roll": (lambda x: [x.roll(1, 0)], [[2, 0, 1]]),
    "roll by name": (lambda x: [torch.roll(x, 2, dims=(0,))], [[1, 2, 0]]),
    "cat": (lambda x: [torch.cat([x, x])], [[0, 1, 2, 0, 1, 2]]),
    "concat": (lambda x: [torch.concat((x[:2], x[2:]), dim=-3)], [[0, 1, 2]]),
    "cat with a row that has no padding": (lambda x: [torch.cat([x[:1], x[1:2].as_subclass(torch.Tensor)])], [[0, 1]]),
    "chunk": (lambda x: x.chunk(2), [[0, 1], [2]]),
    "split": (lambda x: torch.split(x, [1, 2]), [[0], [1, 2]]),
    "split by size": (lambda x: x.split(2, dim=0), [[0, 1], [2]]),
    "tensor_split": (lambda x: torch.tensor_split(x, 3), [[0], [1], [2]]),
    "narrow": (lambda x: [x.narrow(0, 1, 2)], [[1, 2]]),
    "repeat_interleave": (lambda x: [x.repeat_interleave(2, dim=0)], [[0, 0, 1, 1, 2, 2]]),
    "stack": (lambda x: [torch.stack([x[2], x[1], x[0]])], [[2, 1, 0]]),
}


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_that_are_moved_lost_their_mask(name):
    ask, order = BY_ROW[name]
    x, real = three_rows(), three_rows().attention_mask
    for out, rows in zip(ask(x), order, strict=True):
        assert torch.equal(out.as_subclass(torch.Tensor), x.as_subclass(torch.Tensor)[rows])
        assert isinstance(out, PaddedTensor) != bool(real[rows].all())
        if isinstance(out, PaddedTensor):
            assert torch.equal(out.attention_mask, real[rows])
        assert torch.equal(out[:, -1], torch.stack([x[row, -1] for row in rows]))


def test_one_row_of_several_that_are_taken_apart_keeps_its_mask():
    x = three_rows()
    for rows in (x.unbind(), torch.unbind(x, 0), [x.select(0, row) for row in range(3)], list(x)):
        assert [float(row[-1, 0]) for row in rows] == [1.0, 12.0, 22.0]


def test_what_moves_positions_gives_a_plain_tensor():
    x = three_rows()
    moved = [x.flip(1), x.flip(0, 1), x.roll(1, 1), x.roll(1), torch.cat([x, x], 1), torch.cat([x, x], dim=-2)]
    moved += [torch.gather(x, 0, torch.zeros(3, 3, 4).long()), torch.stack([x, x]), torch.stack([x[0], x[2]], 1)]
    moved += [x.repeat_interleave(2), x.transpose(0, 1), x[0].flip(0), *x.chunk(3, 1), x[0].repeat_interleave(2, 0)]
    for out in moved:
        assert type(out) is torch.Tensor


def test_a_saved_padded_tensor_could_not_be_loaded_with_weights_only(tmp_path):
    logits = reading_model()(TEXTS).detach()
    torch.save({"logits": logits, "mask": logits.attention_mask}, tmp_path / "logits.pt")
    for read in (torch.load(tmp_path / "logits.pt", weights_only=True)["logits"], pickle.loads(pickle.dumps(logits))):
        assert type(read) is torch.Tensor and torch.equal(read, logits.as_subclass(torch.Tensor))


@pytest.mark.parametrize(
    "by_column",
    [
        lambda x: x.select(1, -1),
        lambda x: x.narrow(1, 0, 2),
        lambda x: x.index_select(dim=1, index=torch.tensor([0])),
        lambda x: x.__setitem__((slice(None), -1), 0.0),
    ],
)
def test_what_would_count_padding_among_the_positions_is_refused(by_column):
    with torch.no_grad(), refused(InputError, "would count padding among the positions"):
        by_column(reading_model()(TEXTS))


def test_a_stream_that_goes_on_keeps_its_mask(given):
    """model(model(texts, stop_at_layer=1), start_at_layer=1) took padding for tokens."""
    model, inputs = given
    stream = model(**inputs, stop_at_layer=1)
    assert same(model(stream, start_at_layer=1)[:, -1], model(**inputs)[:, -1])
    assert same(model.read_out(stream)[:, -1], model.read_out(stream[:, -1:])[:, -1])


def test_logits_at_counts_real_tokens_from_both_ends(given):
    model, inputs = given
    for at in (0, -1, 2, [1, -2]):
        logits = model(**inputs, logits_at=at)
        assert type(logits) is torch.Tensor
        for row, text in enumerate(TEXTS):
            assert same(logits[row, 0], model(text)[0, at if isinstance(at, int) else at[row]])
    with refused(InputError, "pos 3 asked for; a row with 3 real tokens"):
        model(**inputs, logits_at=3)


def test_compiled_and_mapped_passes_give_plain_tensors():
    model = reading_model()
    ids, mask = model.to_tokens(TEXTS, return_mask=True)
    mapped = torch.func.vmap(lambda row, real: model(row[None], attention_mask=real[None])[0])(ids, mask)
    assert type(mapped) is torch.Tensor
    assert same(mapped[0, 2], model("abc")[0, -1])


# generation


def test_a_captured_row_was_another_prompt():
    """Of three prompts the first stopped at once: step 2 had two rows, and row 0 was prompt 1."""
    model = tiny_model(dtype=torch.float64)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    first = model.generate(prompts, 1).new_tokens
    stop = int(first[0])
    others = [i for i in (1, 2) if int(first[i]) != stop]
    assert others
    out = model.generate(prompts, 4, stop=stop, capture={0: "resid_post", 2: "resid_post"})
    assert out.stopped[0] and len(out.new_tokens[0]) == 1
    assert out.caches[2]["resid_post", 0].shape[0] == 3
    free = model.generate(prompts, 4, stop=stop)
    assert all(torch.equal(a, b) for a, b in zip(out.new_tokens, free.new_tokens, strict=True))
    for row in others:
        if len(out.new_tokens[row]) < 3:
            continue
        read = torch.cat([out.prompts[row], out.new_tokens[row][:2]])
        _, alone = model.run_with_cache(read[None], "resid_post")
        for layer in range(2):
            assert same(out.caches[2].slice(pos=-1)["resid_post", layer][row], alone["resid_post", layer][0, -1])


def test_captures_while_generating_say_which_positions_are_padding():
    model = tiny_model(dtype=torch.float64)
    prompts = [[1, 2, 3, 4], [5, 6]]
    out = model.generate(prompts, 2, capture={0: ["resid_post", "pattern"], 1: "resid_post"})
    assert out.caches[0].attention_mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert out.caches[1].attention_mask.tolist() == [[True] * 5, [False, False, True, True, True]]
    for row, prompt in enumerate(prompts):
        _, alone = model.run_with_cache([prompt], "resid_post")
        for pos in (-1, 0, 1):
            got = out.caches[0].slice(pos=pos)["resid_post", 1][row]
            assert same(got, alone["resid_post", 1][0, pos])
    assert out.caches[1].slice(pos=-1)["resid_post", 1].shape == (2, 8)


def test_a_hook_attached_when_prompts_have_left_the_batch_is_refused():
    """It saw a batch of fewer rows than prompts, and no word of which they were."""
    model = tiny_model()
    batch = _Batch(model, [torch.tensor([1, 2]), torch.tensor([3])], None)
    with torch.no_grad():
        batch.feed(batch.logits().argmax(-1), [False, True])
        assert batch.rows == [1]
        with model.hooks([("z", lambda z, hook: None)]), refused(InputError, "then every prompt keeps its row"):
            batch.logits()


@pytest.mark.parametrize(
    "mask", [torch.zeros(1, 3), [[0.0, 0.0, float("-inf")]], [[1, 2, 0]], [[1, -1, 0]], "a", [["a"]]]
)
def test_a_mask_that_is_added_to_scores_was_read_the_wrong_way_round(mask):
    """0 at real tokens, as some libraries have it, meant padding."""
    with refused(HooklensError, "attention_mask is 1"):
        reading_model()([[1, 2, 3]], attention_mask=mask)

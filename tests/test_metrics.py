"""Metrics: their values, what they say they read, and what they refuse."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.zoo import zoo_model
from refused import refused
from torch import Tensor

import hooklens as hl
from hooklens.core.errors import InputError, WrongType
from hooklens.metrics import AtPosition, ReadingMetric, answer_ids, kl_divergence
from hooklens.model.config import Biases
from hooklens.testing import tiny_model

MODEL = tiny_model()
TOKENS = torch.tensor([[1, 5, 2, 7], [4, 4, 9, 0], [3, 3, 3, 3]])
LOGITS = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

BUILT_IN = {
    "logit_diff": (
        lambda: hl.logit_diff(MODEL, answer=[1, 2, 3], wrong_answer=4),
        lambda x, i: x[i, -1, [1, 2, 3][i]] - x[i, -1, 4],
    ),
    "logit_diff, position": (
        lambda: hl.logit_diff(MODEL, answer=1, wrong_answer=[4, 5, 6], pos=[0, -2, 3]),
        lambda x, i: x[i, [0, -2, 3][i], 1] - x[i, [0, -2, 3][i], [4, 5, 6][i]],
    ),
    "prob": (lambda: hl.prob(MODEL, answer=[1, 2, 3]), lambda x, i: x[i, -1].softmax(-1)[[1, 2, 3][i]]),
    "log_prob": (lambda: hl.log_prob(MODEL, answer=2, pos=1), lambda x, i: x[i, 1].log_softmax(-1)[2]),
    "loss": (
        lambda: hl.loss(MODEL, TOKENS),
        lambda x, i: -torch.nn.functional.cross_entropy(x[i, :-1], TOKENS[i, 1:]),
    ),
    "kl": (
        lambda: hl.kl(MODEL, TOKENS),
        lambda x, i: (
            -torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=MODEL(TOKENS)[i, -1].double().detach()),
                torch.distributions.Categorical(logits=x[i, -1]),
            )
        ),
    ),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_values(name):
    make, expected = BUILT_IN[name]
    want = torch.stack([expected(LOGITS, i) for i in range(3)])
    torch.testing.assert_close(make()(LOGITS), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_on_read_of_what_it_reads_is_the_metric(name):
    metric = BUILT_IN[name][0]()
    assert isinstance(metric, ReadingMetric)
    metric = metric.pairs(torch.arange(3))  # one answer for all becomes one a pair
    pos, tokens = metric.reads
    read = torch.stack([LOGITS[i, pos[i]] for i in range(3)])
    if tokens is not None:
        read = torch.stack([read[i, :, tokens[i]] for i in range(3)])
    torch.testing.assert_close(metric.on_read(read), metric(LOGITS))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(name=st.sampled_from(list(BUILT_IN)), rows=st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_pairs_chooses_rows(name, rows):
    """In any order, any number of times: what a sweep asks of a metric whose rows it has mixed."""
    metric, index = BUILT_IN[name][0](), torch.tensor(rows)
    chosen = metric.pairs(index)
    assert len(chosen.reads.pos) == len(rows)
    pos, tokens = chosen.reads
    read = torch.stack([LOGITS[row, pos[i]] for i, row in enumerate(rows)])
    if tokens is not None:
        read = torch.stack([read[i, :, tokens[i]] for i in range(len(rows))])
    torch.testing.assert_close(chosen.on_read(read), metric(LOGITS)[index], atol=1e-12, rtol=1e-12)


def test_a_metric_of_one_pair_serves_any_number():
    metric = hl.logit_diff(MODEL, answer=1, wrong_answer=2)
    assert torch.equal(metric(LOGITS), LOGITS[:, -1, 1] - LOGITS[:, -1, 2])
    with pytest.raises(InputError, match="made for 2 pairs, but got logits of 3"):
        hl.prob(MODEL, answer=[1, 2])(LOGITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_metric_of_half_precision_logits_is_not_rounded_again(name, dtype):
    logits = (20 * LOGITS).to(dtype)
    found = BUILT_IN[name][0]()(logits)
    torch.testing.assert_close(found, BUILT_IN[name][0]()(logits.float()), atol=1e-6, rtol=1e-6)


def test_known_values():
    assert hl.kl(MODEL, TOKENS)(MODEL(TOKENS)).abs().max().item() < 1e-6
    zeros = torch.zeros(1, 4, 11)
    assert hl.prob(MODEL, answer=3)(zeros).item() == pytest.approx(1 / 11)
    assert hl.loss(MODEL, TOKENS[:1])(zeros).item() == pytest.approx(-torch.tensor(11.0).log().item())
    assert hl.recovered(torch.tensor([1.0, 2.0, 3.0]), clean=3.0, corrupted=1.0).tolist() == [0.0, 0.5, 1.0]


def test_a_soft_cap_is_in_what_is_read():
    """Both columns are capped, then subtracted: on a model with a final cap the metric is that of its own logits."""
    model, tokens = zoo_model("gemma2"), torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    metric = hl.logit_diff(model, answer=[5, 6], wrong_answer=[7, 8])
    sweep = hl.patch(model, tokens, tokens.flip(0), metric, by="layer")
    torch.testing.assert_close(sweep.clean_per_pair, metric(model(tokens)).detach(), atol=1e-5, rtol=1e-5)


def test_answers():
    assert answer_ids(MODEL, 3).tolist() == [3]
    assert answer_ids(MODEL, [3, 4]).tolist() == answer_ids(MODEL, torch.tensor([3, 4])).tolist() == [3, 4]
    assert answer_ids(MODEL, torch.tensor(3)).tolist() == [3]
    for wrong in (11, -1, [3, 11], [], torch.tensor([]).long()):
        with pytest.raises(InputError, match="between 0 and 10"):
            hl.prob(MODEL, answer=wrong)
    with pytest.raises(InputError, match="no tokenizer"):
        hl.prob(MODEL, answer=" Mary")
    for given_answers in ({"answer": [1, 2], "wrong_answer": [3, 4, 5]}, {"answer": [1, 2], "wrong_answer": 3}):
        with pytest.raises(InputError, match="one for all pairs or one per pair"):
            hl.logit_diff(MODEL, **given_answers, pos=[0, 1, 2])
    assert len(hl.prob(MODEL, answer=1, pos=[0, 1]).reads.pos) == 2


@pytest.mark.parametrize(
    "answer",
    [1.5, torch.tensor(1.5), [1, 2.0], None, [None], b"x", True, torch.ones(1, 2).long(), torch.ones(2, 1).long(), {1}],
)
def test_an_answer_that_is_no_token_is_refused(answer):
    """1.5 was taken as token 1."""
    with refused(WrongType, "answer must be a token, its text or its id"):
        hl.logit_diff(MODEL, answer=answer, wrong_answer=4)


def test_a_metric_of_another_kind_of_model_says_what_it_needs():
    with refused(WrongType, "needs a HookedTransformer, got WrappedModule"):
        hl.prob(hl.wrap(torch.nn.Linear(2, 2)), answer=1)


def test_texts():
    from hooklens.pretrained.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = tiny_model(d_vocab=len(tokenizer)) if hasattr(tokenizer, "__len__") else tiny_model(d_vocab=600)
    model.tokenizer = tokenizer
    with pytest.raises(InputError, match=r"tokens"):
        hl.prob(model, answer="a long text of several tokens")
    metric = hl.logit_diff(model, answer=["a", "b"], wrong_answer="c")
    ids = [model.to_single_token(text) for text in "abc"]
    assert metric.reads.tokens.tolist() == [[ids[0], ids[2]], [ids[1], ids[2]]]
    sweep = hl.patch(model, ["abc", "abd"], ["acc", "add"], metric)
    assert sweep.labels["pos"][1] == "b |c"
    with pytest.raises(InputError, match="first difference at 1"):
        hl.patch(model, "abc", "acdc", hl.prob(model, answer="a"))
    for prompts in (("", "a"), ("a", ""), ("", "")):
        with pytest.raises(InputError, match="the prompt '' is empty"):
            hl.patch(model, *prompts, hl.prob(model, answer="a"))
    torch.testing.assert_close(hl.loss(model, "abc").tokens, model.to_tokens("abc"))
    assert hl.loss(model, ["abc", "ab"]).pos.tolist() == [2, 1]


def test_loss_of_too_little():
    for tokens in ([[1]], torch.zeros(2, 1).long()):
        with pytest.raises(InputError, match="at least two tokens"):
            hl.loss(MODEL, tokens)
    assert hl.loss(MODEL, [[1, 2]]).tokens.tolist() == [[1, 2]]


def test_nothing_is_left_in_the_graph():
    metric = hl.kl(MODEL, TOKENS)
    assert not metric.log_probs.requires_grad


def plain(logits: Tensor) -> Tensor:
    return logits[:, -1, 0]


def test_a_function_is_no_reading_metric():
    assert not isinstance(plain, ReadingMetric)


@pytest.mark.parametrize("make", [hl.loss, hl.kl, lambda first, tokens: hl.prob(first, answer=tokens[0, 0])])
@pytest.mark.parametrize("first", [LOGITS, torch.nn.Linear(2, 2)])
def test_logits_in_place_of_the_model_are_refused_where_a_metric_is_made(make, first):
    """`hl.loss(logits, tokens)` handed back a metric."""
    with refused(WrongType, f"needs a HookedTransformer, got {type(first).__name__}"):
        make(first, TOKENS)


# padding


def reading_model(**changes):
    from hooklens.pretrained.tokenizer import tiny_tokenizer

    model = tiny_model(d_vocab=256, dtype=torch.float64, **changes)
    model.tokenizer = tiny_tokenizer()
    return model


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_counted_padding_and_refused_texts_of_different_length(side):
    """It was -2.166 for a prompt that alone has -1.980."""
    model, texts = reading_model(), ["abc", "abcdefgh", "xy"]
    ids, mask = model.to_tokens(texts, return_mask=True, padding_side=side)
    logits = model(ids, attention_mask=mask)
    alone = torch.cat([hl.loss(model, text)(model(text)) for text in texts])
    for metric in (hl.loss(model, texts), hl.loss(model, ids, attention_mask=mask), hl.loss(model, ids)):
        torch.testing.assert_close(metric(logits), alone, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(metric.pairs(torch.tensor([2, 0]))(logits[[2, 0]]), alone[[2, 0]])
    torch.testing.assert_close(hl.loss(model, texts)(model(texts)), alone, atol=1e-12, rtol=1e-12)
    with refused(InputError, r"made for prompts of \[2, 2, 2\] tokens, but got logits of \[3, 8, 2\]"):
        hl.loss(model, ["ab", "ab", "xy"])(logits)
    with refused(InputError, "at least two tokens, got .* real tokens"):
        hl.loss(model, ids, attention_mask=mask & mask.cumsum(1).eq(1))


def test_a_sweep_reads_the_loss_of_each_prompt_over_its_own_tokens():
    model, clean, corrupted = reading_model(), ["abc", "abcdefgh", "xyz"], ["abd", "abcdxfgh", "xyw"]
    sweep = hl.patch(model, clean, corrupted, hl.loss(model, clean), by="layer")
    for i, (one, other) in enumerate(zip(clean, corrupted, strict=True)):
        alone = hl.patch(model, one, other, hl.loss(model, one), by="layer")
        torch.testing.assert_close(sweep.per_pair[i], alone.per_pair[0], atol=1e-10, rtol=1e-10)


def test_kl_of_padded_ids_reads_the_last_real_token():
    model, texts = reading_model(), ["abc", "abcdefgh"]
    ids, mask = model.to_tokens(texts, return_mask=True)
    expected = torch.cat([hl.kl(model, text).log_probs for text in texts])
    torch.testing.assert_close(hl.kl(model, ids, attention_mask=mask).log_probs, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(hl.kl(model, texts).log_probs, expected, atol=1e-12, rtol=1e-12)


# forbidden tokens


def forbidding(*tokens, value=float("-inf"), **changes):
    """A model that never says these tokens."""
    model = tiny_model(biases=Biases(unembed=True), **changes)
    with torch.no_grad():
        model.b_U[list(tokens)] = value
    return model


def test_kl_was_nan_where_a_token_is_forbidden_in_both_runs():
    model, without = forbidding(7), forbidding(7, value=-1e4)
    other = TOKENS.roll(1, 1)
    metric = hl.kl(model, TOKENS)
    expected = hl.kl(without, TOKENS)(without(other))
    torch.testing.assert_close(metric(model(other)), expected)
    assert (metric(model(TOKENS)).abs() < 1e-6).all()
    value = metric(model(other)).sum()
    value.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert hl.kl(tiny_model(biases=Biases(unembed=True)), TOKENS)(model(other)).eq(float("-inf")).all()
    assert hl.kl(model, TOKENS)(model(other) * float("nan")).isnan().all()


def test_patch_blamed_the_activations_where_a_token_is_forbidden():
    model, without = forbidding(7), forbidding(7, value=-1e4)
    clean, corrupted = TOKENS[:1], TOKENS[:1].roll(1, 1)
    sweep = hl.patch(model, clean, corrupted, hl.kl(model, clean))
    torch.testing.assert_close(sweep.values, hl.patch(without, clean, corrupted, hl.kl(without, clean)).values)
    with refused(InputError, "whether the model forbids a token that it reads"):
        hl.patch(model, clean, corrupted, hl.log_prob(model, answer=7))


def test_a_probability_too_small_to_write_does_not_hide_an_infinite_difference():
    target, said = torch.tensor([0.0, -200.0]), torch.tensor([0.0, float("-inf")])
    assert kl_divergence(target, said).item() == float("inf")
    assert kl_divergence(target, target).item() == 0.0


def test_fields_of_two_rows_are_no_metric_of_one_pair_or_of_three():
    @dataclass(frozen=True, eq=False)
    class Share(AtPosition):
        share: torch.Tensor

        def on_read(self, logits):
            return logits[:, 0, 0] * self.share

    metric = Share(pos=-1, share=torch.tensor([1.0, 2.0]))
    assert metric(LOGITS[:2]).tolist() == (LOGITS[:2, -1, 0] * torch.tensor([1.0, 2.0])).tolist()
    for n in (1, 3):
        with pytest.raises(InputError, match=f"made for 2 pairs, but got logits of {n}"):
            metric(LOGITS[:n])
    with pytest.raises(InputError, match="one row for each pair, or one for all; got 3 for pos, 2 for share"):
        Share(pos=[-1, -1, -1], share=torch.tensor([1.0, 2.0]))

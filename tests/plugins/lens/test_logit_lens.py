"""The logit lens: its last row is the model, its numbers those of whole logits, its controls other positions."""

import json
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.zoo import TOKENS, ZOO, zoo_model
from refused import refused
from torch import nn

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.model.config import Biases
from hooklens.plugins.lens import (
    TunedLens,
    direct_logit_attribution,
    fit_tuned_lens,
    measure_calibration,
    reading,
    trace_predictions,
    train_tuned_lens,
    tuned_lens,
)
from hooklens.plugins.lens.layer_lens import LogitLens, lens_logits, logit_lens
from hooklens.plugins.lens.reading import expected
from hooklens.results.result import plain
from hooklens.testing import induction_model, tiny_model

module = import_module("hooklens.plugins.lens.layer_lens")  # the package has a function of that name


def by_hand(model, tokens, answer):
    """Every number of a LogitLens from whole logits, the plain way."""
    logits = lens_logits(model, tokens).double()
    log_probs = logits.log_softmax(-1)
    own = log_probs.gather(-1, answer.expand(len(logits), *answer.shape)[..., None])
    larger, equal = (logits > logits.gather(-1, answer.expand_as(own[..., 0])[..., None])), log_probs == own
    final = log_probs[-1]
    return {
        "log_prob": own[..., 0],
        "rank": larger.sum(-1) + (equal.sum(-1) - 1) // 2,
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "kl": (final.exp() * (final - log_probs)).sum(-1),
        "top_log_probs": log_probs.topk(5).values,
    }


@pytest.mark.parametrize("name", ZOO)
def test_the_last_row_is_the_model(name):
    model = zoo_model(name)
    assert torch.equal(lens_logits(model, TOKENS)[-1], model(TOKENS))
    lens, log_probs = logit_lens(model, TOKENS), model(TOKENS).log_softmax(-1)
    top = log_probs.topk(5)
    assert torch.equal(lens.top_tokens[-1], top.indices) and torch.equal(lens.answer, top.indices[..., 0])
    torch.testing.assert_close(lens.top_log_probs[-1], top.values, atol=1e-5, rtol=1e-5)
    assert bool((lens.kl[-1] == 0).all()) and bool((lens.rank[-1] == 0).all())


@pytest.mark.parametrize("name", ["gpt2", "gpt2_bias_everywhere", "gemma2", "neox", "post", "bidirectional"])
def test_every_number_is_that_of_whole_logits(name, monkeypatch):
    model = zoo_model(name, dtype=torch.float64)
    answer = torch.tensor([[1, 2, 3, 4, 0], [0, 0, 1, 2, 4]])
    expected = by_hand(model, TOKENS, answer)
    whole, by_row = (reading._LOGITS_AT_ONCE, 2**20, 10**9), (40, 11, 0)  # counted by numpy, and by torch
    for logits_at_once, described_at_once, numpy_up_to in (whole, by_row):
        monkeypatch.setattr(reading, "_LOGITS_AT_ONCE", logits_at_once)
        monkeypatch.setattr(reading, "_DESCRIBED_AT_ONCE", described_at_once)
        monkeypatch.setattr(reading, "_NUMPY_COUNTS_UP_TO", numpy_up_to)
        lens = logit_lens(model, TOKENS, answer=answer)
        for field, value in expected.items():
            torch.testing.assert_close(getattr(lens, field).double(), value.double(), atol=1e-10, rtol=1e-10)


def test_streams_between_attention_and_mlp():
    model = zoo_model("llama", dtype=torch.float64)
    lens = logit_lens(model, TOKENS, incl_mid=True)
    assert lens.layers == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    _, cache = model.run_with_cache(TOKENS)
    expected = model.read_out(cache["resid_mid", 1]).log_softmax(-1).amax(-1)
    torch.testing.assert_close(lens.top_log_probs[3, ..., 0], expected, atol=1e-10, rtol=1e-10)
    with pytest.raises(InputError, match="have none"):
        logit_lens(zoo_model("neox"), TOKENS, incl_mid=True)


def test_ranks_found_elsewhere_are_those_of_the_same_answer_at_other_positions():
    model = zoo_model("gpt2", dtype=torch.float64)
    lens, logits = logit_lens(model, TOKENS), lens_logits(model, TOKENS).flatten(1, 2)
    answer = lens.answer.flatten()
    everywhere = (logits[:, None] > logits[:, :, answer].mT[..., None]).sum(-1)  # layer answer row
    found = lens.control_ranks.flatten(2)
    seen = 0
    for draw, layer, row in found.isfinite().nonzero().tolist():
        others = [r for r in range(len(answer)) if answer[r] != answer[row]]
        assert found[draw, layer, row] in everywhere[layer, row, others].tolist()
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("controls", [0, 1, 5])
def test_as_many_other_positions_are_controls_as_asked_for(controls):
    lens = logit_lens(tiny_model(), TOKENS, answer=7, controls=controls)
    assert lens.control_ranks.shape == (controls, *lens.rank.shape)
    assert bool(lens.control_rank.isfinite().all()) == (controls > 0)
    if controls:
        middle = lens.control_ranks.quantile(0.5, dim=0)
        torch.testing.assert_close(lens.control_rank, middle)


def test_a_number_of_controls_that_is_none_was_a_raw_error():
    with pytest.raises(InputError, match="controls"):
        logit_lens(tiny_model(), TOKENS, controls=-1)


def test_one_position_has_no_control():
    lens = logit_lens(tiny_model(), [[3]])
    assert bool(lens.control_rank.isnan().all()) and "nan" in str(lens.table())
    lens.figure().to_json()


def test_an_answer_asked_for_at_every_position_is_looked_for_at_all_others():
    lens = logit_lens(tiny_model(), TOKENS, answer=7)
    assert lens.answer.unique().tolist() == [7] and bool(lens.control_ranks.isfinite().all())


def test_induction_appears_after_the_last_block():
    lens = logit_lens(induction_model(), [[3, 1, 4, 9, 3]], answer=1)
    assert lens.rank[:, 0, -1].tolist() == [5, 5, 0]  # every token ties before: the middle of eleven
    assert lens.settled[0, -1] == 2
    assert lens.top_words(1).rows[-1] == ("final_post", "'1'")
    assert lens.table(1).rows[0][0] == "0_pre"


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(st.integers(0, 10), min_size=4, max_size=4), min_size=1, max_size=3))
def test_prompts_together_are_prompts_one_by_one(rows):
    model = tiny_model(dtype=torch.float64)
    together = logit_lens(model, rows, answer=3)
    for i, row in enumerate(rows):
        alone = logit_lens(model, [row], answer=3)
        for field in ("log_prob", "entropy", "kl", "top_log_probs"):
            torch.testing.assert_close(getattr(together, field)[:, i], getattr(alone, field)[:, 0], atol=1e-10, rtol=0)


def test_groups_of_prompts_that_do_not_fit_together(monkeypatch):
    model, tokens = tiny_model(), torch.arange(40).view(10, 4) % 11
    whole = logit_lens(model, tokens, answer=2)
    monkeypatch.setattr(reading, "_STREAMS_AT_ONCE", 400)
    parts = logit_lens(model, tokens, answer=2)
    for field in ("rank", "log_prob", "kl", "top_tokens"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field))
    assert parts.control_ranks.shape == whole.control_ranks.shape


def test_what_cannot_be_read_is_refused():
    model = tiny_model()
    with pytest.raises(InputError, match="prompts of one length"):
        logit_lens(model, [[1, 2], [1, 2, 3]])
    with pytest.raises(InputError, match="at least 1"):
        logit_lens(model, TOKENS, k=0)
    with pytest.raises(InputError, match=r"prompts' shape"):
        logit_lens(model, TOKENS, answer=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(InputError, match="one per prompt, got 3 for 2"):
        logit_lens(model, TOKENS, answer=[1, 2, 3])
    with pytest.raises(InputError, match="run it again with k=9"):
        logit_lens(model, TOKENS).top_words(9)
    with (
        model.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: None)]),
        pytest.raises(InputError, match="are active"),
    ):
        logit_lens(model, TOKENS)
    broken = tiny_model()
    with torch.no_grad():
        broken.blocks[1].mlp.out.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="row 2 of the lens"):
        logit_lens(broken, TOKENS)


def test_whole_logits_that_would_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(module, "_LARGEST", 300)
    with pytest.raises(InputError, match="use logit_lens"):
        lens_logits(tiny_model(), TOKENS)


def test_hooks_on_blocks_act_on_the_lens():
    model = tiny_model()
    with model.hooks(fwd_hooks=[(("z", 1), lambda z, hook: z * 0)]):
        edited, expected = logit_lens(model, TOKENS), model(TOKENS).log_softmax(-1).amax(-1)
    torch.testing.assert_close(edited.top_log_probs[-1, ..., 0], expected)
    assert not torch.equal(edited.top_log_probs, logit_lens(model, TOKENS).top_log_probs)


def test_a_model_that_drops_out_is_not_read():
    model = tiny_model()
    model.unembed.linear = nn.Sequential(nn.Dropout(0.1), model.unembed.linear)
    with pytest.raises(InputError, match=r"model.eval\(\)"):
        logit_lens(model, TOKENS)
    model.eval()
    logit_lens(model, TOKENS)


class Wrapped(nn.Module):
    """A linear layer inside another module, as LoRA wraps one."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.bias = linear, linear.bias

    def forward(self, x):
        return self.linear(x) + 0.1 * x.sum(-1, keepdim=True)


def test_a_wrapped_unembedding_is_called_as_it_is():
    model = tiny_model()
    model.unembed.linear = Wrapped(model.unembed.linear)
    assert torch.equal(lens_logits(model, TOKENS)[-1], model(TOKENS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_described_in_float32(dtype):
    lens = logit_lens(tiny_model(dtype=dtype), TOKENS)
    assert lens.kl.dtype == torch.float32 and bool(lens.kl.isfinite().all())


def test_saved_read_back_drawn(tmp_path):
    lens = logit_lens(tiny_model(), TOKENS)
    lens.save(tmp_path / "lens.safetensors")
    back = LogitLens.load(tmp_path / "lens.safetensors")
    assert back.words == lens.words and torch.equal(back.top_tokens, lens.top_tokens)
    json.dumps(lens.to_json(), allow_nan=False)
    trace = lens.figure(1).data[0]
    assert trace.text[0][0] == lens.words[int(lens.top_tokens[-1, 1, 0, 0])]
    assert trace.z.shape == (3, 5) and "elsewhere" in trace.hovertext[0][0]
    wide = logit_lens(tiny_model(n_ctx=64), torch.zeros(1, 50, dtype=torch.long)).figure().data[0]
    assert wide.texttemplate is None  # too many columns for words


PAIRS = hl.PromptPairs(TOKENS, TOKENS.flip(0), answer=[1, 2], wrong_answer=[3, 4], group=[7, 7])
LENSES = {
    "logit_lens": lambda model, tokens, **given: logit_lens(model, tokens, answer=given.get("answer")),
    "lens_logits": lambda model, tokens, **given: lens_logits(model, tokens),
    "tuned_lens": lambda model, tokens, **given: tuned_lens(model, tokens, TunedLens(2, 8), answer=given.get("answer")),
    "fit_tuned_lens": lambda model, tokens, **given: fit_tuned_lens(model, tokens)[1],
    "measure_calibration": lambda model, tokens, **given: measure_calibration(model, tokens),
    "trace_predictions": lambda model, tokens, **given: trace_predictions(model, tokens, **given),
    "direct_logit_attribution": lambda model, tokens, **given: direct_logit_attribution(model, tokens, **given),
}


@pytest.mark.parametrize("read", LENSES.values(), ids=LENSES)
def test_pairs_were_no_prompts_of_a_lens(read):
    """They stand for their clean prompts, their answers and their groups; a metric may hold the answers."""
    model = tiny_model()
    wanted = read(model, TOKENS, answer=[1, 2], wrong_answer=[3, 4], group=torch.tensor([7, 7]))
    metric = hl.logit_diff(model, answer=[1, 2], wrong_answer=[3, 4])
    for pairs in (PAIRS, hl.PromptPairs(TOKENS, None, metric, group=[7, 7])):
        assert plain(read(model, pairs)) == plain(wanted)


def test_an_answer_beside_pairs_replaces_theirs_and_one_is_needed():
    model, prompts = tiny_model(), hl.PromptPairs(TOKENS, None)
    assert trace_predictions(model, PAIRS, answer=5).answer == ["5", "5"]
    for method in (trace_predictions, direct_logit_attribution):
        for tokens in (TOKENS, prompts):
            with pytest.raises(InputError, match="answer is missing; give a token for all prompts or one per prompt"):
                method(model, tokens)
    assert torch.equal(logit_lens(model, prompts).answer, logit_lens(model, TOKENS).answer)  # the model's own


@pytest.mark.slow
def test_smollm2_says_mary_at_the_end_only():
    model = hl.load("smollm2-135m-instruct")
    lens = logit_lens(model, "When Mary and John went to the store, John gave a drink to", answer=" Mary")
    assert lens.rank[-1, 0, -1] == 0 and lens.rank[20, 0, -1] > 100
    assert lens.control_rank[-1, 0, -1] > 5
    logits = model("When Mary and John went to the store, John gave a drink to").log_softmax(-1)
    torch.testing.assert_close(
        lens.log_prob[-1, 0, -1], logits[0, -1, model.to_single_token(" Mary")], atol=1e-4, rtol=0
    )


# forbidden tokens


def forbidding(value):
    """Token 7 is never said: its logit is -inf, or so low that its probability is 0."""
    model = tiny_model(biases=Biases(unembed=True))
    with torch.no_grad():
        model.b_U[7] = value
    return model


TEXTS_WITHOUT = torch.randint(7, (6, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "read",
    [
        logit_lens,
        lambda model, tokens: trace_predictions(model, tokens, answer=3, wrong_answer=7),
        measure_calibration,
        lambda model, tokens: train_tuned_lens(model, tokens, steps=3)[1],
    ],
    ids=["logit_lens", "trajectory", "calibration", "tuned_lens"],
)
def test_models_that_forbid_a_token_were_refused(read):
    found, wanted = (vars(read(forbidding(value), TEXTS_WITHOUT)) for value in (float("-inf"), -1e4))
    for name, value in found.items():
        if isinstance(value, torch.Tensor) and name not in ("wrong_log_prob", "logit_diff"):
            torch.testing.assert_close(value, wanted[name], equal_nan=True, msg=name)


def test_forbidden_tokens_tie_with_each_other():
    model = forbidding(float("-inf"))
    with torch.no_grad():
        model.b_U[9] = float("-inf")
    path = trace_predictions(model, TEXTS_WITHOUT, answer=7)
    assert path.rank.eq(9).all() and path.log_prob.isneginf().all()  # of 11 tokens 9 lie above, and two tie


def test_a_token_that_the_model_alone_allows_makes_the_divergence_infinite():
    probs, z = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, float("-inf"), float("-inf")]])
    assert expected(probs, z).tolist() == [float("-inf")]
    assert expected(probs, z * float("nan")).isnan().all()


def test_where_every_row_says_the_same_no_other_row_is_a_control():
    model = tiny_model(biases=Biases(unembed=True))
    with torch.no_grad():
        model.unembed.linear.bias.copy_(50 * (torch.arange(11) == 7))  # the model's own answer is 7 everywhere
    own = logit_lens(model, TOKENS)
    assert own.answer.unique().tolist() == [7] and bool(own.control_ranks.isnan().all())
    given = logit_lens(model, TOKENS, answer=7)  # asked for everywhere, whatever a position says
    assert bool(given.control_ranks[: len(given.layers)].isfinite().any())


@pytest.mark.parametrize("k", [1.5, True, None, "2", 0])
def test_a_k_that_is_no_number_of_tokens_was_a_raw_error(k):
    with refused(InputError, "k is a whole number of at least 1, got"):
        logit_lens(tiny_model(), TOKENS, k=k)
    if k is None:
        with refused(InputError, "k is a whole number of at least 0, got None"):
            logit_lens(tiny_model(), TOKENS).top_words(k)


def test_under_autocast_lenses_stopped_with_an_error_of_an_index_put():
    model, texts = tiny_model(), torch.arange(12).view(2, 6) % 11
    tuned = TunedLens(n_layers=2, d_model=8)

    def read():
        followed, calibration = trace_predictions(model, texts, answer=3), measure_calibration(model, texts)
        return followed.log_prob, calibration.loss, calibration.entropy

    exact = read()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, lenses = read(), (logit_lens(model, texts, k=11), tuned_lens(model, texts, tuned, k=11))
    for value, other in zip(rounded, exact, strict=True):  # the model itself computes in half precision
        assert value.dtype == torch.float32 and 0 < float((value - other).abs().max()) < 0.1
    for lens in lenses:  # what is read from its logits is not rounded
        probs = lens.top_log_probs.exp()
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(lens.entropy))
        torch.testing.assert_close(lens.entropy, -(probs * lens.top_log_probs).sum(-1))

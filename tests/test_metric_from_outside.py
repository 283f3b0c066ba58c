"""A metric of somebody else's, in one file, that says what it reads: a sweep computes only that, and its numbers."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from close import close
from model.zoo import TOKENS, zoo_model

import hooklens as hl
from hooklens.core.errors import ArgumentError
from hooklens.metrics import AtPosition

CORRUPTED = TOKENS.roll(1, 1)


@dataclass(frozen=True, eq=False)
class Contrast(AtPosition):
    """The logit of a token above the mean of two others."""

    token: torch.Tensor
    others: torch.Tensor

    def read_tokens(self):
        return torch.cat([self.token[:, None], self.others], 1)

    def on_read(self, logits):
        one, *two = logits[:, 0].unbind(-1)
        return one - sum(two) / 2


METRIC = Contrast(torch.tensor([-1]), torch.tensor([3, 4]), torch.tensor([[5, 6], [7, 8]]))


def by_hand(logits):
    rows = torch.arange(2)
    others = logits[rows[:, None], -1, METRIC.others].mean(1)
    return logits[rows, -1, METRIC.token] - others


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2"])
@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_a_sweep_with_the_metric_equals_the_plain_function(name, site):
    model = zoo_model(name)
    with hl.engine(verify=1000):
        sweep = hl.patch(model, TOKENS, CORRUPTED, METRIC, site=site)
    assert close(sweep.per_pair, hl.patch(model, TOKENS, CORRUPTED, by_hand, site=site).per_pair, 1000)
    assert sweep.largest_error <= 1000 * torch.finfo(torch.float32).eps * float(sweep.values.abs().max())


def test_only_the_tokens_that_it_reads_are_unembedded(monkeypatch):
    """Where the vocabulary is read, on_read is given all of it; here three columns, whoever calls."""
    widths = []
    plain = Contrast.on_read
    monkeypatch.setattr(
        Contrast, "on_read", lambda self, logits: widths.append(logits.shape[-1]) or plain(self, logits)
    )
    hl.patch(zoo_model("gpt2"), TOKENS, CORRUPTED, METRIC)
    assert set(widths) == {3}


def test_its_values_are_part_of_what_a_resumed_sweep_is_known_by(tmp_path):
    model, path = zoo_model("gpt2"), tmp_path / "sweep"
    first = hl.patch(model, TOKENS, CORRUPTED, METRIC, resume=path)
    other = Contrast(METRIC.pos, torch.tensor([9, 9]), METRIC.others)
    with pytest.raises(hl.HooklensError, match="metric"):
        hl.patch(model, TOKENS, CORRUPTED, other, resume=path)
    again = hl.patch(model, TOKENS, CORRUPTED, METRIC, resume=path)
    assert torch.equal(again.per_pair, first.per_pair)


@pytest.mark.parametrize("pos", [-1, [-1], torch.tensor(-1)])
def test_a_position_as_a_number_or_a_list_ended_in_a_raw_error(pos):
    metric = Contrast(pos, METRIC.token, METRIC.others)
    model = zoo_model("gpt2")
    expected = hl.patch(model, TOKENS, CORRUPTED, METRIC)
    assert torch.equal(hl.patch(model, TOKENS, CORRUPTED, metric).per_pair, expected.per_pair)


@pytest.mark.parametrize("tokens", [[[3, 5], [4, 6]], torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 2)])
def test_tokens_that_are_none_ended_in_a_raw_error(tokens, monkeypatch):
    monkeypatch.setattr(Contrast, "read_tokens", lambda self: tokens)
    with pytest.raises(hl.HooklensError, match=r"read_tokens must return a tensor of token ids \[pair token\]"):
        hl.patch(zoo_model("gpt2"), TOKENS, CORRUPTED, METRIC)


def test_a_class_in_place_of_a_metric_ended_in_a_raw_error():
    with pytest.raises(hl.HooklensError, match="a metric is a function of logits"):
        hl.patch(zoo_model("gpt2"), TOKENS, CORRUPTED, Contrast)


def scored(logits, answer):
    return logits[:, -1, answer]


METHODS = {
    "patch": lambda model, metric: hl.patch(model, TOKENS, CORRUPTED, metric),
    "path_patch": lambda model, metric: hl.path_patch(model, TOKENS, CORRUPTED, metric),
    "pairs": lambda model, metric: hl.patch(model, hl.PromptPairs(TOKENS, CORRUPTED, METRIC), None, metric),
    "run_edges": lambda model, metric: hl.circuits.eap(model, TOKENS, CORRUPTED, metric),
    "knock_out_keys": lambda model, metric: hl.heads.knock_out_keys(model, TOKENS, metric),
    "mediation": lambda model, metric: hl.heads.measure_mediation(model, TOKENS, metric, ["L0H0"]),
    "redundancy": lambda model, metric: hl.heads.measure_redundancy(model, TOKENS, metric, ["L0H0", "L0H1"]),
    "gradients": lambda model, metric: hl.patching.integrated_gradients(model, TOKENS, metric, baseline="mean"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_metric_with_another_argument_ended_in_a_raw_error_after_the_model_had_run(method, monkeypatch):
    model = zoo_model("gpt2")
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    says = r"metric is called as f\(logits\), and scored\(logits, answer\) was given: missing.*'answer'.*partial"
    with pytest.raises(ArgumentError, match=says):
        METHODS[method](model, scored)


def test_a_function_with_a_default_or_one_that_takes_anything_is_a_metric():
    expected = hl.patch(zoo_model("gpt2"), TOKENS, CORRUPTED, partial(scored, answer=3)).values
    for metric in (lambda logits, k=3: scored(logits, k), lambda *args: scored(*args, 3)):
        torch.testing.assert_close(hl.patch(zoo_model("gpt2"), TOKENS, CORRUPTED, metric).values, expected)


@pytest.mark.parametrize("ask", [hl.patch, hl.ablate])
def test_a_function_to_write_that_takes_one_argument_ended_in_a_raw_error(ask, monkeypatch):
    model = zoo_model("gpt2")
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    given = (TOKENS, CORRUPTED, METRIC) if ask is hl.patch else (TOKENS, METRIC)
    says = r"value is called as f\(activation, point\), and <lambda>\(act\) was given: too many positional arguments"
    with pytest.raises(ArgumentError, match=says):
        ask(model, *given, value=lambda act: act * 0)

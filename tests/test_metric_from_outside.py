"""A metric of somebody else's, in one file, that says what it reads: a sweep computes only that, and its numbers."""

from dataclasses import dataclass

import pytest
import torch
from close import close
from model.zoo import TOKENS, zoo_model

import hooklens as hl
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

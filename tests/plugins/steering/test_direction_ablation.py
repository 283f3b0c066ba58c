"""Taking a direction out: against plain runs, a known answer, and random directions beside it."""

import pytest
import torch
from model.zoo import zoo_model

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.plugins.steering.direction_ablation import direction_ablation
from hooklens.plugins.steering.steer import ablate_direction
from hooklens.plugins.steering.variants import unit_controls
from hooklens.testing import induction_model, tiny_model

PROMPTS = [[1, 5, 2], [4, 9], [3, 3, 7]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox"])
@pytest.mark.parametrize("sites", [None, ("mlp_out", 1)])
def test_every_number_is_that_of_a_plain_ablated_run(name, sites):
    model = zoo_model(name, dtype=torch.float64)
    v = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    found = direction_ablation(model, PROMPTS, v, metric, sites=sites, controls=2, seed=4)
    for k, vector in enumerate([v, *unit_controls(2, v, 4)]):
        seen, paid = [], []
        with ablate_direction(model, vector, sites=sites):
            for prompt in PROMPTS:
                logits = model([prompt]).detach()
                seen.append(float(metric(logits)[0]))
                paid.append(float(-logits[0].log_softmax(-1)[range(len(prompt) - 1), prompt[1:]].mean()))
        ours = (
            (found.metric, found.neutral_loss)
            if k == 0
            else (found.random_metric[k - 1], found.random_neutral_loss[k - 1])
        )
        assert ours[0].tolist() == pytest.approx(seen, abs=1e-9) and ours[1].tolist() == pytest.approx(paid, abs=1e-9)


def test_the_induction_model_loses_its_answer_with_the_direction_that_carries_it():
    """L1H1 writes the next token to a slot of its own, which W_U reads: without that direction the logit is 0."""
    model, tokens = induction_model(dtype=torch.float64), [[3, 1, 4, 9, 3]]
    answer = model.W_U[:, 1].detach()
    found = direction_ablation(model, tokens, answer, lambda logits: logits[:, -1, 1], controls=19)
    assert found.base.item() == pytest.approx(10) and found.effect == pytest.approx(-10)
    assert found.p == pytest.approx(1 / 20) and found.random_effect.abs().max() < 5


def test_what_cannot_be_ablated_is_refused_with_a_reason():
    metric = lambda logits: logits[:, -1, 0]  # noqa: E731
    with pytest.raises((InputError, TypeError), match=r"one direction|'direction'"):
        direction_ablation(tiny_model(), PROMPTS[:1], torch.ones(2, 8), metric)
    with pytest.raises(InputError, match="post-norm"):
        direction_ablation(zoo_model("post"), PROMPTS[:1], torch.ones(8), metric)
    with pytest.raises(InputError, match="points nowhere"):
        direction_ablation(tiny_model(), PROMPTS[:1], torch.ones(8), metric, controls=torch.zeros(1, 8))
    with pytest.raises(InputError, match="a logit for every token"):
        direction_ablation(zoo_model("bidirectional"), PROMPTS[:1], torch.ones(8), metric)
    assert direction_ablation(
        zoo_model("post"), PROMPTS[:1], torch.ones(8), metric, sites="resid_pre"
    ).metric.isfinite()

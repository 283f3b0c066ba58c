"""Steps of training that differed from the formulas they are named after, recomputed here from the formulas."""

from fractions import Fraction

import pytest
import torch

from hooklens.data.batches import Batch, TrainingData, drawn_for
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.dropout import Dropout
from hooklens.model.transformer import HookedTransformer
from hooklens.training.loop import train
from hooklens.training.optimizers import SGD, Grokfast, OrthogonalGradient
from hooklens.training.schedules import Steps
from hooklens.training.training_settings import Settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_along_its_parameter_became_rounding_noise_of_full_length(dtype):
    """Equation 12 of Prieto et al. gives 0; rounding leaves a rest, which was scaled to the gradient's length."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, dtype=dtype, generator=generator)
    grads = values * torch.rand(1, dtype=dtype, generator=generator)
    single = [slice(i, i + 1) for i in range(200)]
    rule = OrthogonalGradient(inner=SGD(lr=1.0))
    rule.prepare(grads, values, {}, [*single, slice(200, 400)])
    assert torch.equal(grads, torch.zeros_like(grads))


def test_a_zero_parameter_in_half_precision_gave_nan_as_its_orthogonal_gradient():
    values, grads = torch.zeros(4, dtype=torch.float16), torch.ones(4, dtype=torch.float16)
    OrthogonalGradient().prepare(grads, values, {}, [slice(0, 4)])
    assert grads.tolist() == [1, 1, 1, 1]


def test_the_slow_gradient_begins_at_zero_as_its_impulse_response_says():
    """lambda (1 - alpha) alpha^t, the response of algorithm 2 to a single gradient at t = 0."""
    rule, slots, values = Grokfast(inner=SGD(), decay=0.8, amplify=3.0), {}, torch.zeros(1, dtype=torch.float64)
    slots = {name: torch.zeros(1, dtype=torch.float64) for name in rule.kept}
    for t in range(5):
        grads = torch.tensor([float(t == 0)], dtype=torch.float64)
        rule.prepare(grads, values, slots, [slice(0, 1)])
        assert float(grads) == pytest.approx((t == 0) + 3.0 * 0.2 * 0.8**t, rel=1e-14)


@pytest.mark.slow
def test_a_step_schedule_changed_one_step_late_where_a_product_of_floats_is_too_large():
    late = []
    for fraction in ("0.1", "0.3", "0.55", "0.6", "0.7", "0.9"):
        for steps in range(1, 300):
            factors = [Steps(at=(float(fraction),), gamma=0.5).factor(step, steps) for step in range(steps)]
            exact = [1.0 if step < Fraction(fraction) * steps else 0.5 for step in range(steps)]
            late += [(fraction, steps)] * (factors != exact)
    assert late == []


class Rows(TrainingData):
    """Random tokens that also keep the numbers from which they were drawn."""

    seed = 0

    def batch(self, step, size):
        tokens = torch.randint(5, (size, 4), generator=drawn_for(self.seed, step))
        return Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))

    def held_out(self, size):
        yield from ()

    def description(self):
        return "nothing"

    def identity(self):
        return {"task": "random rows"}


def test_dropout_masks_were_made_of_the_numbers_that_had_drawn_the_data(monkeypatch):
    seen, forward = [], Dropout.forward

    def noted(self, x):
        dropped = forward(self, torch.ones_like(x))
        seen.append(dropped == 0)
        return x

    monkeypatch.setattr(Dropout, "forward", noted)
    cfg = HookedTransformerConfig(n_layers=1, d_model=16, n_ctx=4, n_heads=1, d_vocab=5, dropout=0.5)
    for step in range(2):
        seen.clear()
        train(HookedTransformer(cfg, seed=0), Rows(), steps=step + 1, settings=Settings(batch=2, schedule="constant"))
        mask = seen[-4] if len(seen) == 4 * (step + 1) else None
        assert mask is not None
        for nth in range(3):
            same = torch.rand(mask.shape, generator=drawn_for(Rows.seed, nth)) < 0.5
            assert not torch.equal(mask, same)

"""Optimisers against torch's, and the properties that the wrappers are named after."""

import pytest
import torch

from hooklens.core.errors import HooklensError
from hooklens.training.optimizers import SGD, Adam, AdamW, Grokfast, OrthogonalGradient, Wrapper


def steps_of(rule, n=30, size=300_000):
    """The values after `n` steps on seeded gradients, ours and those of torch's optimiser made by `theirs`."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size, dtype=torch.float64, generator=generator)
    slots = {name: torch.zeros_like(values) for name in rule.kept}
    for t in range(1, n + 1):
        gradient = torch.randn(size, dtype=torch.float64, generator=generator) + 0.1 * values
        yield values, gradient
        rule.step(
            values, gradient.clone(), slots, t=t, rate=rule.lr, spans=[slice(0, size // 2), slice(size // 2, size)]
        )
    yield values, None


PEERS = [
    (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (
        SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    (
        SGD(lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    (Adam(lr=0.1, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1)),
    (AdamW(lr=0.1, betas=(0.8, 0.95)), lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.95), weight_decay=0.01)),
]


@pytest.mark.parametrize(("rule", "theirs"), PEERS, ids=lambda value: getattr(value, "name", ""))
def test_equal_to_torch_to_1e_12(rule, theirs):
    peer = torch.nn.Parameter(next(steps_of(rule))[0].clone())
    optimizer = theirs([peer])
    for values, gradient in steps_of(rule):
        assert (values - peer.detach()).abs().max() < 1e-12
        if gradient is not None:
            peer.grad = gradient
            optimizer.step()


def test_the_orthogonal_gradient_is_orthogonal_to_each_parameter_and_as_long_as_before():
    values, grads = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spans, before = [slice(0, 10), slice(10, 40)], grads.clone()
    OrthogonalGradient().prepare(grads, values, {}, spans)
    for span in spans:
        assert abs(float(values[span] @ grads[span])) < 1e-12 * float(values[span].norm() * before[span].norm())
        assert float(grads[span].norm()) == pytest.approx(float(before[span].norm()), rel=1e-12)
    assert (grads - before).abs().max() > 0.01


def test_grokfast_amplifies_a_constant_gradient_by_one_plus_lambda_in_the_end():
    rule = Grokfast(inner=SGD(lr=1.0), decay=0.5, amplify=2.0)
    slots, values = {name: torch.zeros(3) for name in rule.kept}, torch.zeros(3)
    for t in range(1, 60):
        grads = torch.ones(3)
        rule.step(values, grads, slots, t=t, rate=1.0, spans=[slice(0, 3)])
        if t == 1:
            assert torch.allclose(grads, torch.full((3,), -(1 + 2.0 * 0.5)))
    assert torch.allclose(grads, torch.full((3,), -3.0))


def test_wrappers_nest_and_their_rate_is_that_of_the_rule_inside():
    rule = Grokfast(inner=OrthogonalGradient(inner=AdamW(lr=0.25)))
    assert isinstance(rule.inner, Wrapper)
    assert (rule.lr, rule.kept) == (0.25, ("slow", "first", "second"))


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 1.0), (-0.1, 0.9)])
def test_betas_out_of_range_are_refused(betas):
    with pytest.raises(HooklensError, match="betas are two numbers"):
        Adam(betas=betas)

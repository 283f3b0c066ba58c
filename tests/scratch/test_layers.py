"""Gradients by hand are those of autograd and of finite differences; what does not fit is refused."""

import pytest
import torch
from refused import refused

from hooklens.core.errors import CheckFailed, InputError, WrongType
from hooklens.scratch import (
    GELU,
    Layer,
    Linear,
    ReLU,
    Sequential,
    TiedAutoencoder,
    Trainer,
    cross_entropy,
    rings,
    squared_error,
)
from hooklens.training.optimizers import SGD, Adam

DOUBLE = {"dtype": torch.float64}


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), **DOUBLE)


MODELS = {
    "linear": lambda: Sequential(Linear(3, 2)),
    "relu": lambda: Sequential(Linear(3, 5), ReLU(), Linear(5, 2, seed=1)),
    "gelu": lambda: Sequential(Linear(3, 5), GELU(), Linear(5, 4, seed=1), GELU(), Linear(4, 2, seed=2)),
    "nested": lambda: Sequential(Sequential(Linear(3, 5), ReLU()), Sequential(Linear(5, 2, seed=1))),
    "directions": lambda: TiedAutoencoder(3, 2),
    "neurons": lambda: TiedAutoencoder(3, 2, hidden="relu", seed=4),
}


@pytest.fixture(params=MODELS)
def model(request):
    built = MODELS[request.param]()
    for i, part in enumerate(built.parts()):  # biases that are not 0, so that their place matters
        if part.parameters:
            part.parameters["b"] += 0.1 * rows(1, len(part.parameters["b"]), seed=9 + i)[0]
    return built


def leaves(model):
    return [(part, name) for part in model.parts() for name in part.parameters]


def test_gradients_equal_those_of_autograd(model):
    x = rows(7, 3).requires_grad_()
    tensors = [part.parameters[name].requires_grad_() for part, name in leaves(model)]
    y = model.compute(x) if isinstance(model, TiedAutoencoder) else model.forward(x)
    seen = rows(*y.shape, seed=3)
    expected = torch.autograd.grad((y * seen).sum(), [x, *tensors])
    with torch.no_grad():
        model.forward(x)
        by_hand = [model.backward(seen), *(part.gradients[name] for part, name in leaves(model))]
    for ours, theirs in zip(by_hand, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences(model):
    x, step = rows(6, 3, seed=1), 1e-6
    target = rows(*model.forward(x).shape, seed=2)
    model.backward(squared_error(model.forward(x), target)[1])
    for part, name in leaves(model):
        parameter, gradient = part.parameters[name].view(-1), part.gradients[name].reshape(-1)
        for i in range(len(parameter)):
            before, ends = parameter[i].clone(), []
            for sign in (1, -1):
                parameter[i] = before + sign * step
                ends.append(squared_error(model.forward(x), target)[0])
            parameter[i] = before
            assert float(gradient[i]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("ours, theirs", [(ReLU(), torch.relu), (GELU(), torch.nn.functional.gelu)])
def test_nonlinearities_equal_those_of_torch(ours, theirs):
    x = torch.tensor([[-30.0, -1.0, 0.0, 0.5, 30.0]], **DOUBLE)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(theirs(x).sum(), x)
    assert torch.allclose(ours.forward(x), theirs(x), rtol=1e-14, atol=1e-15)
    assert torch.allclose(ours.backward(torch.ones_like(x)), expected, rtol=1e-14, atol=1e-15)


def test_losses_and_their_gradients_equal_those_of_torch():
    y, classes = rows(6, 4).requires_grad_(), torch.tensor([0, 3, 1, 1, 2, 0])
    for ours, theirs, target in (
        (cross_entropy, torch.nn.functional.cross_entropy, classes),
        (squared_error, lambda y, t: (y - t).square().sum(1).mean() / 2, rows(6, 4, seed=1)),
    ):
        value, gradient = ours(y.detach(), target)
        expected = theirs(y, target)
        assert value == pytest.approx(expected.item(), rel=1e-13)
        assert torch.allclose(gradient, torch.autograd.grad(expected, y)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule, peer", [
    (SGD(lr=0.1, momentum=0.9), lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9)),
    (Adam(lr=0.01), lambda tensors: torch.optim.Adam(tensors, lr=0.01)),
])  # fmt: skip
def test_training_follows_torch_step_by_step(rule, peer):
    x, y = rings(32)
    model = Sequential(Linear(2, 6), GELU(), Linear(6, 2, seed=1))
    tensors = {(part, name): part.parameters[name].clone().requires_grad_() for part, name in leaves(model)}
    (W1, b1, W2, b2), optimizer = tensors.values(), peer(list(tensors.values()))
    expected = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(torch.nn.functional.gelu(x @ W1 + b1) @ W2 + b2, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert Trainer(model, rule, cross_entropy).fit(x, y, steps=20) == pytest.approx(expected, rel=1e-10)
    assert all(not part.parameters[name].requires_grad for part, name in leaves(model))


def test_a_step_takes_no_norms_that_nobody_reads(monkeypatch):
    layer = Linear(2, 1, seed=0)
    monkeypatch.setattr(torch.Tensor, "norm", None)
    before = layer.parameters["W"].clone()
    Trainer(layer, Adam(lr=0.1)).step(torch.ones(3, 2).double(), torch.zeros(3, 1).double())
    assert torch.allclose((layer.parameters["W"] - before).abs(), torch.tensor(0.1).double())  # Adam's first step


def test_batches_come_from_the_seed_and_the_rows():
    x, y = rings(64)

    def losses(seed):
        model = Sequential(Linear(2, 8), ReLU(), Linear(8, 2, seed=1))
        return Trainer(model, loss=cross_entropy).fit(x, y, steps=60, batch=16, seed=seed)

    first = losses(0)
    assert first == losses(0) != losses(1) and sum(first[-10:]) < sum(first[:10]) / 2


def test_sizes_that_do_not_fit_are_refused():
    with refused(InputError, r"3 outputs cannot be followed by one of 4 inputs; use Linear\(3, 1\)"):
        Sequential(Linear(2, 3), ReLU(), Linear(4, 1))
    with refused(InputError, r"takes rows of 3 numbers \[row 3\], got shape \[5, 2\]"):
        Linear(3, 2).forward(torch.zeros(5, 2, **DOUBLE))
    with refused(InputError, r"got shape \[3\]"):
        Linear(3, 2).forward(torch.zeros(3, **DOUBLE))
    with refused(InputError, "parameters in torch.float64, got rows in torch.float32"):
        Linear(3, 2).forward(torch.zeros(5, 3))
    with refused(WrongType, "takes a tensor"):
        Linear(3, 2).forward([[1.0, 2.0, 3.0]])
    with refused(InputError, "n_out is a whole number of at least 1, got 0"):
        Linear(3, 0)
    with refused(WrongType, "Sequential takes layers"):
        Sequential(Linear(3, 2), torch.relu)
    with refused(InputError, "rows of 3 numbers"):
        TiedAutoencoder(3, 2).forward(torch.zeros(5, 4, **DOUBLE))


@pytest.mark.parametrize("layer", [Linear(3, 3), ReLU(), GELU(), TiedAutoencoder(3, 2)], ids=lambda x: type(x).__name__)
def test_backward_before_forward_and_with_another_shape_is_refused(layer):
    with refused(InputError, r"backward\(\) was called before forward\(\)"):
        layer.backward(torch.zeros(2, 3, **DOUBLE))
    layer.forward(torch.zeros(2, 3, **DOUBLE))
    with refused(InputError, r"shape of the last output, \[2, 3\], got \[4, 3\]"):
        layer.backward(torch.zeros(4, 3, **DOUBLE))


def test_a_layer_without_its_function_says_so():
    with refused(WrongType, r"Layer does not define compute"):
        Layer().forward(torch.zeros(1, 1))


@pytest.mark.parametrize("lr", [0.0, -0.1, float("nan"), float("inf")])
def test_a_learning_rate_that_is_not_above_zero_is_refused(lr):
    with refused(InputError, "(?i)learning rate|lr"):
        Trainer(Sequential(Linear(2, 1)), SGD(lr=lr))


def test_training_on_nothing_is_refused():
    trainer = Trainer(Sequential(Linear(2, 1)))
    with refused(InputError, "at least one row and one target for each, got 0 rows and 0 targets"):
        trainer.fit(torch.zeros(0, 2, **DOUBLE), torch.zeros(0, 1, **DOUBLE), steps=1)
    with refused(InputError, "got 3 rows and 2 targets"):
        trainer.fit(torch.zeros(3, 2, **DOUBLE), torch.zeros(2, 1, **DOUBLE), steps=1)
    with refused(InputError, "steps is a whole number of at least 1"):
        trainer.fit(torch.zeros(3, 2, **DOUBLE), torch.zeros(3, 1, **DOUBLE), steps=0)
    with refused(InputError, r"a single output per row is a column"):
        trainer.fit(torch.zeros(3, 2, **DOUBLE), torch.zeros(3, **DOUBLE), steps=1)


def test_classes_that_the_model_lacks_are_refused():
    with refused(InputError, "classes are 0 to 1, got 0 to 2"):
        cross_entropy(torch.zeros(2, 2, **DOUBLE), torch.tensor([0, 2]))
    with refused(InputError, r"torch.int64 of shape \[2\]"):
        cross_entropy(torch.zeros(2, 2, **DOUBLE), torch.zeros(2, **DOUBLE))


def test_a_diverging_loss_stops_the_training_and_leaves_the_parameters():
    x = rows(8, 1)
    model = Sequential(Linear(1, 1))
    with pytest.raises(CheckFailed, match=r"the loss is (inf|nan) after \d+ steps"):
        Trainer(model, SGD(lr=100.0)).fit(x, x, steps=500)
    with pytest.raises(CheckFailed, match="after 0 steps"):
        Trainer(Sequential(Linear(1, 1))).fit(x * float("nan"), x, steps=1)

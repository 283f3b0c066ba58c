"""What is dropped is free at once, by reference counting: the cyclic collector is switched off throughout."""

import asyncio
import gc
import weakref

import pytest
import torch
from torch import nn

import hooklens as hl
from hooklens.core.wrapping import wrap
from hooklens.plugins.patching.attribution_patching import attribution_patch
from hooklens.testing import tiny_model

TOKENS = torch.tensor([[1, 5, 2, 7]])
OTHER = torch.tensor([[1, 4, 2, 7]])
X = torch.ones(1, 4)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))


@pytest.fixture(autouse=True)
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def edit(act, hook):
    return act * 2


def cached(model, net):
    return model.run_with_cache(TOKENS)


def cached_with_gradients(model, net):
    logits, cache = model.run_with_cache(TOKENS, grads=True)
    logits.sum().backward()
    model.zero_grad()
    assert cache["resid_post", 0].shape == cache["resid_post_grad", 0].shape
    return logits, cache


def captured_in_a_block(model, net):
    scope, cache = model.capture()
    with scope:
        model(TOKENS)
    return scope, cache


def hooked(model, net):
    kept = []
    with model.hooks(fwd_hooks=[("z", lambda act, hook: kept.append(act))], bwd_hooks=[("z", edit)]):
        return model(TOKENS), kept


def run_with_backward_hooks(model, net):
    return model.run_with_hooks(TOKENS, bwd_hooks=[("z", edit)])


def generated(model, net):
    return model.generate([[1, 2, 3], [4]], 4, capture={0: "resid_post", 2: "z"})


def wrapped(model, net):
    return wrap(net).run_with_cache(X)


def wrapped_with_gradients(model, net):
    out, cache = wrap(net).run_with_cache(X, names=["0.hook_in", "1.hook_out#0"], grads=True)
    out.sum().backward()
    net.zero_grad()
    assert "1.hook_out_grad" in cache
    return out, cache


def attributed(model, net):
    return attribution_patch(model, TOKENS, OTHER, hl.logit_diff(model, answer=5, wrong_answer=6))


WORK = [
    *(cached, cached_with_gradients, captured_in_a_block, hooked, run_with_backward_hooks),
    *(generated, wrapped, wrapped_with_gradients, attributed),
]


@pytest.mark.slow
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_what_a_call_returned_is_free_when_it_is_dropped(model, net, work):
    work(model, net)  # what a first call keeps for later ones is no leak
    before = tensors()
    for _ in range(2):
        result = work(model, net)
        del result
    assert tensors() == before


def test_a_dropped_model_is_free_with_its_hooks_on_it():
    model = tiny_model()
    model.add_hook("z", edit)
    model.hook_embed.register_forward_hook(lambda point, args, out: None)
    model(TOKENS, logits_at=-1)
    gone = weakref.ref(model), weakref.ref(model.blocks[0].attn.hook_z)
    del model
    assert [ref() for ref in gone] == [None, None]


def test_a_dropped_wrapped_module_is_free_with_hooks_of_single_calls_on_it():
    module = nn.Sequential(nn.Linear(4, 4))
    wrap(module).add_hook("0.hook_out#0", edit)  # lives on the module, whatever becomes of what wrap returned
    plain = nn.functional.linear(X, module[0].weight, module[0].bias)
    assert torch.equal(module(X), plain * 2)
    gone = weakref.ref(module)
    del module
    assert gone() is None


def test_a_cache_keeps_its_model_for_as_long_as_it_lives_and_no_longer():
    cache = tiny_model().run_with_cache(TOKENS)[1]
    assert cache["resid_post", -1].shape == (1, 4, 8)
    gone = weakref.ref(cache.model)
    del cache
    assert gone() is None


def test_a_task_that_outlives_a_block_keeps_nothing_of_it(model):
    async def waits(outlived):
        await outlived.wait()

    async def main():
        outlived = asyncio.Event()
        scope, cache = model.capture()
        with scope:
            task = asyncio.create_task(waits(outlived))  # with a copy of this context
            await asyncio.sleep(0)
            model(TOKENS)
        gone = weakref.ref(cache["resid_post", 0])
        del scope, cache
        try:
            assert gone() is None
        finally:
            outlived.set()
            await task

    asyncio.run(main())


def test_gradients_that_arrive_after_the_cache_was_dropped_go_nowhere(model):
    logits, cache = model.run_with_cache(TOKENS, names="z", grads=True)
    del cache
    (gradient,) = torch.autograd.grad(logits.sum(), model.W_E)
    assert gradient.abs().sum() > 0

"""Scopes that end late, elsewhere or in another order than they began; threads, tasks, contexts."""

import asyncio
import contextvars
import gc
import threading

import pytest
import torch

import hooklens.core.hooks as hooks_module
from hooklens.core.errors import InputError
from hooklens.testing import tiny_model

TOKENS = torch.tensor([[1, 5, 2, 7]])


def plus(number):
    return [("blocks.0.hook_resid_post", lambda act, hook: act + number)]


@pytest.fixture
def model():
    model = tiny_model()
    # Somebody else's scope is open throughout: the count of open scopes, which is tested first, hides nothing.
    with tiny_model().hooks():
        yield model
    assert not hooks_module._open_scopes
    assert not any(scope.open for scope in hooks_module._scopes.get())


def in_thread(work):
    got = []
    thread = threading.Thread(target=lambda: got.append(work()))
    thread.start()
    thread.join()
    return got[0]


def test_two_threads_with_different_hooks_on_one_model_see_only_their_own(model):
    alone = {n: model.run_with_hooks(TOKENS, fwd_hooks=plus(n)) for n in (1.0, 2.0)}
    both_inside, inside_forward = threading.Barrier(2), threading.Barrier(2)
    got, seen = {}, {1.0: [], 2.0: []}

    def work(n):
        def meet(act, hook):  # both threads stand inside a forward pass, with both scopes open
            seen[n].append(hook.name)
            inside_forward.wait(10)

        with model.hooks(fwd_hooks=plus(n)), model.hooks(fwd_hooks=[("z", meet)]):
            both_inside.wait(10)
            got[n] = model(TOKENS)
            both_inside.wait(10)

    threads = [threading.Thread(target=work, args=(n,)) for n in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[n], alone[n]) for n in alone)
    assert seen[1.0] == seen[2.0] == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]


def test_a_scope_is_not_seen_in_a_thread_but_a_handle_is(model):
    plain = model(TOKENS)
    with model.hooks(fwd_hooks=plus(1.0)):
        assert torch.equal(in_thread(lambda: model(TOKENS)), plain)
    handle = model.add_hook(*plus(1.0)[0])
    assert torch.equal(in_thread(lambda: model(TOKENS)), model(TOKENS))
    assert not torch.equal(model(TOKENS), plain)
    handle.remove()
    assert torch.equal(in_thread(lambda: model(TOKENS)), plain)


def test_a_backward_hook_fires_in_another_thread_while_its_scope_is_open(model):
    fired = []
    with model.hooks(bwd_hooks=[(("z", 0), lambda grad, hook: fired.append(hook.name))]):
        loss = model(TOKENS).sum()
        in_thread(lambda: loss.backward(retain_graph=True))
        assert fired == ["blocks.0.attn.hook_z"]
    in_thread(loss.backward)
    assert len(fired) == 1


def test_scopes_that_overlap_end_in_any_order(model):
    plain, both = model(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=plus(1.0) + plus(2.0))
    first, second = model.hooks(fwd_hooks=plus(1.0)), model.hooks(fwd_hooks=plus(2.0))
    first.__enter__()
    second.__enter__()
    assert torch.equal(model(TOKENS), both)
    first.__exit__(None, None, None)
    assert torch.equal(model(TOKENS), model.run_with_hooks(TOKENS))
    assert not torch.equal(model(TOKENS), plain)
    second.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.equal(model(TOKENS), plain)


def test_an_open_scope_cannot_be_opened_again_but_a_closed_one_can(model):
    scope = model.hooks(fwd_hooks=plus(1.0))
    with scope, pytest.raises(InputError, match="already open"):
        scope.__enter__()
    once = model.run_with_hooks(TOKENS, fwd_hooks=plus(1.0))
    with scope:
        assert torch.equal(model(TOKENS), once)


def test_a_generator_that_is_abandoned_or_closed_late_leaks_nothing(model):
    plain = model(TOKENS)

    def steps():
        with model.hooks(fwd_hooks=plus(1.0)):
            yield model(TOKENS)
            yield model(TOKENS)

    stream, other = steps(), steps()
    next(stream)
    next(other)
    stream.close()
    del other
    gc.collect()
    assert torch.equal(model(TOKENS), plain)


def test_a_generator_closed_in_another_context_ends_its_hooks_everywhere(model):
    plain = model(TOKENS)

    def steps():
        with model.hooks(fwd_hooks=plus(1.0)):
            yield

    stream = steps()
    next(stream)
    contextvars.copy_context().run(stream.close)
    assert torch.equal(model(TOKENS), plain)


def test_a_scope_closed_elsewhere_and_opened_again_here_fires_once(model):
    scope = model.hooks(fwd_hooks=plus(1.0))
    once = model.run_with_hooks(TOKENS, fwd_hooks=plus(1.0))
    scope.__enter__()
    contextvars.copy_context().run(scope.__exit__, None, None, None)
    with scope:
        assert torch.equal(model(TOKENS), once)


def test_scopes_ended_elsewhere_do_not_pile_up(model):
    for _ in range(20):
        scope = model.hooks(fwd_hooks=plus(1.0))
        scope.__enter__()
        contextvars.copy_context().run(scope.__exit__, None, None, None)
    with model.hooks():
        assert len(hooks_module._scopes.get()) == 2


def test_a_task_that_outlives_its_creators_block_stops_seeing_its_hooks(model):
    plain, edited = model(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=plus(1.0))

    async def child(outlived):
        inside = model(TOKENS)
        await outlived.wait()
        return inside, model(TOKENS)

    async def main():
        outlived = asyncio.Event()
        with model.hooks(fwd_hooks=plus(1.0)):
            task = asyncio.create_task(child(outlived))
            await asyncio.sleep(0)
        outlived.set()
        return await task

    inside, after = asyncio.run(main())
    assert torch.equal(inside, edited) and torch.equal(after, plain)


def test_tasks_side_by_side_see_only_their_own(model):
    alone = {n: model.run_with_hooks(TOKENS, fwd_hooks=plus(n)) for n in (1.0, 2.0, 3.0)}

    async def work(n):
        with model.hooks(fwd_hooks=plus(n)):
            await asyncio.sleep(0)
            out = model(TOKENS)
            await asyncio.sleep(0)
            return out

    async def main():
        return await asyncio.gather(*(work(n) for n in alone))

    assert all(torch.equal(a, b) for a, b in zip(asyncio.run(main()), alone.values(), strict=True))


def test_handles_added_and_removed_in_many_threads_are_all_counted(model):
    point = model.hook_points()["blocks.0.attn.hook_z"]
    start = threading.Barrier(8)
    left = []

    def work():
        start.wait(10)
        handles = [model.add_hook(("z", 0), lambda act, hook: None) for _ in range(200)]
        for handle in handles[1:]:
            handle.remove()
        left.append(handles[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(point.handles) == 8
    for handle in left:
        handle.remove()
    assert not point.handles

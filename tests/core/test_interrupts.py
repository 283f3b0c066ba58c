"""Ctrl-C at any instruction of entering or leaving a block, or of adding or removing a hook, leaves nothing behind."""

import pytest
import torch
from interrupts import interrupted
from torch import nn

import hooklens.core.hooks as hooks_module
from hooklens.core.hooks import HookedModule, HookPoint, moment
from hooklens.core.wrapping import wrap
from hooklens.model.attention import differentiable_attention
from hooklens.model.linear import packed_linears
from hooklens.plugins.steering.steering_edit import StreamEdit
from hooklens.sweeps.settings import current, engine

FILES = ("core/hooks.py", "core/scope.py", "core/wrap.py", "model/linear.py", "model/attention.py", "steering/steer.py")
FILES += ("sweeps/settings.py", "nn/modules/module.py", "torch/utils/hooks.py")
KINDS = (hooks_module.HookScope, moment, differentiable_attention, packed_linears, engine)


class Net(HookedModule):
    def __init__(self):
        super().__init__()
        self.hook_a, self.hook_b = HookPoint(), HookPoint()
        self.name_points()

    def forward(self, x):
        return self.hook_b(self.hook_a(x))


NET, PLAIN = Net(), nn.Sequential(nn.ReLU())
WRAPPED = wrap(PLAIN)
WRAPPED.resolve("0.hook_in#0")


FIRED = []


def nothing(act, hook):
    FIRED.append(hook.name)


def in_block(make):
    def work():
        with make():
            pass

    return work


BLOCKS = {
    "hooks": lambda: NET.hooks(fwd_hooks=[("hook_a", nothing)], bwd_hooks=[("hook_b", nothing)]),
    "capture": lambda: NET.capture("hook_a")[0],
    "hooks of a wrapped module": lambda: WRAPPED.hooks(fwd_hooks=[(["0.hook_out", "0.hook_in#0"], nothing)]),
    "steering": lambda: StreamEdit(NET, [("hook_a", nothing)], "nothing"),
    "engine": lambda: engine(verify=7),
    "packed_linears": lambda: packed_linears(enabled=False),
    "differentiable_attention": differentiable_attention,
    "moment": lambda: moment(3, 4),
}


def left_behind() -> list[str]:
    """What an interrupted block or handle has left."""
    points = [*NET.hook_points().values(), *WRAPPED._points.values()]
    modules = list(PLAIN.modules())
    found = [kind.__name__ for kind in KINDS if kind.innermost() is not None or kind.anywhere]
    FIRED.clear()
    NET(torch.ones(1)), PLAIN(torch.ones(1))
    found += [f"a hook at {name}" for name in FIRED]
    found += [f"handle at {point.name}" for point in points if point.handles]
    found += [f"{point.name} is held" for point in points if getattr(point, "holders", None)]
    found += ["a torch hook" for m in modules if m._forward_hooks or m._forward_pre_hooks]
    found += ["torch's note of a hook" for m in modules if m._forward_pre_hooks_with_kwargs]
    return found + ["the engine's settings"] * (current().verify != 2)


@pytest.mark.parametrize("name", BLOCKS)
def test_ctrl_c_while_a_block_begins_or_ends_leaves_it_closed(name):
    tried = 0
    for where in interrupted(in_block(BLOCKS[name]), FILES):
        assert not left_behind(), where
        tried += 1
    assert tried > 40


@pytest.mark.parametrize(
    ("net", "where"), [(NET, "hook_a"), (WRAPPED, "0.hook_in")], ids=["a model", "a wrapped module"]
)
def test_ctrl_c_while_a_hook_is_added_or_removed_leaves_none(net, where):
    handles = []

    def work():
        handles.append(net.add_hook(where, nothing))
        handles.pop().remove()

    tried = 0
    for at in interrupted(work, FILES):
        # Before the first instruction of `remove` it has not been called: the handle is there, to be removed again.
        if "Handle.remove" not in at:
            assert not left_behind(), at
        net.reset_hooks()
        assert not left_behind(), at
        tried += 1
    assert tried > 40


def test_ctrl_c_in_a_wrapped_module_leaves_no_count_of_calls():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrap(Interrupted())(torch.ones(1))
    WRAPPED(torch.ones(1))
    seen = []
    with WRAPPED.hooks(fwd_hooks=[("0.hook_out", lambda act, hook: seen.append(hook.name))]):
        PLAIN(torch.ones(1))
        PLAIN(torch.ones(1))
    assert seen == ["0.hook_out"] * 2


def test_a_block_object_that_is_entered_twice_is_refused_and_does_not_keep_its_setting():
    block = engine(verify=7)
    with block, pytest.raises(ValueError, match="already open"), block:
        pass
    assert current().verify == 2
    with block:
        assert current().verify == 7
    assert current().verify == 2

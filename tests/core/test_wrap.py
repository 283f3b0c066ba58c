"""The same API on modules that know nothing of hooks: a transformers model, a convolutional net with in-place ReLU."""

import copy
import dataclasses
import inspect
import pickle
import threading
from typing import NamedTuple

import pytest
import torch
from close import close
from torch import nn

from hooklens.core.errors import HookError, InputError, NameNotFound
from hooklens.core.wrapping import wrap


class ConvNet(nn.Module):
    """Two convolutions, each overwritten in place by one shared ReLU; a residual sum in place; an unused head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head, self.unused = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x):
        first = self.relu(self.conv1(x))
        second = self.conv2(first)
        second += first
        return self.head(self.relu(second).mean((2, 3)))


def torch_hooks(module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return ConvNet()


@pytest.fixture
def images():
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16, bos_token_id=0, eos_token_id=0)
    ).eval()


TOKENS = torch.tensor([[1, 2, 3, 4]])


def test_every_module_that_is_called_has_two_points():
    net = wrap(nn.Sequential(nn.ModuleDict({"never_called": nn.Linear(1, 1)})["never_called"], nn.ReLU()))
    assert net.hook_names() == ["hook_in", "hook_out", "0.hook_in", "0.hook_out", "1.hook_in", "1.hook_out"]
    assert wrap(nn.ModuleList([nn.Linear(1, 1)])).hook_names() == ["0.hook_in", "0.hook_out"]
    with pytest.raises(TypeError, match=r"Module"):  # WrongType, or the executed annotation before it
        wrap(lambda x: x)


def test_wrapping_shares_the_module_and_leaves_it_as_it_was(conv, images):
    before, keys = conv(images), set(vars(conv))
    conv.eval()
    net = wrap(conv)
    assert net.module is conv and not net.training and torch_hooks(conv) == 0
    assert {id(p) for p in net.parameters()} == {id(p) for p in conv.parameters()}
    net.run_with_cache(images)
    assert torch_hooks(conv) == 0 and set(vars(conv)) == keys
    assert torch.equal(conv(images), before) and torch.equal(net(images), before)


def test_torchs_own_hooks_are_there_only_while_a_scope_is_open_or_a_handle_exists(conv):
    net = wrap(conv)
    with net.hooks(fwd_hooks=[("conv1.hook_out", lambda act, hook: None)]):
        assert torch_hooks(conv) == 2  # one more, at the module itself, says when in a generation it is called
        with net.capture(["conv1.hook_out", "conv2.hook_in"])[0]:
            assert torch_hooks(conv) == 3
        assert torch_hooks(conv) == 2
    assert torch_hooks(conv) == 0
    handle = net.add_hook("conv1.hook_out#1", lambda act, hook: None)
    assert torch_hooks(conv) == 2
    handle.remove()
    handle.remove()
    assert torch_hooks(conv) == 0
    net.add_hook("head.hook_in", lambda act, hook: None)
    net.reset_hooks()
    assert torch_hooks(conv) == 0


def test_captures_are_clones_so_an_in_place_relu_rewrites_none(conv, images):
    _, cache = wrap(conv).run_with_cache(images)
    first = conv.conv1(images)
    assert torch.equal(cache["conv1.hook_out"], first) and (first < 0).any()
    assert torch.equal(cache["relu.hook_in"], first) and torch.equal(cache["relu.hook_out"], first.relu())
    assert torch.equal(cache["conv2.hook_out"], conv.conv2(first.relu()))
    assert torch.equal(cache["hook_in"], images) and torch.equal(cache["hook_out"], conv(images))


def test_an_in_place_relu_does_not_overwrite_the_tensor_that_a_hook_returned(conv, images):
    mine = torch.randn(2, 2, 4, 4)
    kept = mine.clone()
    net = wrap(conv)
    out = net.run_with_hooks(images, fwd_hooks=[("conv1.hook_out", lambda act, hook: mine)])
    assert torch.equal(mine, kept)
    patched = net.run_with_hooks(images, fwd_hooks=[("conv2.hook_in", lambda act, hook: kept.relu())])
    assert not torch.equal(out, conv(images)) and out.shape == patched.shape


def test_repeated_calls_are_numbered_and_each_may_be_asked_for(conv, images):
    net = wrap(conv)
    seen = []
    plain = net.run_with_hooks(images, fwd_hooks=[("relu.hook_out", lambda act, hook: seen.append(hook.name))])
    assert seen == ["relu.hook_out", "relu.hook_out#1"]
    _, cache = net.run_with_cache(images, names=["relu.hook_out"])
    assert list(cache) == ["relu.hook_out", "relu.hook_out#1"]
    _, cache = net.run_with_cache(images, names=["relu.hook_in#1", "relu.hook_in#0"])
    assert list(cache) == ["relu.hook_in", "relu.hook_in#1"]
    double = lambda act, hook: act * 2  # noqa: E731
    second = net.run_with_hooks(images, fwd_hooks=[("relu.hook_out#1", double)])
    assert close(second - conv.head.bias, 2 * (plain - conv.head.bias), ulps=20)
    first = net.run_with_hooks(images, fwd_hooks=[("relu.hook_out#0", double)])
    assert not torch.allclose(first, second) and not torch.allclose(first, plain)
    assert net.hook_names() == wrap(conv).hook_names()
    assert not torch_hooks(conv)


def test_hooks_of_one_call_and_of_every_call_run_in_order_of_registration(conv, images):
    order = []
    note = lambda label: lambda act, hook: order.append(label)  # noqa: E731
    pairs = [("relu.hook_out#1", note("one")), ("relu.hook_out", note("every")), ("relu.hook_out#1", note("last"))]
    wrap(conv).run_with_hooks(images, fwd_hooks=pairs)
    assert order == ["every", "one", "every", "last"]


@pytest.mark.parametrize("point", ["unused.hook_in", "unused.hook_out", "relu.hook_out#2"])
def test_a_hooked_point_that_did_not_fire_raises_at_the_end_of_the_call_naming_it(conv, images, point):
    net, ran = wrap(conv), []
    hooks = [("hook_out", lambda act, hook: ran.append(1)), (point, lambda act, hook: act)]
    with pytest.raises(HookError, match=f"{point}' did not fire in this call"):
        net.run_with_hooks(images, fwd_hooks=hooks)
    assert ran and not torch_hooks(conv)
    with pytest.raises(HookError, match=f"{point}' did not fire"):
        net.run_with_cache(images, names=[point])
    with net.add_hook(point, lambda act, hook: act), pytest.raises(HookError, match=f"{point}' did not fire"):
        net(images)
    _, cache = net.run_with_cache(images)  # everything, whatever it is: nothing was asked for by name
    assert "unused.hook_in" not in cache and "head.hook_in" in cache


def test_unknown_points_raise_with_the_nearest(conv):
    with pytest.raises(NameNotFound, match=r"closest: .*conv1\.hook_out"):
        wrap(conv).hooks(fwd_hooks=[("conv.hook_out", print)])
    with pytest.raises(NameNotFound, match=r"closest: relu\.hook_out"):
        wrap(conv).hooks(fwd_hooks=[("rel.hook_out#1", print)])


def test_the_contract_holds_wrong_shapes_in_place_edits_exceptions(conv, images):
    net = wrap(conv)
    with pytest.raises(HookError, match=r"conv1\.hook_out returned float32 \[1, 2, 4, 4\]"):
        net.run_with_hooks(images, fwd_hooks=[("conv1.hook_out", lambda act, hook: act[:1])])

    def forgets(act, hook):
        act.zero_()

    with pytest.raises(HookError, match="in place and returned None"):
        net.run_with_hooks(images, fwd_hooks=[("conv1.hook_out", forgets)])

    def breaks(act, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        net.run_with_hooks(images, fwd_hooks=[("conv2.hook_in", breaks)])
    assert "at conv2.hook_in" in caught.value.__notes__[0] and torch_hooks(conv) == 0
    kept = images.clone()
    net.run_with_hooks(images, fwd_hooks=[("hook_in", lambda act, hook: act.zero_())])
    assert torch.equal(images, kept)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_cached_at_points_whose_tensor_is_overwritten_in_place(conv, images, frozen):
    conv.requires_grad_(not frozen)
    net = wrap(conv)
    out, cache = net.run_with_cache(images, names=["conv1.hook_out", "conv2.hook_out", "relu.hook_out"], grads=True)
    out.sum().backward()
    base = conv.conv1(images).detach()
    leaf = base.clone().requires_grad_()
    net.run_with_hooks(images, fwd_hooks=[("conv1.hook_out", lambda act, hook: leaf)]).sum().backward()
    assert close(cache["conv1.hook_out_grad"], leaf.grad, ulps=20)
    assert torch.equal(cache["conv1.hook_out"].detach(), base)
    assert set(cache) >= {"conv2.hook_out_grad", "relu.hook_out_grad", "relu.hook_out#1_grad"}


def test_backward_hooks_edit_gradients(conv, images):
    net = wrap(conv)
    net(images).sum().backward()
    plain = conv.conv1.weight.grad.clone()
    conv.zero_grad()
    net.run_with_hooks(images, bwd_hooks=[("conv1.hook_out", lambda grad, hook: grad * 3)]).sum().backward()
    assert torch.allclose(conv.conv1.weight.grad, 3 * plain, rtol=1e-5)


def test_a_thread_sees_only_its_own_hooks(conv, images):
    net, plain = wrap(conv), conv(images)
    got = []
    with net.hooks(fwd_hooks=[("conv1.hook_out", lambda act, hook: act * 0)]):
        thread = threading.Thread(target=lambda: got.append(net(images)))
        thread.start()
        thread.join()
        assert not torch.equal(net(images), plain)
    assert torch.equal(got[0], plain)


def test_copies_carry_no_hooks_and_can_be_hooked_themselves(conv, images):
    net, plain, fired = wrap(conv), conv(images), []
    with net.hooks(fwd_hooks=[("conv1.hook_out", lambda act, hook: act * 0)]):
        twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), wrap(copy.deepcopy(conv))]
        for twin in twins:
            assert torch.equal(twin(images), plain)
            twin.run_with_hooks(images, fwd_hooks=[("conv1.hook_out", lambda act, hook: fired.append(hook.name))])
    assert fired == ["conv1.hook_out"] * 3 and torch.equal(conv(images), plain)


class Pair(NamedTuple):
    label: str
    value: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Data:
    label: str
    value: torch.Tensor


@pytest.mark.parametrize("make", [Pair, Data, lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}])
def test_the_first_tensor_of_what_is_returned_is_the_point_and_containers_keep_their_type(make):
    class Returns(nn.Module):
        def forward(self, label, *, x):
            return make(label, x)

    net, x = wrap(Returns()), torch.ones(2)
    edits = [("hook_in", lambda act, hook: act * 3), ("hook_out", lambda act, hook: act + 1)]
    out = net.run_with_hooks("a", x=x, fwd_hooks=edits)
    plain = net("a", x=x)
    value = list(dataclasses.asdict(out).values() if isinstance(out, Data) else getattr(out, "values", lambda: out)())[
        1
    ]
    assert type(out) is type(plain) and value.tolist() == [4.0, 4.0] and x.tolist() == [1.0, 1.0]


def test_a_returned_value_without_a_tensor_fires_nothing():
    class Says(nn.Module):
        def forward(self, x):
            return "words"

    net = wrap(Says())
    assert net.run_with_hooks(torch.ones(1), fwd_hooks=[("hook_in", lambda act, hook: act)]) == "words"
    with pytest.raises(HookError, match="or returned no tensor"):
        net.run_with_hooks(torch.ones(1), fwd_hooks=[("hook_out", lambda act, hook: act)])


def test_a_transformers_model_has_the_same_api(gpt2):
    net = wrap(gpt2)
    with torch.no_grad():
        plain, streams = gpt2(TOKENS).logits, gpt2(TOKENS, output_hidden_states=True).hidden_states
        its_own = torch_hooks(gpt2)  # transformers keeps some, by which it collects hidden states
        out, cache = net.run_with_cache(input_ids=TOKENS)
        assert type(out) is type(gpt2(TOKENS)) and torch.equal(out.logits, plain)
        assert torch.equal(cache["hook_in"], TOKENS) and torch.equal(cache["hook_out"], plain)
        block = "transformer.h.0.hook_out"
        assert torch.equal(cache[block], streams[1])
        assert torch.equal(cache["transformer.h.1.hook_in"], cache[block])

        edited = net.run_with_hooks(TOKENS, fwd_hooks=[(block, lambda act, hook: act + 1)])
        assert not torch.allclose(edited.logits, plain)
        assert type(edited) is type(out) and torch.equal(edited[0], edited.logits)
        swapped = net.run_with_hooks(TOKENS, fwd_hooks=[("hook_out", lambda act, hook: act * 0)])
        assert (swapped.logits == 0).all() and (swapped["logits"] == 0).all()
        assert torch.equal(gpt2(TOKENS).logits, plain) and torch_hooks(gpt2) == its_own


def test_patching_a_transformers_model_at_every_layer_gives_the_clean_run(gpt2):
    net, corrupted = wrap(gpt2), TOKENS.flip(1)
    with torch.no_grad():
        clean, cache = net.run_with_cache(TOKENS, names="transformer.h.0.hook_out")
        patched = net.run_with_hooks(
            corrupted, fwd_hooks=[("transformer.h.0.hook_out", lambda act, hook: cache[hook.name])]
        )
    assert close(patched.logits, clean.logits, ulps=20)


def test_slicing_by_position_is_refused_where_the_axes_are_not_known(gpt2):
    _, cache = wrap(gpt2).run_with_cache(TOKENS, names="transformer.h.0.hook_out")
    with pytest.raises(InputError, match=r"axes of .* are unknown"):
        cache.slice(pos=0)


def test_hooks_of_a_transformers_model_are_told_the_step_of_its_own_generate(gpt2):
    net, told = wrap(gpt2), []

    def note(act, hook):
        told.append((hook.name, hook.step, hook.offset, hook.seen is None))

    points = ["transformer.h.1.hook_out", "hook_out"]
    with net.hooks(fwd_hooks=[(points, note)]):
        gpt2.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    steps = [(0, 0), (1, 4), (2, 5)]
    assert told == [(name, *step, True) for step in steps for name in points]
    told.clear()
    net.run_with_hooks(TOKENS, fwd_hooks=[(points[0], note)])  # another pass has another cache, or none
    assert told == [(points[0], 0, 0, True)] and not torch_hooks_of_ours(gpt2)


def torch_hooks_of_ours(module) -> int:
    from hooklens.core.wrapping import _TorchHook

    kinds = [hooks for m in module.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    return sum(isinstance(hook, _TorchHook) for hooks in kinds for hook in hooks.values())


def test_steps_of_a_wrapped_model_count_calls_with_one_cache_and_say_which_tokens_are_real(gpt2):
    from transformers import DynamicCache

    net, told = wrap(gpt2), []
    note = lambda act, hook: told.append(hook)  # noqa: E731
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    past, rows = DynamicCache(config=gpt2.config), TOKENS.expand(2, -1)
    with torch.no_grad():
        for step in range(3):  # a scope of its own each time
            at = rows if step == 0 else rows[:, :1]
            seen = torch.cat([mask, torch.ones(2, step, dtype=mask.dtype)], 1)
            hooks, name = [("transformer.h.0.hook_out", note)], "cache"
            if name not in inspect.signature(type(gpt2).forward).parameters:
                name = "past_key_values"  # transformers before its version 5.20 or so
            net.run_with_hooks(at, attention_mask=seen, **{name: past}, fwd_hooks=hooks)
    assert [(call.step, call.offset) for call in told] == [(0, 0), (1, 4), (2, 5)]
    assert told[1].seen.tolist() == [[False, True, True, True, True], [True] * 5]

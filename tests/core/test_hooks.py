"""The hook contract, sentence by sentence."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refused import refused
from torch import nn

import hooklens.core.hooks as hooks_module
from hooklens.core.errors import HookError, InputError, NameNotFound, WrongType
from hooklens.core.hooks import HookCall, HookedModule, HookPoint
from hooklens.core.names import site
from hooklens.testing import tiny_model

TOKENS = torch.tensor([[1, 5, 2, 7], [4, 4, 9, 0]])
POINT = "blocks.0.hook_resid_post"


class Net(HookedModule):
    """y = (w x + 1)^2, with a point before and one after the square."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))
        self.hook_a, self.hook_b = HookPoint(), HookPoint()
        self.name_points()

    def forward(self, x):
        return self.hook_b(self.hook_a(self.w * x + 1).square())


@pytest.fixture
def model():
    return tiny_model()


def clean_afterwards(model) -> bool:
    return not hooks_module._open_scopes and not any(p.handles or p.active() for p in model.hook_points().values())


def test_a_hook_edits_by_what_it_returns_and_None_leaves_the_activation_unchanged():
    net, x = Net(), torch.ones(2)
    assert net.run_with_hooks(x, fwd_hooks=[("a", lambda act, hook: act * 2)]).tolist() == [64.0, 64.0]
    assert net.run_with_hooks(x, fwd_hooks=[("a", lambda act, hook: None)]).tolist() == [16.0, 16.0]


def test_a_hook_is_told_its_point(model):
    seen = []
    model.run_with_hooks(TOKENS, fwd_hooks=[("z", lambda act, hook: seen.append((hook.name, hook.layer())))])
    assert seen == [("blocks.0.attn.hook_z", 0), ("blocks.1.attn.hook_z", 1)]
    with pytest.raises(InputError, match="'hook_embed' belongs to no layer"):
        HookCall("hook_embed").layer()


@pytest.mark.parametrize(
    "bad, shown",
    [
        (lambda act, hook: act[:, :-1], "returned float32 \\[2, 3, 8\\] on cpu; expected float32 \\[2, 4, 8\\] on cpu"),
        (lambda act, hook: act.double(), "returned float64 \\[2, 4, 8\\]"),
        (lambda act, hook: 3, "returned int 3"),
        (lambda act, hook: (act,), "returned tuple"),
        (lambda act, hook: act.to("meta"), "on meta"),
    ],
)
def test_a_wrong_shape_dtype_device_or_kind_raises_naming_the_point_what_came_and_what_was_expected(model, bad, shown):
    with pytest.raises(HookError, match=shown) as caught:
        model.run_with_hooks(TOKENS, fwd_hooks=[(POINT, bad)])
    assert POINT in str(caught.value) and "None" in str(caught.value)
    assert clean_afterwards(model)


def zero_in_place(act, hook):
    act.zero_()
    return act


def zero_and_forget(act, hook):
    act.zero_()


def test_an_in_place_edit_that_is_returned_counts_and_rewrites_no_cache_and_nothing_upstream(model):
    plain, before = model.run_with_cache(TOKENS)
    kept = {name: act.clone() for name, act in before.items()}
    scope, during = model.capture()
    with scope, model.hooks(fwd_hooks=[(POINT, zero_in_place)]):
        edited = model(TOKENS)
    assert not torch.equal(edited, plain)
    assert all(torch.equal(before[name], act) for name, act in kept.items())
    assert torch.equal(during["blocks.0.hook_mlp_out"], kept["blocks.0.hook_mlp_out"])
    assert (during[POINT] == 0).all()


@pytest.mark.parametrize("grad", [True, False])
def test_an_in_place_edit_that_is_not_returned_raises(model, grad):
    said = rf"zero_and_forget at {POINT} edited.*return the tensor"
    with torch.set_grad_enabled(grad), pytest.raises(HookError, match=said):
        model.run_with_hooks(TOKENS, fwd_hooks=[(POINT, zero_and_forget)])
    assert clean_afterwards(model)


def test_in_inference_mode_the_in_place_check_falls_away_and_hooks_work(model):
    with torch.inference_mode():
        plain = model(TOKENS)
        quiet = model.run_with_hooks(TOKENS, fwd_hooks=[(POINT, zero_and_forget)])
        loud = model.run_with_hooks(TOKENS, fwd_hooks=[(POINT, zero_in_place)])
    assert torch.equal(quiet, plain) and not torch.equal(loud, plain)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, KeyboardInterrupt])
def test_an_exception_in_a_hook_keeps_its_type_gains_a_note_and_leaves_no_hook(model, error):
    def breaks(act, hook):
        raise error("mine")

    with pytest.raises(error) as caught, model.hooks(fwd_hooks=[(POINT, breaks), ("z", lambda act, hook: act)]):
        model(TOKENS)
    if error is not KeyboardInterrupt:
        assert "breaks at blocks.0.hook_resid_post, which saw float32 [2, 4, 8]" in caught.value.__notes__[0]
    assert clean_afterwards(model)


def test_an_exception_in_a_backward_hook_keeps_its_type_and_gains_a_note(model):
    def breaks(grad, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        model.run_with_hooks(TOKENS, bwd_hooks=[(POINT, breaks)]).sum().backward()
    assert "breaks at blocks.0.hook_resid_post" in caught.value.__notes__[0]


def test_hooks_run_in_the_order_in_which_they_were_registered_whoever_owns_them():
    net, order = Net(), []
    note = lambda label: lambda act, hook: order.append(label)  # noqa: E731
    late = net.hooks(fwd_hooks=[("a", note("scope 1"))])
    handle = net.add_hook("a", note("handle"))
    with net.hooks(fwd_hooks=[("a", note("scope 2")), ("a", note("scope 2b"))]), late, handle:
        net(torch.ones(1))
    assert order == ["scope 1", "handle", "scope 2", "scope 2b"]


@pytest.mark.parametrize("capture_first", [True, False])
def test_capture_runs_after_all_edits_in_any_order_of_registration(capture_first):
    net = Net()
    if capture_first:
        scope, cache = net.capture("a")
        edits = net.hooks(fwd_hooks=[("a", lambda act, hook: act * 10)])
    else:
        edits = net.hooks(fwd_hooks=[("a", lambda act, hook: act * 10)])
        scope, cache = net.capture("a")
    with scope, edits, net.hooks(fwd_hooks=[("a", lambda act, hook: act + 1)]):
        net(torch.ones(1))
    assert cache["a"].tolist() == [41.0]


def test_where_may_be_a_name_a_site_a_list_or_a_predicate(model):
    def fired(where):
        seen = []
        model.run_with_hooks(TOKENS, fwd_hooks=[(where, lambda act, hook: seen.append(hook.name))])
        return seen

    both = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    assert fired("blocks.1.attn.hook_z") == fired(("z", 1)) == fired(site("z", -1)) == both[1:]
    assert (
        fired("z") == fired(site("z")) == fired(lambda name: name.endswith("hook_z")) == fired([("z", 1), "z"]) == both
    )


def test_an_unknown_point_raises_with_the_nearest_before_anything_runs(model):
    for asks in (model.hooks, model.run_with_hooks):
        with pytest.raises(NameNotFound, match=r"closest: blocks\.0\.hook_resid_post"):
            asks(*([TOKENS] if asks == model.run_with_hooks else []), fwd_hooks=[("blocks.0.hook_resid_pos", print)])
    with pytest.raises(TypeError):  # WrongType, or the executed annotation before it
        model.hooks(fwd_hooks=["z"])
    with pytest.raises(TypeError):
        model.add_hook("z", "not a function")
    with pytest.raises(InputError, match="'fwd' or 'bwd'"):
        model.add_hook("z", zero_in_place, dir="both")


def test_handles_stay_until_removed_and_removing_twice_is_harmless(model):
    plain = model(TOKENS)
    handle = model.add_hook("z", lambda act, hook: act * 0)
    other = model.add_hook("z", lambda act, hook: act + 1)
    assert not torch.equal(model(TOKENS), plain)
    handle.remove()
    handle.remove()
    assert len(model.hook_points()["blocks.0.attn.hook_z"].handles) == 1
    other.remove()
    assert torch.equal(model(TOKENS), plain)
    with model.add_hook("z", lambda act, hook: act * 0):
        assert not torch.equal(model(TOKENS), plain)
    assert torch.equal(model(TOKENS), plain) and clean_afterwards(model)


def test_reset_hooks_removes_handles_and_leaves_open_blocks(model):
    fired = []
    model.add_hook("z", lambda act, hook: fired.append("handle"))
    with model.hooks(fwd_hooks=[(("z", 0), lambda act, hook: fired.append("scope"))]):
        model.reset_hooks()
        model(TOKENS)
    assert fired == ["scope"]


def test_copies_of_a_model_carry_no_hooks(model):
    plain = model(TOKENS)
    model.add_hook("z", lambda act, hook: act * 0)
    with model.hooks(fwd_hooks=[("q", lambda act, hook: act * 0)]):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(TOKENS), plain) and not torch.equal(model(TOKENS), plain)
            assert twin.hook_names() == model.hook_names()
            edited = twin.run_with_hooks(TOKENS, fwd_hooks=[("z", lambda act, hook: act * 0)])
            assert not torch.equal(edited, plain)


def test_a_backward_hook_sees_and_edits_the_gradient():
    net, x = Net(), torch.ones(1, requires_grad=True)
    seen = []

    def double(grad, hook):
        seen.append((hook.name, grad.item()))
        return grad * 2

    with net.hooks(bwd_hooks=[("a", double)]):
        net(x).sum().backward()
    assert seen == [("hook_a", 8.0)] and x.grad.item() == 2 * 8 * 3
    with pytest.raises(HookError, match="edited its activation in place"):
        net.run_with_hooks(x, bwd_hooks=[("a", zero_and_forget)]).sum().backward()
    with pytest.raises(HookError, match="at hook_a returned"):
        net.run_with_hooks(x, bwd_hooks=[("a", lambda grad, hook: grad[:0])]).sum().backward()


def test_a_backward_hook_fires_while_its_scope_is_open_and_not_after():
    net, fired = Net(), []
    with net.hooks(bwd_hooks=[("a", lambda grad, hook: fired.append(1))]):
        first = net(torch.ones(1)).sum()
        first.backward(retain_graph=True)
        assert fired == [1]
    first.backward()
    assert fired == [1]
    net.run_with_hooks(torch.ones(1), bwd_hooks=[("a", lambda grad, hook: fired.append(2))]).sum().backward()
    assert fired == [1, 2]
    handle = net.add_hook("a", lambda grad, hook: fired.append(3), dir="bwd")
    out = net(torch.ones(1)).sum()
    out.backward(retain_graph=True)
    handle.remove()
    out.backward()
    assert fired == [1, 2, 3]


def test_a_gradient_belongs_to_one_point_only(model):
    """resid_post 0 and resid_pre 1 are one tensor in the forward pass; their gradient hooks must not both see both."""
    seen = []
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    model.run_with_hooks(
        TOKENS, bwd_hooks=[(names, lambda grad, hook: seen.append(hook.name) or grad * 2)]
    ).sum().backward()
    doubled_twice = model.embed.weight.grad.clone()
    model.zero_grad()
    model.run_with_hooks(TOKENS, bwd_hooks=[(names[0], lambda grad, hook: grad * 4)]).sum().backward()
    assert seen == names[::-1] and torch.allclose(doubled_twice, model.embed.weight.grad, rtol=1e-5)


def test_gradients_reach_points_of_a_frozen_model():
    net = Net().requires_grad_(False)
    out, cache = net.run_with_cache(torch.ones(1), names="a", grads=True)
    out.sum().backward()
    assert cache["a_grad"].tolist() == [8.0]
    with pytest.raises(InputError, match="no_grad"), torch.no_grad():
        net.run_with_cache(torch.ones(1), grads=True)


def test_captured_gradients_are_what_backward_hooks_left():
    net = Net()
    scope, cache = net.capture("a", grads=True)
    with scope, net.hooks(bwd_hooks=[("a", lambda grad, hook: grad * 3)]):
        net(torch.ones(1)).sum().backward()
    assert cache["a_grad"].tolist() == [24.0]


def test_hooks_that_return_None_leave_a_training_run_bit_for_bit_the_same():
    def trained(model, hooked):
        # Listening to scores or pattern takes attention off the fused kernel; head by head sums round otherwise too.
        quiet = [name for name in model.hook_names() if "scores" not in name and "pattern" not in name]
        for step in range(4):
            logits = model.run_with_hooks(TOKENS.roll(step, 0), fwd_hooks=[(quiet, lambda act, hook: None)] * hooked)
            model.zero_grad()
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        return model.state_dict()

    plain, hooked = trained(tiny_model(), False), trained(tiny_model(), True)
    assert all(torch.equal(plain[name], hooked[name]) for name in plain)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_an_identity_hook_changes_nothing(data):
    model = tiny_model(dtype=torch.float64)
    names = data.draw(st.lists(st.sampled_from(model.hook_names()), min_size=1, max_size=6))
    hook = data.draw(st.sampled_from([lambda act, hook: act, lambda act, hook: None, lambda act, hook: act.clone()]))
    got = model.run_with_hooks(TOKENS, fwd_hooks=[(names, hook)])
    assert torch.allclose(got, model(TOKENS), atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_an_exception_anywhere_leaves_no_hook(data):
    model = tiny_model()
    lazy_free = [name for name in model.hook_names() if "pos_embed" not in name]
    name = data.draw(st.sampled_from(lazy_free))

    def breaks(act, hook):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        model.run_with_hooks(TOKENS, fwd_hooks=[("embed", lambda act, hook: act), (name, breaks)])
    assert clean_afterwards(model)


# what a hook keeps


@pytest.mark.parametrize("point", ["hook_a", "hook_b"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_reaches_a_tensor_that_a_hook_kept_while_it_returned_None(point, frozen):
    net, kept = Net().requires_grad_(not frozen), {}

    def keep(act, hook):
        if frozen:
            act.requires_grad_()
        kept[hook.name] = act
        act.retain_grad()

    net.run_with_hooks(torch.ones(2), fwd_hooks=[(point, keep)]).sum().backward()
    assert kept[point].grad.tolist() == ([8.0, 8.0] if point == "hook_a" else [1.0, 1.0])


def test_the_gradient_of_a_kept_tensor_may_be_asked_for_later_and_by_a_hook_of_its_own():
    net, kept, seen = Net(), [], []
    out = net.run_with_hooks(torch.ones(1), fwd_hooks=[("a", lambda act, hook: kept.append(act))])
    assert torch.autograd.grad(out.sum(), kept)[0].tolist() == [8.0]

    def watch(act, hook):
        act.register_hook(lambda grad: seen.append(grad.item()))

    net.run_with_hooks(torch.ones(1), fwd_hooks=[("a", watch)]).sum().backward()
    assert seen == [8.0]


@pytest.mark.parametrize("inputs_of_heads", [False, True])
def test_gradients_of_kept_tensors_are_those_of_a_cache_at_every_point_of_a_model(inputs_of_heads):
    model, kept = tiny_model(dtype=torch.float64), {}
    # A head's own input is normalised on its own path, which passes by the points of the shared one.
    own = [name for name in model.hook_names() if name.endswith(("attn_in", "q_input", "k_input", "v_input"))]
    names = own if inputs_of_heads else [name for name in model.hook_names() if name not in own]
    out, cache = model.run_with_cache(TOKENS, names=names, grads=True)
    out.square().sum().backward()

    def keep(act, hook):
        kept[hook.name] = act
        act.retain_grad()

    model.run_with_hooks(TOKENS, fwd_hooks=[(names, keep)]).square().sum().backward()
    assert set(kept) == set(names)
    for name, act in kept.items():
        scale = cache[name + "_grad"].abs().max().clamp_min(1)
        assert (act.grad - cache[name + "_grad"]).abs().max() <= 1e-12 * scale, name


def test_what_becomes_of_a_kept_tensor_later_reaches_neither_the_model_nor_a_cache(model):
    plain, kept = model(TOKENS), []

    def keep(act, hook):
        for earlier in kept:
            earlier.detach().zero_()
        kept.append(act)

    scope, cache = model.capture("resid_post")
    with scope:
        hooked = model.run_with_hooks(TOKENS, fwd_hooks=[("resid_post", keep)])
    kept[-1].detach().zero_()
    assert torch.allclose(hooked, plain, atol=1e-6)
    assert all(cache["resid_post", layer].abs().max() > 0 for layer in (0, 1))


def test_a_hook_that_keeps_nothing_leaves_the_activation_itself(model):
    act = torch.ones(2, requires_grad=True)
    call = HookCall("hook_x")
    assert hooks_module.run_hook(lambda act, hook: None, act, call) is act
    assert hooks_module.run_hook(lambda act, hook: print(act.shape), act, call) is act
    kept = []
    with torch.no_grad():
        assert hooks_module.run_hook(lambda act, hook: kept.append(act), act, call) is act


# modules that stand in a point's place, and torch's own hooks


@pytest.mark.parametrize(
    "path", ["blocks.0.attn.hook_pattern", "blocks.0.hook_resid_pre", "blocks.1.ln1.hook_scale", "unembed.hook_in"]
)
def test_a_point_that_is_replaced_says_so_when_it_is_replaced(model, path):
    owner, _, name = path.rpartition(".")
    with pytest.raises(TypeError, match=rf"{path} is a hook point and cannot be replaced by a Identity.*fwd_hooks"):
        setattr(model.get_submodule(owner), name, nn.Identity())
    with pytest.raises(TypeError, match="cannot be replaced"):
        model.set_submodule(path, nn.Identity())
    fired = []
    model.run_with_hooks(TOKENS, fwd_hooks=[(path, lambda act, hook: fired.append(hook.name))])
    assert fired == [path]


def test_a_point_that_is_gone_with_the_module_around_it_says_so_when_it_is_asked_for(model):
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    net = Net()
    net._modules["hook_a"] = nn.Identity()  # as a module written by somebody else would allow
    for asks in (lambda: net.hooks(fwd_hooks=[("a", print)]), net.capture, lambda: net.add_hook("a", print)):
        with pytest.raises(HookError, match=r"'hook_a' is no longer part of this Net.*by a Identity.*name_points"):
            asks()
    assert net.run_with_hooks(torch.ones(1), fwd_hooks=[("b", lambda act, hook: act * 0)]).item() == 0
    net.name_points()
    assert net.hook_names() == ["hook_b"]

    model.blocks[0].mlp = nn.Identity()
    with pytest.raises(HookError, match=r"blocks\.0\.mlp\.hook_pre"):
        model.run_with_cache(TOKENS)
    model.blocks[1].around = Around(model.blocks[1].attn)  # elsewhere in the model it still fires
    assert model.resolve(("z", 1))


def test_torchs_own_hooks_on_a_point_fire():
    net, seen = Net(), []

    def forward(point, args, out):
        seen.append((point.name, args[0].item(), out.item()))
        return out * 2

    handle = net.hook_a.register_forward_hook(forward)
    assert net(torch.ones(1)).item() == 64.0 and seen == [("hook_a", 4.0, 4.0)]
    handle.remove()
    assert net(torch.ones(1)).item() == 16.0
    with net.hook_a.register_forward_hook(lambda point, args, kwargs, out: out * 3, with_kwargs=True):
        assert net(torch.ones(1)).item() == 144.0
    for options, back in (
        ({}, lambda args: (args[0] * 2,)),
        ({"with_kwargs": True}, lambda args: ((args[0] * 2,), {})),
    ):
        with net.hook_a.register_forward_pre_hook(lambda point, args, *_, back=back: back(args), **options):
            assert net(torch.ones(1)).item() == 64.0
    with net.hook_a.register_full_backward_hook(lambda point, into, out: (out[0] * 2,)):
        x = torch.ones(1, requires_grad=True)
        net(x).sum().backward()
    assert x.grad.item() == 2 * 8 * 3
    with net.hook_a.register_full_backward_pre_hook(lambda point, out: seen.append(out[0].item())):
        net(torch.ones(1)).sum().backward()
    assert seen[-1] == 8.0
    with pytest.raises(InputError, match="prepend"):
        net.hook_a.register_forward_hook(forward, prepend=True)
    assert clean_afterwards(net)


def test_gradients_in_inference_mode_are_refused_by_that_name(model):
    with torch.inference_mode(), pytest.raises(InputError, match=r"grads=True needs gradients.*inference_mode"):
        model.run_with_cache(TOKENS, grads=True)
    with torch.inference_mode(), torch.enable_grad(), pytest.raises(InputError, match="inference_mode"):
        model.run_with_cache(TOKENS, grads=True)


@pytest.mark.parametrize("name", ["fwd_hooks", "bwd_hooks"])
@pytest.mark.parametrize("hooks", [5, None])
def test_hooks_that_are_no_list_are_refused(name, hooks):
    with refused(WrongType, f"{name} is a list of \\(where, function\\)"):
        tiny_model().run_with_hooks([[1, 2]], **{name: hooks})

"""Sweeps among other hooks, threads, interrupts and mistakes: they fall back, go on, or say what is wrong."""

import functools
import itertools
import subprocess
import sys
import threading

import pytest
import torch
from loop import POINTS, looped
from model.zoo import zoo_model
from refused import refused
from torch import Tensor, nn

import hooklens as hl
from hooklens.core.errors import CheckFailed, FileRefused, InputError, WrongType
from hooklens.metrics import Reads
from hooklens.sweeps.execution import execute
from hooklens.sweeps.planning import Patch, plan
from hooklens.sweeps.site_patches import SitePatches
from hooklens.testing import tiny_model

CORRUPTED = torch.tensor([[1, 5, 2, 7, 3, 6], [4, 4, 9, 0, 10, 2]])
CLEAN = torch.tensor([[1, 5, 8, 7, 3, 6], [4, 4, 9, 0, 1, 2]])


def metric_of(model):
    return hl.logit_diff(model, answer=[3, 1], wrong_answer=4)


def own(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture
def model():
    return zoo_model("llama", dtype=torch.float64)


# -- what the engine must not skip


def test_hooks_of_others_are_kept_and_the_result_says_so(model):
    metric = metric_of(model)
    double = lambda act, hook: act * 2  # noqa: E731
    quiet = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
    with model.hooks(fwd_hooks=[(("mlp_out", 0), double)]):
        sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
        expected = looped(model, CORRUPTED, CLEAN, metric, "z", "layer x head")
    assert sweep.how == "plain loop: other hooks are active on this model" and sweep.computed == 1
    close(sweep.per_pair, expected)
    assert float((sweep.per_pair - quiet.per_pair).abs().max()) > 1e-3
    handle = model.add_hook(("mlp_out", 0), double)
    close(hl.patch(model, CLEAN, CORRUPTED, metric, site="z").per_pair, expected)
    handle.remove()
    again = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
    assert again.how == "engine"
    close(again.per_pair, quiet.per_pair)


@pytest.mark.parametrize("where", ["ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"])
def test_hooks_on_the_way_out_see_every_position(model, where):
    """A metric that reads one position of four tokens, and a hook that edits by position."""

    def edit(act: Tensor, hook) -> Tensor:
        return act * torch.arange(1, act.shape[1] + 1, dtype=act.dtype)[None, :, None]

    metric = metric_of(model)
    with model.hooks(fwd_hooks=[(where, edit)]):
        expected = looped(model, CORRUPTED, CLEAN, metric, "z", "layer x head")
        sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
        whole = hl.patch(model, CLEAN, CORRUPTED, own, site="z")
        ends = metric(model(CLEAN)), metric(model(CORRUPTED))
    close(sweep.per_pair, expected)
    for one in (sweep, whole):
        assert one.how.startswith("plain loop")
    close(sweep.clean_per_pair, ends[0].detach())
    close(sweep.corrupted_per_pair, ends[1].detach())


@pytest.mark.parametrize("where", ["blocks.1", "blocks.1.attn", "blocks.0.mlp", "blocks.0.attn.q", "unembed"])
def test_torch_hooks_are_kept(model, where):
    metric = metric_of(model)
    handle = model.get_submodule(where).register_forward_hook(lambda module, args, out: out * 2)
    sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
    assert sweep.how == "plain loop: torch hooks are on this model's modules"
    close(sweep.per_pair, looped(model, CORRUPTED, CLEAN, metric, "z", "layer x head"))
    handle.remove()
    assert hl.patch(model, CLEAN, CORRUPTED, metric, site="z").how == "engine"


class Shifted(nn.Module):
    """An MLP that somebody put in the model's own place, and that mixes positions."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x).cumsum(1)


def test_a_block_with_a_part_of_another_class_runs_plainly(model):
    model.blocks[1].mlp = Shifted(model.blocks[1].mlp)
    metric = metric_of(model)
    sweep = hl.patch(model, CLEAN, CORRUPTED, metric)
    assert sweep.how.startswith("plain loop: a block")
    close(sweep.per_pair, looped(model, CORRUPTED, CLEAN, metric, "resid_pre", "layer x pos"))


class Dropped(nn.Module):
    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear, self.dropout = linear, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(x))


def test_dropout_runs_plainly_until_it_is_off(model):
    model.blocks[0].mlp.out = Dropped(model.blocks[0].mlp.out)
    assert "dropout" in hl.patch(model.train(), CLEAN, CORRUPTED, metric_of(model)).how
    sweep = hl.patch(model.eval(), CLEAN, CORRUPTED, metric_of(model))
    assert sweep.how == "engine"
    close(sweep.per_pair, looped(model, CORRUPTED, CLEAN, metric_of(model), "resid_pre", "layer x pos"))


def test_two_threads_with_different_hooks_sweep_on_one_model(model):
    """One has a hook of its own, one has none: each gets what it gets alone."""
    metric = metric_of(model)
    expected = {False: looped(model, CORRUPTED, CLEAN, metric, "z", "layer x head")}
    double = [(("mlp_out", 0), lambda act, hook: act * 2)]
    with model.hooks(fwd_hooks=double):
        expected[True] = looped(model, CORRUPTED, CLEAN, metric, "z", "layer x head")
    barrier, found, errors = threading.Barrier(2), {True: [], False: []}, []

    def sweep(hooked: bool) -> None:
        try:
            barrier.wait(30)
            with model.hooks(fwd_hooks=double if hooked else []):
                for _ in range(5):
                    found[hooked].append(hl.patch(model, CLEAN, CORRUPTED, metric, site="z"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=sweep, args=(hooked,)) for hooked in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for hooked, sweeps in found.items():
        assert [s.how == "engine" for s in sweeps] == [not hooked] * 5
        for s in sweeps:
            close(s.per_pair, expected[hooked])


@pytest.mark.parametrize("plain", [False, True])
def test_nothing_of_the_session_is_touched(model, plain):
    """Global generator, grad mode, weights, gradients and hooks are as before; also when the metric raises."""

    def failing(logits: Tensor) -> Tensor:
        raise ZeroDivisionError

    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    for metric in (metric_of(model), own, failing):
        try:
            with hl.engine(plain=plain):
                sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
            assert not sweep.per_pair.requires_grad
        except ZeroDivisionError:
            assert metric is failing
        assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) and p.grad is None
        assert not any(point.listening() for point in model.hook_points().values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_any_grad_mode(model, mode):
    expected = looped(model, CORRUPTED, CLEAN, metric_of(model), "k", "layer x head")
    with mode():
        made = plan(model, CORRUPTED, "k", CLEAN)
        got = execute(SitePatches(made), metric_of(model)).values.T.reshape(2, 2, -1)
        assert not made.base.streams[-1].requires_grad
    close(got.clone(), expected)


# -- settings and the check


def test_settings_hold_inside_their_block_only(model):
    from hooklens.sweeps.settings import current

    before = current()
    with hl.engine(verify=0), hl.engine(memory=100):
        assert (current().verify, current().memory) == (0, 100)
    assert current() == before
    for wrong in ({"verify": -1}, {"memory": -5}, {"memory": 0.5}, {"verify": True}, {"memroy": 1}):
        with pytest.raises(InputError):
            hl.engine(**wrong)


def test_a_few_patches_are_run_again_the_plain_way(model):
    metric = metric_of(model)
    for verify, expected in ((0, 0), (3, 3), (1000, 8)):
        with hl.engine(verify=verify):
            sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
        assert sweep.n_verified == expected
        assert sweep.largest_error < 1e-9 if verify else sweep.largest_error != sweep.largest_error


@pytest.mark.parametrize("drift", [0.1, 0.01, 1e-3])
def test_a_metric_that_drifts_from_call_to_call_passed_for_one_that_rounding_moves(drift):
    model, calls = zoo_model("llama", n_layers=3), itertools.count()

    def metric(logits):
        return logits[:, -1, 3] * (1 + drift * next(calls))

    with pytest.raises(CheckFailed, match="the metric gives other numbers when it is called again"):
        hl.patch(model, CLEAN, CORRUPTED, metric, site="z")


def test_a_plain_run_that_gave_nan_passed_as_a_check_without_error(model, monkeypatch):
    nothing = lambda self, numbers, reader: torch.full((len(numbers), reader.n_pairs), torch.nan)  # noqa: E731
    monkeypatch.setattr(SitePatches, "plain", nothing)
    with pytest.raises(CheckFailed, match=r"differs by nan from a plain hooked run"):
        hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site="z")


def test_the_check_shows_an_engine_that_is_wrong(model, monkeypatch):
    from hooklens.sweeps import site_patches as module

    right = module.entering
    monkeypatch.setattr(module, "entering", lambda *args: _moved(right(*args)))
    with pytest.raises(CheckFailed, match=r"z at L\dH\d differs by .* from a plain hooked run"):
        hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site="z")
    with hl.engine(verify=0):
        assert hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site="z").n_verified == 0


def _moved(group):
    group.x = group.x + torch.linspace(0, 1, group.x.shape[-1], dtype=group.x.dtype)
    return group


# -- interrupted and resumed


_calls: list[int] = []
_stop_at: list[int] = []


def interruptible(logits: Tensor) -> Tensor:
    _calls.append(1)
    if _stop_at and len(_calls) == _stop_at[0]:
        raise KeyboardInterrupt
    return own(logits)


@pytest.fixture
def interrupted():
    _calls.clear(), _stop_at.clear()
    yield lambda n: (_calls.clear(), _stop_at.__setitem__(slice(None), [n] if n else []))
    _calls.clear(), _stop_at.clear()


@pytest.mark.parametrize("plain", [False, True])
def test_an_interrupted_sweep_goes_on(model, tmp_path, interrupted, plain):
    """Ctrl-C loses at most the bin in flight, and the numbers are those of a sweep that was let be."""
    path = hl.Resume(tmp_path / "sweep", key="interruptible")  # it counts its calls, and so is never the same
    expected = looped(model, CORRUPTED, CLEAN, own, "z", "layer x head")
    with hl.engine(memory=1, verify=0, plain=plain):
        interrupted(6)  # one call for the base run, then one a patch: in the fifth of eight
        with pytest.raises(KeyboardInterrupt):
            hl.patch(model, CLEAN, CORRUPTED, interruptible, site="z", resume=path)
        assert not any(point.listening() for point in model.hook_points().values())
        interrupted(0)
        sweep = hl.patch(model, CLEAN, CORRUPTED, interruptible, site="z", resume=path)
        assert len(_calls) == 1 + 4 + 1  # the base run, four patches, the clean run
        close(sweep.per_pair, expected)
        interrupted(0)
        again = hl.patch(model, CLEAN, CORRUPTED, interruptible, site="z", resume=path)
        assert len(_calls) == 2 and torch.equal(again.per_pair, sweep.per_pair)
    assert [p.name for p in tmp_path.iterdir()] == ["sweep"]


@pytest.mark.parametrize("plain", [False, True])
def test_an_interrupt_says_that_there_is_resume(model, tmp_path, interrupted, plain):
    for resume in (None, tmp_path / "sweep"):
        interrupted(6)
        with hl.engine(memory=1, verify=0, plain=plain), pytest.raises(KeyboardInterrupt) as caught:
            hl.patch(model, CLEAN, CORRUPTED, interruptible, site="z", resume=resume)
        notes = getattr(caught.value, "__notes__", [])
        assert ["resume=path" in note for note in notes] == ([True] if resume is None else [])


def test_interrupts_at_every_bin(model, tmp_path, interrupted, monkeypatch):
    """Interrupted again and again, after every bin: still the same numbers, each bin run once or twice."""
    from hooklens.sweeps import execution as module

    right, bins = module._run_bin, []

    def run_bin(plan, reader, items, values, rows):
        right(plan, reader, items, values, rows)
        bins.append(1)
        if len(bins) % 2 == 0:
            raise KeyboardInterrupt  # after the work, before it is kept

    metric, path = metric_of(model), tmp_path / "sweep"
    monkeypatch.setattr(module, "_run_bin", run_bin)
    for _ in range(30):
        try:
            with hl.engine(memory=1, verify=0):
                sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z", resume=path)
            break
        except KeyboardInterrupt:
            continue
    close(sweep.per_pair, looped(model, CORRUPTED, CLEAN, metric, "z", "layer x head"))
    assert len(bins) <= 2 * 8


def test_other_last_bits_are_still_the_same_sweep(model, tmp_path, monkeypatch):
    """Another process may have another number of threads, or packed weights: what it computes differs by rounding."""
    from hooklens.sweeps import planning as module

    path, right = tmp_path / "sweep", module.base_run
    hl.patch(model, CLEAN, CORRUPTED, own, site="z", resume=path)

    def rounded(*args):
        base = right(*args)
        base.streams[-1] = base.streams[-1] * (1 + 1e-7)
        return base

    monkeypatch.setattr(module, "base_run", rounded)
    hl.patch(model, CLEAN, CORRUPTED, own, site="z", resume=path)


def test_given_activations_that_differ_are_another_sweep(model, tmp_path):
    cache = model.run_with_cache(CORRUPTED, names="z")[1]
    run = functools.partial(hl.patch, model, CLEAN, CORRUPTED, own, site="z", resume=tmp_path / "sweep")
    run(value=dict(cache))
    run(value=dict(cache))
    for other in (
        {name: 1.01 * act for name, act in cache.items()},
        {name: act.flip(0) for name, act in cache.items()},
    ):
        with pytest.raises(FileRefused, match="another sweep"):
            run(value=other)


def same_on_base(sign: float):
    """Metrics that differ only in what they closed over, and agree wherever `own` is 0."""
    return lambda logits: sign * (own(logits) - own(logits))


def test_a_file_of_another_sweep_is_refused(model, tmp_path):
    path, metric = tmp_path / "sweep", metric_of(model)
    run = functools.partial(hl.patch, model, resume=path)
    run(CLEAN, CORRUPTED, metric, site="z")
    other_prompt, other_model = CLEAN.clone(), zoo_model("llama", dtype=torch.float64)
    other_prompt[0, 3] = 1
    with torch.no_grad():
        other_model.blocks[0].mlp.out.weight[0, 0] += 1e-6
    for different in (
        lambda: run(other_prompt, CORRUPTED, metric, site="z"),
        lambda: run(CLEAN, other_prompt, metric, site="z"),
        lambda: run(CLEAN, CORRUPTED, metric, site="v"),
        lambda: run(CLEAN, CORRUPTED, metric, site="z", by="layer x head x pos"),
        lambda: run(CLEAN, CORRUPTED, metric, site="z", value="zero"),
        lambda: run(CLEAN, CORRUPTED, own, site="z"),
        lambda: run(CLEAN, CORRUPTED, hl.logit_diff(model, answer=[3, 1], wrong_answer=5), site="z"),
        lambda: hl.patch(other_model, CLEAN, CORRUPTED, metric, site="z", resume=path),
    ):
        with pytest.raises(FileRefused, match="another sweep"):
            different()
    run(CLEAN, CORRUPTED, metric_of(model), site="z")  # the same metric, made anew


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (same_on_base(1.0), same_on_base(-1.0)),
        (lambda x: 0 * x[:, -1, 1], lambda x: 0 * x[:, -1, 2]),
        (lambda x: (x * 0).amax((1, 2)), lambda x: (x * 0).amin((1, 2))),
        (functools.partial(torch.sum, dim=(1, 2)), functools.partial(torch.mean, dim=(1, 2))),
        (lambda x: sum(y for y in (x[:, 0, 0] * 0,)), lambda x: sum(2 * y for y in (x[:, 0, 0] * 0,))),
    ],
)
def test_functions_that_agree_on_the_base_run_are_told_apart(tmp_path, one, other):
    model = zoo_model("llama", dtype=torch.float64)
    run = functools.partial(hl.patch, model, CLEAN, CORRUPTED, site="z", resume=tmp_path / "sweep")
    run(one)
    run(one)
    with pytest.raises(FileRefused, match="another sweep"):
        run(other)


SCRIPT = """
import sys, torch, hooklens as hl
from hooklens.testing import tiny_model
model, k = tiny_model(), torch.tensor(3)
class Margin:
    def __init__(self): self.scale, self.of = 2.0, lambda x: x
    def __call__(self, logits): return self.scale * self.of(logits[:, -1, k])
sweep = hl.patch(model, [[1, 2, 3]], [[1, 4, 3]], Margin(), resume=sys.argv[1])
print(sweep.values.tolist())
"""


@pytest.mark.slow
def test_another_process_resumes(tmp_path):
    """Nothing in a metric's fingerprint is an address."""
    path = str(tmp_path / "sweep")
    runs = [
        subprocess.run([sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_damaged_files_are_refused(model, tmp_path):
    path = tmp_path / "sweep"
    run = functools.partial(hl.patch, model, CLEAN, CORRUPTED, metric_of(model), site="z", resume=path)
    run()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    for damaged in (b"", whole[:50], whole[:-4], b"\0" * len(whole), bytes(flipped), b"{}" + whole):
        path.write_bytes(damaged)
        with pytest.raises(FileRefused):
            run()
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(FileRefused, match="cannot read a sweep in progress"):
        run()
    with pytest.raises(InputError, match="folder"):
        hl.patch(model, CLEAN, CORRUPTED, own, resume=tmp_path)
    with pytest.raises(InputError, match="no folder"):
        hl.patch(model, CLEAN, CORRUPTED, own, resume=tmp_path / "nowhere" / "sweep")


def test_resume_wants_prompts_of_one_length(model, tmp_path):
    with pytest.raises(InputError, match="one length"):
        hl.patch(model, [[1, 2], [1, 2, 3]], [[1, 3], [1, 4, 3]], metric_of(model), site="z", resume=tmp_path / "sweep")


# -- NaN


def test_nan_names_the_first_point(model):
    metric = metric_of(model)
    with torch.no_grad():
        model.blocks[1].mlp.out.weight[:] = float("nan")
    with pytest.raises(InputError, match=r"not finite from blocks\.1\.hook_mlp_out on"):
        hl.patch(model, CLEAN, CORRUPTED, metric, site="z")


def test_nan_in_the_clean_run_only(model):
    """A token whose embedding is not finite, on one side only."""
    with torch.no_grad():
        model.embed.weight[8] = float("inf")  # token 8 stands in the clean prompt only
    with pytest.raises(InputError, match=r"blocks\.\d\.attn\.hook_z"):
        hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site="z")
    with pytest.raises(InputError, match="corrupted run is NaN: not finite from hook_embed on"):
        hl.patch(model, CORRUPTED, CLEAN, metric_of(model), site="z", value="zero")


def test_nan_under_a_patch_names_the_patch():
    model = zoo_model("no_norm", dtype=torch.float64)
    huge = lambda act, name: torch.full_like(act, 1e308 if "blocks.1" in name else 0.0)  # noqa: E731
    with pytest.raises(InputError, match=r"Patch\(layer=1, pos=0.*not finite from unembed\."):
        hl.patch(model, CLEAN, CORRUPTED, lambda logits: logits.sum((1, 2)), site="mlp_out", value=huge)


def test_an_infinite_metric_is_refused_like_nan(model):
    """It used to pass, as a sweep of -inf that recovered NaN."""
    metric = metric_of(model)
    for value in (float("inf"), float("-inf")):
        with pytest.raises(InputError, match="metric is infinite for 8 of 8 patches, though every activation is"):
            hl.patch(model, CLEAN, CORRUPTED, lambda logits, value=value: own(logits) * 0 + value, site="z")
    base = model(CORRUPTED)[:, -1, 3].detach()
    once = lambda logits: torch.where(logits[:, -1, 3] == base, 0.0, -torch.inf)  # noqa: E731
    with pytest.raises(InputError, match=r"the metric is infinite for \d of 8 patches"):
        hl.patch(model, CLEAN, CORRUPTED, once, site="z")
    large = model(CLEAN)[:, -1, 3].detach()
    only_clean = lambda logits: torch.where(logits[:, -1, 3] == large, torch.inf, own(logits))  # noqa: E731
    with pytest.raises(InputError, match="the metric of the clean run is infinite: every activation is finite"):
        hl.patch(model, CLEAN, CORRUPTED, only_clean, site="z")
    with torch.no_grad():
        model.unembed.linear.weight[3] = 1e308
    with pytest.raises(InputError, match=r"not finite from unembed\.hook_out on"):
        hl.patch(model, CLEAN, CORRUPTED, metric, site="z")


def test_nan_of_the_metric_itself(model):
    with pytest.raises(InputError, match="every activation is finite: look at the metric"):
        hl.patch(model, CLEAN, CORRUPTED, lambda logits: own(logits) * float("nan"))


# -- mistakes


@pytest.mark.parametrize(
    "returns",
    [
        lambda logits: logits,
        lambda logits: logits[:, -1],
        lambda logits: logits[0, -1, :1].expand(3),
        lambda logits: None,
        lambda logits: "0.3",
        lambda logits: [own(logits), own(logits)],
    ],
)
def test_a_metric_that_returns_neither_a_number_nor_one_a_pair(model, returns):
    with pytest.raises((InputError, WrongType), match="one value a pair, or a single number"):
        hl.patch(model, CLEAN, CORRUPTED, returns)


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        (Patch(2), "layer 2 of z asked for; there are layers 0 to 1"),
        (Patch(-1), "layer -1"),
        (Patch(0, head=4), "heads 0 to 3"),
        (Patch(0, pos=6), "pos 6 of z asked for; there are positions 0 to 5"),
        (Patch(0, neuron=1), "z has head, layer, pos"),
        (Patch(None, head=0), "layer None"),
    ],
)
def test_a_patch_that_does_not_exist(model, patch, says):
    with pytest.raises(InputError, match=says):
        plan(model, CORRUPTED, "z", CLEAN, patches=[Patch(0), patch])


def test_other_patches_and_sites_that_do_not_exist(model):
    with pytest.raises(InputError, match=r"kv|heads 0 to 1"):
        plan(model, CORRUPTED, "k", CLEAN, patches=[Patch(0, head=2)])
    with pytest.raises(InputError, match="resid_pre has layer, pos"):
        plan(model, CORRUPTED, "resid_pre", CLEAN, patches=[Patch(0, head=0)])
    with pytest.raises(InputError, match="empty"):
        plan(model, CORRUPTED, "z", CLEAN, patches=[])
    with pytest.raises(KeyError, match="closest: resid_p"):
        hl.patch(model, CLEAN, CORRUPTED, own, site="resid_pos")
    with pytest.raises(InputError, match="no mlp_out"):
        hl.patch(tiny_model(attn_only=True), CLEAN, CORRUPTED, own, site="mlp_out")
    with pytest.raises(InputError, match="no resid_mid"):
        hl.patch(tiny_model(block="parallel"), CLEAN, CORRUPTED, own, site="resid_mid")
    for by in ("pos", "layer x head", "layer x pos x pos", "layer x neuron", ""):
        with pytest.raises(InputError, match="resid_pre can be swept by layer"):
            hl.patch(model, CLEAN, CORRUPTED, own, by=by)


@pytest.mark.parametrize("site", ["z", "k", "resid_pre", "post", "pattern"])
def test_a_site_at_one_layer_is_that_layer_of_the_whole_sweep(model, site):
    """It used to raise torch's or Python's own errors."""
    metric = metric_of(model)
    whole = hl.patch(model, CLEAN, CORRUPTED, metric, site=site)
    for asked, layer in ((hl.site(site, 1), 1), (hl.site(site, -2), 0), ((site, 1), 1), (hl.site(whole_name(site)), 1)):
        one = hl.patch(model, CLEAN, CORRUPTED, metric, site=asked)
        close(one.per_pair, whole.per_pair[:, layer : layer + 1])
        assert (one.site, one.by) == (whole.site, whole.by) and one.labels["layer"] == [f"L{layer}"]
        assert one.name_of(one.order()[0]).startswith(f"L{layer}")
        assert all(str(row[0]).startswith(f"L{layer}") for row in one.table().rows)
        one.figure()
    every = hl.patch(model, CLEAN, CORRUPTED, metric, site=hl.site(site))
    close(every.per_pair, whole.per_pair)
    given = {whole_name(site): torch.tensor(0.0, dtype=torch.float64)}  # that layer's activation is enough
    zeroed = hl.patch(model, CLEAN, CORRUPTED, metric, site=hl.site(site, 1), value=given)
    close(zeroed.per_pair, hl.patch(model, CLEAN, CORRUPTED, metric, site=site, value="zero").per_pair[:, 1:])


def whole_name(site: str) -> str:
    return f"blocks.1.{POINTS[site]}"


def test_one_layer_of_prompts_of_several_lengths_and_resumed(model, tmp_path):
    clean, corrupted = [[1, 2, 3, 4], [5, 6, 7]], [[1, 2, 8, 4], [5, 9, 7]]
    metric = metric_of(model)
    whole = hl.patch(model, clean, corrupted, metric, site="z")
    close(hl.patch(model, clean, corrupted, metric, site=hl.site("z", 1)).per_pair, whole.per_pair[:, 1:])
    run = functools.partial(hl.patch, model, CLEAN, CORRUPTED, metric, resume=tmp_path / "sweep")
    first = run(site=hl.site("z", 1))
    assert torch.equal(run(site=hl.site("z", 1)).per_pair, first.per_pair)
    with pytest.raises(FileRefused, match="another sweep"):
        run(site=hl.site("z", 0))


@pytest.mark.parametrize(
    ("site", "error", "says"),
    [
        (["z", "q"], WrongType, r"one site is swept at a time.*sweep each of \['z', 'q'\] alone"),
        (("z", "q"), WrongType, "needs an integer layer,"),
        (5, WrongType, "a site's name must be a string"),
        (None, WrongType, "a site's name must be a string"),
        (hl.site("z", 2), InputError, r"z at 2 asked for; there are layers 0 to 1 \(or -2 to -1\)"),
        (hl.site("scale", 0, "ln1"), KeyError, "no site to sweep named 'scale'"),
    ],
)
def test_a_site_that_cannot_be_swept_says_so(model, site, error, says):
    with refused(error, says):
        hl.patch(model, CLEAN, CORRUPTED, own, site=site)


def test_a_site_at_one_layer_where_all_are_swept():
    from hooklens.sweeps.planning import site_kind

    with pytest.raises(InputError, match="site is swept at every layer, and 'z at 5' is one layer's; give 'z'"):
        site_kind(hl.site("z", 5))


@pytest.mark.parametrize("kind", ["wrapped", "transformers"])
def test_another_kind_of_model_says_what_a_sweep_needs(model, kind):
    if kind == "wrapped":
        other: nn.Module = hl.wrap(nn.Linear(2, 2))
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, bos_token_id=0, eos_token_id=0)
        other = GPT2LMHeadModel(config)
    for ask in (lambda: hl.patch(other, CLEAN, CORRUPTED, own), lambda: hl.describe(other)):
        with refused(WrongType, r"needs a HookedTransformer, got \w+; hl.load\(\.\.\.\) makes one"):
            ask()


def test_prompts_that_cannot_be_used(model):
    metric = metric_of(model)
    with pytest.raises(InputError, match=r"got 3 and 4 tokens \(first difference at 2: '3' \| '4'\).*by='layer'"):
        hl.patch(model, [[1, 2, 3]], [[1, 2, 4, 3]], metric)
    with pytest.raises(InputError, match="same number of tokens"):
        hl.patch(model, [[1, 2, 3], [1, 2]], [[1, 4, 3], [1, 3]], metric)
    for empty in ([], [[]], [[1], []], torch.tensor([[]]), torch.zeros(1, 0).long(), torch.zeros(0, 3).long()):
        for prompts, name in (((empty, [1]), "clean"), (([1], empty), "corrupted")):
            with pytest.raises(InputError, match=f"{name} is empty or holds an empty prompt"):
                hl.patch(model, *prompts, metric)
    with pytest.raises(InputError, match="each prompt of clean is one row"):
        hl.patch(model, [torch.ones(1, 2).long()], [1], metric)
    with pytest.raises(InputError, match="2 clean and 1 corrupted"):
        hl.patch(model, CLEAN, CORRUPTED[:1], metric)
    with pytest.raises(InputError, match="n_ctx of 32"):
        hl.patch(tiny_model(), torch.ones(1, 33).long(), torch.zeros(1, 33).long(), own)
    with pytest.raises(InputError, match="between 0 and 10"):
        hl.patch(model, [[1, 11]], [[1, 2]], own)
    for wrong in (torch.rand(2, 3), torch.zeros(1, 2, 3).long(), [["a"]], 3.5, None):
        with pytest.raises(TypeError):
            hl.patch(model, wrong, CORRUPTED, metric)
    with pytest.raises(InputError, match="no tokenizer"):
        hl.patch(model, "a", "b", metric)


def test_metrics_that_do_not_fit_the_prompts(model):
    for n in (3, 5):
        with pytest.raises(InputError, match=f"made for {n} pairs, the prompts are 2"):
            hl.patch(model, CLEAN, CORRUPTED, hl.prob(model, answer=[1] * n))
    with pytest.raises(InputError, match="made for 2 pairs, the prompts are 4"):  # two groups of two
        clean, corrupted = [[1, 2], [3, 4], [1, 2, 3], [4, 5, 6]], [[1, 3], [3, 1], [1, 3, 3], [4, 1, 6]]
        hl.patch(model, clean, corrupted, hl.prob(model, answer=[1, 2]), site="z")
    with pytest.raises(InputError, match="plain function needs all pairs"):
        hl.patch(model, [[1, 2], [1, 2, 3]], [[1, 3], [1, 4, 3]], own, site="z")
    with pytest.raises(InputError, match=r"reads positions -9 to -9, and the prompts have 0 to 5 .*as pos="):
        hl.patch(model, CLEAN, CORRUPTED, hl.prob(model, answer=1, pos=-9))
    with pytest.raises(WrongType, match="a metric is a function of logits"):
        hl.patch(model, CLEAN, CORRUPTED, "logit_diff")

    class Wrong:
        reads = Reads(torch.tensor([-1, -1]), None)
        on_read = __call__ = staticmethod(lambda logits: logits[:, 0, 0])

    with pytest.raises(InputError, match=r"reads.pos of a metric is \[pair pos\]"):
        hl.patch(model, CLEAN, CORRUPTED, Wrong())
    Wrong.reads = Reads(torch.tensor([[-1], [-1]]), torch.tensor([[99]]))
    with pytest.raises(InputError, match="there are 0 to 10"):
        hl.patch(model, CLEAN, CORRUPTED, Wrong())


def test_values_that_do_not_fit(model):
    metric = metric_of(model)
    patch = functools.partial(hl.patch, model, CLEAN, CORRUPTED, metric, site="z")
    with pytest.raises(InputError, match=r"shape \[5\]; the activation is \[2, 6, 4, 4\]"):
        patch(value=torch.zeros(5))
    with pytest.raises(WrongType, match="must be a tensor or a number, got None"):
        patch(value=lambda act, name: None)
    with pytest.raises(KeyError, match="closest: zero"):
        patch(value="zeros")
    with pytest.raises(KeyError, match=r"no activation for blocks\.1\.attn\.hook_z \(1 of 2 points are missing\)"):
        patch(value={"blocks.0.attn.hook_z": torch.zeros(4)})
    for wrong in (None, 0.3, [1, 2]):
        with refused(WrongType, "value= is a word such as"):
            patch(value=wrong)
    with pytest.raises(InputError, match="there is one prompt"):
        hl.patch(model, CLEAN[:1], CORRUPTED[:1], hl.prob(model, answer=1), value="mean")
    with pytest.raises(InputError, match="mean pattern"):
        hl.patch(model, CLEAN, CORRUPTED, metric, site="pattern", value=hl.Mean([[1, 2, 3]]))
    with pytest.raises(InputError, match="patterns of prompts of different length"):
        hl.patch(model, [[1, 2, 3]], [[1, 3]], hl.prob(model, answer=1), site="pattern")


def test_a_sweep_shows_its_progress_where_it_is_asked_to(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stream for a terminal
    monkeypatch.setenv("TERM", "xterm")
    model = tiny_model()
    clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    with hl.engine(progress=True):
        hl.patch(model, clean, corrupted, hl.logit_diff(model, answer=1, wrong_answer=2), site="z")
    assert "patching z" in capsys.readouterr().err
    hl.patch(model, clean, corrupted, hl.logit_diff(model, answer=1, wrong_answer=2), site="z")
    assert not capsys.readouterr().err  # no terminal, nothing shown

"""A sweep that goes on from a file is the sweep that was begun, bit for bit, or it is refused."""

import decimal
import functools
import sys
import threading
import types

import numpy as np
import pytest
import torch
from model.zoo import wrap_layers, zoo_model
from packing import needs_packing
from torch import Tensor, nn

import hooklens as hl
from hooklens.core.errors import CheckFailed, FileRefused, InputError
from hooklens.model.linear import packing_works
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import run_edges

CORRUPTED = torch.tensor([[1, 5, 2, 7, 3, 6], [4, 4, 9, 0, 10, 2]])
CLEAN = torch.tensor([[1, 5, 8, 7, 3, 6], [4, 4, 9, 0, 1, 2]])

settings = types.ModuleType("settings")
sys.modules["settings"] = settings
_scale: object = 1.0
_MODEL = zoo_model("llama", dtype=torch.float64)


def margin(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


_BASE = margin(_MODEL(CORRUPTED)).detach()


def own(logits: Tensor) -> Tensor:
    """0 on the run that is patched, whatever it is multiplied by: nothing computed there tells two metrics apart."""
    return margin(logits) - _BASE


def helper(value: Tensor) -> Tensor:
    return value * float(_scale)


class Scaled:
    scale = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        return own(logits) * self.scale

    def by_method(self, logits: Tensor) -> Tensor:
        return own(logits) * self.scale


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, logits: Tensor) -> Tensor:
        return own(logits) * self.scale


class Holding:
    """What holds the scale, and how deep, is the test's."""

    def __init__(self, held, read):
        self.held, self.read = held, read

    def __call__(self, logits: Tensor) -> Tensor:
        return own(logits) * self.read(self.held)


def nested(scale: float, depth: int = 30):
    return scale if depth == 0 else [nested(scale, depth - 1)]


def innermost(held) -> float:
    return innermost(held[0]) if isinstance(held, list) else held


def scaled(logits: Tensor, scale: float) -> Tensor:
    return own(logits) * scale


def in_globals(scale: float):
    globals()["_scale"] = scale
    return lambda logits: own(logits) * float(_scale)


def in_helpers_globals(scale: float):
    globals()["_scale"] = scale
    return lambda logits: helper(own(logits))


def in_class_attribute(scale: float):
    Scaled.scale = scale
    return Scaled()


def in_module_attribute(scale: float):
    settings.scale = scale
    return lambda logits: own(logits) * settings.scale


def in_module_imported_when_called(scale: float):
    settings.scale = scale

    def metric(logits: Tensor) -> Tensor:
        import settings as inner

        return own(logits) * inner.scale

    return metric


def in_function_attribute(scale: float):
    def metric(logits: Tensor) -> Tensor:
        return own(logits) * metric.scale

    metric.scale = scale
    return metric


def in_default_argument(scale: float):
    def metric(logits: Tensor, scale: float = scale) -> Tensor:
        return own(logits) * scale

    return metric


def in_bound_method(scale: float):
    found = Scaled()
    found.scale = scale
    return found.by_method


def in_cached_function(scale: float):
    @functools.lru_cache
    def factor() -> float:
        return scale

    return lambda logits: own(logits) * factor()


CONSTRUCTIONS = {
    "globals": in_globals,
    "helper function": in_helpers_globals,
    "class attribute": in_class_attribute,
    "numpy array": lambda scale: Holding(np.array([scale]), lambda held: float(held[0])),
    "slots": Slotted,
    "Decimal": lambda scale: Holding(decimal.Decimal(scale), float),
    "deep nesting": lambda scale: Holding(nested(scale), innermost),
    "partial": lambda scale: functools.partial(scaled, scale=scale),
    "closure": lambda scale: lambda logits: own(logits) * scale,
    "bound method": in_bound_method,
    "default argument": in_default_argument,
    "module attribute": in_module_attribute,
    "module imported when called": in_module_imported_when_called,
    "function attribute": in_function_attribute,
    "cached function": in_cached_function,
    "tensor attribute": lambda scale: Holding(torch.tensor(scale), float),
}


@pytest.fixture
def model():
    return zoo_model("llama", dtype=torch.float64)


@pytest.fixture
def run(model, tmp_path):
    return functools.partial(hl.patch, model, CLEAN, CORRUPTED, site="z", resume=tmp_path / "sweep")


# -- another sweep


@pytest.mark.parametrize("make", CONSTRUCTIONS.values(), ids=list(CONSTRUCTIONS))
def test_a_metric_ten_times_as_large_is_another_sweep_wherever_its_scale_is_kept(run, make):
    first = run(make(1.0))
    assert torch.equal(run(make(1.0)).per_pair, first.per_pair)
    with pytest.raises(FileRefused, match="another sweep"):
        run(make(10.0))


def adding(scale: float):
    return lambda act, name: act + scale


@pytest.mark.parametrize("of", [adding, lambda scale: torch.tensor(scale, dtype=torch.float64)])
def test_other_values_to_write_are_another_sweep(run, of):
    run(own, value=of(1.0))
    run(own, value=of(1.0))
    with pytest.raises(FileRefused, match="another sweep"):
        run(own, value=of(1.0 + 1e-6))


def test_other_reference_prompts_are_another_sweep(run):
    run(own, value=hl.Mean(reference=[[1, 2, 3]]))
    run(own, value=hl.Mean(reference=[[1, 2, 3]]))
    with pytest.raises(FileRefused, match="another sweep"):
        run(own, value=hl.Mean(reference=[[1, 2, 4]]))


def test_given_activations_count_to_the_last_bit(model, run):
    cache = dict(model.run_with_cache(CORRUPTED, names="z")[1])
    run(own, value=cache)
    with pytest.raises(FileRefused, match="another sweep"):
        run(own, value={name: act * (1 + 1e-9) for name, act in cache.items()})


def test_a_hook_of_another_strength_is_another_sweep(model, run):
    def steered(strength: float):
        return model.hooks(fwd_hooks=[(("resid_post", 1), lambda act, hook: act * strength)])

    with steered(1.5):
        run(own)
        run(own)
    with steered(1.5 + 1e-6), pytest.raises(FileRefused, match="another sweep"):
        run(own)
    with pytest.raises(FileRefused, match="another sweep"):
        run(own)


def test_an_adapter_of_another_scale_is_another_sweep(model, run):
    """Its scale is a number on a module, which no state_dict holds."""
    wrap_layers(model, "mlp.out")
    model.blocks[0].mlp.out.alpha = 1.0
    run(own)
    model.blocks[0].mlp.out.alpha = 2.0
    with pytest.raises(FileRefused, match="another sweep"):
        run(own)


# -- what cannot be hashed


def test_a_metric_that_cannot_be_hashed_is_refused_and_a_key_takes_its_place(model, run, tmp_path):
    metric = Holding(threading.Lock(), lambda held: 1.0)
    with pytest.raises(InputError, match=r"the metric\.held is a _thread\.lock.*hl\.Resume\(.*key="):
        run(metric)
    assert not (tmp_path / "sweep").exists()
    named = hl.Resume(tmp_path / "sweep", key="margin")
    first = run(metric, resume=named)
    assert torch.equal(run(metric, resume=named).per_pair, first.per_pair)
    with pytest.raises(FileRefused, match="another sweep"):
        run(metric, resume=hl.Resume(tmp_path / "sweep", key="another"))


def test_under_one_key_other_weights_or_prompts_are_still_another_sweep(model, run, tmp_path):
    named = hl.Resume(tmp_path / "sweep", key="margin")
    run(own, resume=named)
    with torch.no_grad():
        model.blocks[0].mlp.out.weight[0, 0] += 1e-6
    with pytest.raises(FileRefused, match="another sweep"):
        run(own, resume=named)


def test_a_key_took_another_value_to_write_for_the_same_where_nothing_was_verified(model, run, tmp_path):
    named = hl.Resume(tmp_path / "sweep", key="margin")
    kept = torch.arange(circuit_graph(model).n_edges) % 2 == 0
    edges = functools.partial(run_edges, model, kept, CLEAN, CORRUPTED, margin)
    with hl.engine(verify=0):
        first = run(own, value="zero", resume=named)
        assert torch.equal(run(own, value="zero", resume=named).per_pair, first.per_pair)
        with pytest.raises(FileRefused, match="another sweep"):
            run(own, value=torch.full((4,), 1e-6, dtype=torch.float64), resume=named)
        edges(value="zero", resume=hl.Resume(tmp_path / "edges", key="margin"))
        with pytest.raises(FileRefused, match="another sweep"):
            edges(value="mean", resume=hl.Resume(tmp_path / "edges", key="margin"))


def test_under_a_key_a_value_that_cannot_be_hashed_counts_by_its_name(run, tmp_path):
    lock, named = threading.Lock(), hl.Resume(tmp_path / "sweep", key="margin and doubled")
    doubled = lambda act, name: act * (1 + (lock is not None))  # noqa: E731
    first = run(own, value=doubled, resume=named)
    assert torch.equal(run(own, value=doubled, resume=named).per_pair, first.per_pair)


@pytest.mark.parametrize("plain", [False, True])
def test_what_a_wrong_key_brings_back_is_checked_and_raises(run, tmp_path, plain):
    """The key says "margin" for a metric ten times as large."""
    named = hl.Resume(tmp_path / "sweep", key="margin")
    with hl.engine(plain=plain):
        run(own, resume=named)
        with pytest.raises(CheckFailed, match=r"z at L\dH\d, kept in .*sweep.* another sweep"):
            run(lambda logits: 10 * own(logits), resume=named)


def test_a_metric_that_keeps_what_it_worked_out_is_the_same_before_and_after(run):
    class Margin:
        def __init__(self, scale: float):
            self.scale = scale

        @functools.cached_property
        def double(self) -> float:
            return 2 * self.scale

        def __call__(self, logits: Tensor) -> Tensor:
            return self.double * own(logits)

    metric = Margin(2.0)
    first = run(metric)
    assert torch.equal(run(metric).per_pair, first.per_pair)
    assert torch.equal(run(Margin(2.0)).per_pair, first.per_pair)
    with pytest.raises(FileRefused, match="another sweep"):
        run(Margin(2.5))


# -- the same bits


KERNELS = ["linear"] + ["packed"] * packing_works()


class Rounding(nn.Module):
    """A layer whose last digits depend on how many rows it multiplies at once, as those of many kernels do."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1 + 1e-6 * x.shape[:-1].numel())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("site", "memory"), [("z", 100_000), ("resid_pre", 30_000)])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch, site, memory, kernel):
    """What is left after the first bin runs in the bins it would have run in."""
    from hooklens.sweeps import execution as module

    model = zoo_model("llama", n_layers=4, d_model=48, d_mlp=192)
    for block in model.blocks:
        block.mlp.out = Rounding(block.mlp.out)
    patch = functools.partial(hl.patch, model, CLEAN, CORRUPTED, margin, site=site)
    right, bins, stops = module._run_bin, [], [1]

    def run_bin(plan, reader, items, *rest):
        if len(bins) in stops:
            stops.clear()
            raise KeyboardInterrupt
        bins.append([(item.patch, item.pair) for item in items])
        right(plan, reader, items, *rest)

    monkeypatch.setattr(module, "_run_bin", run_bin)
    with hl.engine(kernel=kernel, memory=memory, verify=0):
        with pytest.raises(KeyboardInterrupt):
            patch(resume=tmp_path / "sweep")
        resumed = patch(resume=tmp_path / "sweep")
        whole = patch()
    n = len(bins) // 2
    assert n > 2 and bins[:n] == bins[n:]
    assert torch.equal(resumed.per_pair, whole.per_pair)
    assert resumed.kernel == whole.kernel == kernel


@needs_packing
def test_a_file_remembers_its_kernel(tmp_path, monkeypatch):
    """Whatever the timing at the start of the next process says."""
    from hooklens.model import linear

    model = zoo_model("llama")
    patch = functools.partial(hl.patch, model, CLEAN, CORRUPTED, own, site="z")
    for kernel, pays in (("packed", False), ("linear", True)):
        path = tmp_path / kernel
        with hl.engine(kernel=kernel):
            first = patch(resume=path)
        monkeypatch.setattr(linear, "packing_pays", lambda rows=240, pays=pays: pays)
        assert patch().kernel != kernel
        again = patch(resume=path)
        assert (first.kernel, again.kernel) == (kernel, kernel) and torch.equal(first.per_pair, again.per_pair)
        other = "linear" if kernel == "packed" else "packed"
        with hl.engine(kernel=other), pytest.raises(InputError, match=f"begun with kernel='{kernel}'"):
            patch(resume=path)
    monkeypatch.setenv(linear.ENV, "0")
    with pytest.raises(hl.HooklensError, match="packed products"):
        patch(resume=tmp_path / "packed")


def test_a_setting_pins_the_kernel_also_inside_a_block_that_chose_another():
    model = zoo_model("llama")
    for kernel in KERNELS:
        for enabled in (False, True):
            with hl.packed_linears(enabled=enabled), hl.engine(kernel=kernel):
                assert hl.patch(model, CLEAN, CORRUPTED, own, site="z").kernel == kernel
    with pytest.raises(InputError, match="kernel is 'linear', 'packed' or None"):
        hl.engine(kernel="fast")
    if "packed" in KERNELS:
        with hl.engine(kernel="packed"):  # there is none for float64, and the result says so
            assert hl.patch(model.double(), CLEAN, CORRUPTED, own, site="z").kernel == "linear"

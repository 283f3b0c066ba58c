"""Arguments of a wrong kind or size: named, with what was seen, not an error from inside torch or Python."""

import re
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from refused import refused

import hooklens as hl
from hooklens.anatomy.description import describe
from hooklens.core.arguments import check_call, seed_number, seeded, whole
from hooklens.core.errors import HooklensError, InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.metrics import logit_diff
from hooklens.plugins import available
from hooklens.pretrained.checkpoint import load_checkpoint, save
from hooklens.results.result import Result
from hooklens.results.result_file import known_classes
from hooklens.results.statistics import mean_interval
from hooklens.studies import study_lens, study_pair
from hooklens.testing import tiny_model

MODEL = tiny_model()
TOKENS = torch.tensor([[1, 2, 3]])
METRIC = logit_diff(MODEL, answer=5, wrong_answer=6)
CACHE = MODEL.run_with_cache(TOKENS)[1]
SWEEP = hl.patch(MODEL, TOKENS, torch.tensor([[1, 4, 3]]), METRIC)
ACTIVATION = torch.zeros(1, 3, 2, 4)


def generate(**options: Any) -> Any:
    return MODEL.generate([1, 2], 2, **options)


def patch(**options: Any) -> Any:
    return hl.patch(MODEL, TOKENS, torch.tensor([[1, 4, 3]]), METRIC, **options)


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "decompose_resid(1.0)": (lambda: CACHE.decompose_resid(1.0), r"layer is the number of a layer.* got 1\.0"),
    "decompose_resid('a')": (lambda: CACHE.decompose_resid("a"), "layer is .* got 'a'"),
    "accumulated_resid(True)": (lambda: CACHE.accumulated_resid(True), "layer is .* got True"),
    "stack_head_results(True)": (lambda: CACHE.stack_head_results(True), "layer is .* got True"),
    "logit_attrs(3)": (lambda: CACHE.logit_attrs(3, 1), "a stack is a tensor .* got 3"),
    "cache.to('nope')": (lambda: CACHE.to("nope"), "device='nope' cannot be used here"),
    "cache.to(dtype=3)": (lambda: CACHE.to(dtype=3), "dtype is a floating-point torch.dtype .* got 3"),
    "stop_at_layer='a'": (lambda: MODEL.run_with_cache(TOKENS, stop_at_layer="a"), "stop_at_layer is .* got 'a'"),
    "stop_at_layer=True": (lambda: MODEL(TOKENS, stop_at_layer=True), "stop_at_layer is .* got True"),
    "start_at_layer=1.0": (lambda: MODEL(torch.zeros(1, 2, 8), start_at_layer=1.0), r"start_at_layer is .* got 1\.0"),
    "kv_cache=3": (lambda: MODEL(TOKENS, kv_cache=3), "kv_cache must be an hl.KVCache"),
    "top_k=True": (lambda: generate(temperature=1.0, top_k=True), "top_k is a whole number, got True"),
    "temperature=True": (lambda: generate(temperature=True), "temperature is a number, got True"),
    "seed=2**70": (lambda: generate(temperature=1.0, seed=2**70), "seed is a whole number from"),
    "seed=2**70, greedy": (lambda: generate(seed=2**70), "seed is a whole number from"),
    "stream=3": (lambda: generate(stream=3), "stream is True, .* got 3"),
    "capture={True: 'z'}": (lambda: generate(capture={True: "z"}), "capture asks for step True"),
    "sweep.top(1.5)": (lambda: SWEEP.top(1.5), r"k is a whole number of at least 0, got 1\.5"),
    "sweep.top(-1)": (lambda: SWEEP.top(-1), "k is a whole number of at least 0, got -1"),
    "sweep.top(k=True)": (lambda: SWEEP.top(k=True), "k is a whole number of at least 0, got True"),
    "sweep.table(-1)": (lambda: SWEEP.table(-1), "n is a whole number of at least 0, got -1"),
    "sweep.table().head('2')": (lambda: SWEEP.table().head("2"), "n is a whole number of at least 0, got '2'"),
    "sweep.figure(1.5)": (lambda: SWEEP.figure(1.5), r"rows is a whole number of at least 1, got 1\.5"),
    "by=3": (lambda: patch(by=3), "by is the grid .* got 3"),
    "by=[['pos']]": (lambda: patch(by=[["pos"]]), "by is the grid .* got"),
    "resume=3": (lambda: patch(resume=3), "resume is the path of a file .* got 3"),
    "resume=Resume(3)": (lambda: patch(resume=hl.Resume(3)), "resume is the path of a file .* got 3"),
    "resume=''": (lambda: patch(resume=""), "resume is empty"),
    "save(model, 3)": (lambda: save(MODEL, 3), "path is the path of a file .* got 3"),
    "save(model, '')": (lambda: save(MODEL, ""), "path is empty"),
    "load_checkpoint(3)": (lambda: load_checkpoint(3), "path is the path of a file .* got 3"),
    "cache.save(3)": (lambda: CACHE.save(3), "path is the path of a file .* got 3"),
    "cache.save('')": (lambda: CACHE.save(""), "path is empty"),
    "ActivationCache.load(3)": (lambda: hl.ActivationCache.load(3), "path is the path of a file .* got 3"),
    "sweep.save(3)": (lambda: SWEEP.save(3), "path is the path of a file .* got 3"),
    "Result.load(b'a')": (lambda: Result.load(b"a"), "path is the path of a file .* got b'a'"),
    "a hook of one argument": (
        lambda: MODEL.run_with_hooks(TOKENS, fwd_hooks=[("z", lambda act: act)]),
        r"called with two arguments, \(act, hook\) .* takes \(act\)",
    ),
    "add_hook of one argument": (lambda: MODEL.add_hook("z", lambda act: act), "called with two arguments"),
    "a backward hook of three": (
        lambda: MODEL.hooks(bwd_hooks=[("z", lambda act, hook, more: act)]),
        "called with two arguments",
    ),
    "engine(seed=2**70)": (lambda: hl.engine(seed=2**70), "seed is a whole number from"),
    "a model's seed": (lambda: hl.HookedTransformer(MODEL.cfg, seed=-(2**63) - 1), "seed is a whole number from"),
    "an interval's seed": (lambda: mean_interval(torch.randn(8, 2), seed=2**64), "seed is a whole number from"),
    "W_K[9]": (lambda: MODEL.blocks[0].attn.W_K[9], r"index 9 does not fit a weight of shape .* per key/value head"),
    "b_V[9]": (lambda: MODEL.blocks[0].attn.b_V[9], "index 9 does not fit a weight of shape"),
    "model.W_V[0][9]": (lambda: MODEL.W_V[0][9], "index 9 does not fit a weight of shape"),
    "model.W_V[:][0, 9]": (lambda: MODEL.W_V[:][0, 9], r"index \(0, 9\) does not fit a weight of shape"),
    "model.QK[0, 9]": (lambda: MODEL.QK[0, 9], r"index \(0, 9\) does not fit a FactoredMatrix"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_named_with_what_was_seen(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask, says = CALLS[call]
    with refused(HooklensError, says):
        ask()
    assert not list(tmp_path.iterdir())


def test_an_index_past_the_key_value_heads_is_an_index_error_too_and_writes_are_checked():
    attn = tiny_model(n_heads=4, n_key_value_heads=2).blocks[0].attn
    with pytest.raises(IndexError, match="query head h reads entry"):
        attn.W_K[3]
    with pytest.raises(IndexError, match="query head h reads entry"), torch.no_grad():
        attn.W_V[3] = 0
    with torch.no_grad():
        attn.W_K[1] = 7.0
    assert (attn.k.weight.view(2, attn.d_head, -1)[1] == 7).all() and type(attn.W_K[1]) is torch.Tensor


def test_hooks_of_every_kind_that_take_two_arguments_are_accepted():
    class Hook:
        def __call__(self, act, hook):
            return act

        def method(self, act, *rest, scale=1.0):
            return act * scale

    for fn in (Hook(), Hook().method, lambda *given: given[0], lambda act, hook, scale=1: act * scale, max):
        MODEL.hooks(fwd_hooks=[("z", fn)])


def test_seeds_draw_what_torch_draws_and_one_that_overflows_when_layers_are_counted_in_is_taken():
    for seed in (0, 17, 2**32 - 1):  # of other numbers torch reads the last 32 bits only, so that they are hashed
        plain = torch.Generator().manual_seed(seed)
        assert torch.equal(torch.rand(3, generator=seeded(seed)), torch.rand(3, generator=plain))
    of_layer = torch.Generator().manual_seed(5 * 1_000_003 + 2)
    assert torch.equal(torch.rand(3, generator=seeded(5, 2, stride=1_000_003)), torch.rand(3, generator=of_layer))
    one, other = (torch.rand(3, generator=seeded(2**64 - 1, layer, stride=1_000_003)) for layer in (1, 2))
    assert not torch.equal(one, other)
    for wrong in (True, 1.0, "1", None, 2**64):
        with pytest.raises((HooklensError, TypeCheckError)):
            seed_number(wrong)


def test_no_module_makes_a_generator_from_a_seed_on_its_own():
    sources = Path(hl.__file__).parent.rglob("*.py")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sources
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"manual_seed\((?!\d+\))", line)
        and ">>>" not in line
        and path.name not in ("arguments.py", "loop.py")  # loop.py: on the device of the model
    ]
    assert found == []


def test_the_number_of_rows_is_checked_by_every_result():
    for plugin in available():
        plugin.load()
    for cls in known_classes().values():
        if cls.__module__.startswith("hooklens.") and cls is not Result:
            ranked = [name for name in ("table", "top") if name in vars(cls)]
            assert all(hasattr(vars(cls)[name], "__wrapped__") for name in ranked), cls


class Static:
    __call__ = staticmethod(lambda logits: logits)


@pytest.mark.parametrize("function", [Static(), torch.sum, torch.nn.Identity(), partial(max, 1), lambda a, *b: a])
def test_whatever_can_be_called_so_passes_even_where_inspect_sees_too_few_arguments(function):
    check_call("metric", function, "logits")


def test_a_wrapper_is_called_with_its_own_arguments_and_a_module_with_those_of_its_forward():
    """What functools.wraps wraps was checked in place of the wrapper; any module passed, and failed in torch."""

    @wraps(lambda logits, other: None)
    def wrapper(logits):
        return logits

    check_call("metric", wrapper, "logits")
    check_call("value", torch.nn.Bilinear(1, 1, 1), "activation", "point")
    with pytest.raises(HooklensError, match=r"Bilinear.*was given: missing a required argument: 'input2'"):
        check_call("metric", torch.nn.Bilinear(1, 1, 1), "logits")


def test_a_complex_metric_is_refused_and_not_read_as_its_real_part():
    with refused(HooklensError, "the metric returned complex values, .*j"):
        hl.patch(MODEL, TOKENS, torch.tensor([[1, 4, 3]]), lambda logits: logits[:, -1, 5] * 1j)


def test_whole_takes_numpy_numbers_and_none_of_the_rest():
    import numpy as np

    assert whole("k", np.int64(3)) == 3
    for wrong in (True, 1.0, "1", None, -1, torch.tensor(1)):
        with pytest.raises((HooklensError, TypeCheckError), match="k is a whole number of at least 0"):
            whole("k", wrong)


def test_a_number_or_nothing_where_a_list_is_taken_was_a_bare_error_or_ignored():
    model = tiny_model()
    pairs = demo_pairs(model, 2)
    scores = hl.circuits.eap(model, pairs)
    takes = {
        "sizes": lambda value: hl.circuits.trace_faithfulness(model, scores, pairs, sizes=value),
        "lengths": lambda value: describe(model, lengths=value),
        "names": lambda value: study_lens(model, [[1, 2, 3]], names=value),
        "sites": lambda value: study_pair(model, pairs[:1], sites=value),
    }
    alone = {"sizes": 40, "lengths": 3, "names": "a prompt", "sites": "resid_pre"}
    results = {name: call(alone[name]) for name, call in takes.items()}
    assert results["sizes"].sizes[-1] <= 40 and results["lengths"].timing.lengths.tolist() == [3]
    assert results["names"].names == ["a prompt"] and list(results["sites"].sweeps) == ["resid_pre"]
    for name, call in takes.items():
        for value in ([], (), {}):
            with refused(InputError, f"{name} takes a list of at least one value, got"):
                call(value)
    for name, value in (("sizes", [1.5]), ("lengths", 0), ("names", ["a", "b"]), ("sites", 5)):
        with refused(HooklensError, "whole number|one per prompt|a site's name must be"):
            takes[name](value)

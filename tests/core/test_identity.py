"""Two values have one identity if, and only if, nothing that they refer to tells them apart."""

import collections
import contextvars
import enum
import functools
import logging
import math
import operator
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hooklens.core.cache import ActivationCache
from hooklens.core.errors import InputError
from hooklens.core.fingerprint import identity
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Point(NamedTuple):
    x: int
    y: int = 0


@dataclass(frozen=True)
class Data:
    x: object
    held: object = None


class Words(list):
    pass


def marked(array, mark):
    array.mark = mark
    return array


class Marked(np.ndarray):
    pass


def module_of(scale: float, **changes) -> nn.Module:
    made = nn.Linear(2, 2)
    nn.init.constant_(made.weight, scale)
    nn.init.zeros_(made.bias)
    vars(made).update(changes)
    return made


_FACTOR = 1.0


@functools.wraps(F.softmax)
def wrapping(x):
    return F.softmax(x, -1) * _FACTOR


PAIRS = [
    (1, 1.0),
    (1, True),
    (0.0, -0.0),
    ("a", b"a"),
    ((1, 2), [1, 2]),
    ([1, [2]], [[1], 2]),
    ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    ({1, 2}, {1, 3}),
    (Colour.RED, Colour.BLUE),
    (Point(1), Point(2)),
    (Data(1), Data(2)),
    (Words("ab"), Words("ac")),
    (collections.OrderedDict(a=1), {"a": 1}),
    (np.zeros(2, "f4"), np.zeros(2, "i4")),
    (np.array([1, "a"], object), np.array([1, "b"], object)),
    (np.ma.masked_array([1, 2], [0, 1]), np.ma.masked_array([1, 2], [1, 0])),
    (marked(np.zeros(1).view(Marked), 1), marked(np.zeros(1).view(Marked), 2)),
    (np.float32(1), np.float64(1)),
    (torch.ones(2), torch.ones(2).double()),
    (torch.ones(2), torch.ones(2, 1)),
    (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])),
    (re.compile("a"), re.compile("a", re.I)),
    (operator.itemgetter(1), operator.itemgetter(2)),
    (functools.partial(torch.sum, dim=1), functools.partial(torch.sum, dim=2)),
    (torch.sum, torch.mean),
    (torch.ones(2).sum, torch.zeros(2).sum),
    (str.upper, str.lower),
    (F.relu, F.gelu),
    (np.sum, np.mean),
    (slice(1), slice(2)),
    (module_of(1.0), module_of(2.0)),
    (module_of(1.0, alpha=1), module_of(1.0, alpha=2)),
    (module_of(1.0, training=True), module_of(1.0, training=False)),
    (lambda x: math.pi * x, lambda x: math.e * x),
    (lambda x: [y * 1 for y in x], lambda x: [y * 2 for y in x]),
    (lambda x: Colour.RED, lambda x: Colour.BLUE),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=map(str, range(len(PAIRS))))
def test_values_that_differ_have_two_identities(one, other):
    assert identity(one) == identity(one) != identity(other) == identity(other)
    assert identity(Data(0, [one])) != identity(Data(0, [other]))


def test_a_wrapper_that_calls_itself_a_library_function_is_read_all_the_same(monkeypatch):
    before = identity(wrapping)
    monkeypatch.setitem(globals(), "_FACTOR", 2.0)
    assert identity(wrapping) != before


def test_values_made_twice_have_one_identity():
    def made():
        model = tiny_model()
        model.tokenizer = tiny_tokenizer("Ġa Ġb")
        ring: list = [1, {"b", "a", "c"}]
        ring.append(ring)
        return [ring, Data({"x": ring}), model, logging.getLogger("a"), lambda x: model(x) + made.__code__.co_argcount]

    assert identity(made()) == identity(made())


def test_one_number_out_of_a_column_had_no_identity_and_could_not_be_saved(tmp_path):
    """It is contiguous with the column's stride, which torch's view as bytes refuses."""
    one = torch.arange(6.0).view(2, 3)[:1, 1].as_strided((1,), (3,))
    assert one.is_contiguous() and one.stride() == (3,)
    assert identity(one) == identity(one.clone(memory_format=torch.contiguous_format))
    ActivationCache({"blocks.0.hook_resid_pre": one.view(1, 1, 1).as_strided((1, 1, 1), (3, 3, 3))}).save(
        tmp_path / "c"
    )
    assert ActivationCache.load(tmp_path / "c")["resid_pre", 0].item() == 1.0


def test_hooks_and_caches_of_a_model_are_passing():
    model = tiny_model()
    before = identity(model)
    handle = model.add_hook("z", lambda act, hook: act)
    model(torch.tensor([[1, 2]]))
    assert identity(model) == before
    handle.remove()


def test_torch_hooks_count_by_what_they_do_and_not_by_their_number():
    def hooked(scale: float) -> nn.Module:
        made = module_of(1.0)
        made.register_forward_hook(lambda module, args, out: out * scale)
        return made

    assert identity(hooked(1.0)) == identity(hooked(1.0)) != identity(hooked(2.0))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (threading.Lock(), "_thread.lock"),
        ((i for i in ()), "generator"),
        (contextvars.ContextVar("x"), "ContextVar"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
        (lambda x: eval("x"), "eval"),
        (lambda x: input(x), "input"),
        (lambda x: globals()["_FACTOR"], "globals"),
    ],
    ids=range(8),
)
def test_what_cannot_be_read_is_refused_and_named(value, named):
    with pytest.raises(InputError, match=rf"the metric\.held\.\[0\].*{named}.*cannot be compared"):
        identity(Data(0, [value]), "the metric")


def test_a_value_nested_beyond_all_measure_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deeply"):
        identity(deep)
    while deep:  # taken apart by hand: freeing it would recurse
        deep = deep[0]


SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
from core import test_identity as t
values = [a for a, _ in t.PAIRS] + [t.wrapping, {"b", "a", "c"}, t.tiny_model()]
print(*map(t.identity, values))
"""


@pytest.mark.slow
def test_identities_are_the_same_in_every_process(request):
    tests = str(request.config.rootpath / "tests")
    said = [
        subprocess.run([sys.executable, "-c", SCRIPT, tests], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert said[0] == said[1] and len(said[0].split()) == len(PAIRS) + 3

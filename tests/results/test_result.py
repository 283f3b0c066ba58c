"""Results: a compact repr, and a file that gives back exactly what was saved or is refused."""

import contextlib
import importlib
import json
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooklens.core.envelope import write_envelope
from hooklens.core.errors import FileRefused, InputError, Unavailable, WrongType
from hooklens.plugins import available
from hooklens.plugins.heads import score_heads
from hooklens.results.result import Result, Table, plain, summary
from hooklens.results.result_file import _SCHEMA, GROUP, known_classes
from hooklens.testing import tiny_model

PLUGIN = """
from dataclasses import dataclass, field
from typing import Any
from hooklens.results.result import Result

@dataclass(frozen=True, eq=False)
class Box(Result):
    value: Any
    note: str = "none"
    def __post_init__(self):
        if isinstance(self.value, str) and self.value == "never":
            raise RuntimeError("never is not accepted")

class NotAResult:
    def __init__(self, **values):
        raise AssertionError("a class that is no Result was built from a file")
"""


def install(folder: Path, name: str, source: str = PLUGIN) -> None:
    """A distribution with one plugin module, as pip would leave it in `folder`."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}_dist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {name}\n")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    install(folder, "boxes")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield importlib.import_module("boxes")
    sys.path.remove(str(folder))
    sys.modules.pop("boxes")


@dataclass(frozen=True, eq=False)
class Homeless(Result):
    values: Tensor
    clean: float
    site: str = "z"
    inner: Any = None


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type, all the way down; NaN equals NaN, and 0.0 differs from -0.0."""
    if isinstance(a, Tensor):
        bits = a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if type(a) is not type(b):
        return False
    if isinstance(a, Result):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or (a != a and b != b))
    return a == b


def round_trip(result, folder):
    result.save(folder / "result.safetensors")
    return Result.load(folder / "result.safetensors")


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 3), max_size=3)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800")
tensors = st.builds(
    lambda shape, dtype, flip: (
        (torch.randn(shape) * 9).to(dtype).transpose(0, -1 if flip and shape else 0)
        if shape
        else torch.tensor(3.5).to(dtype)
    ),
    SHAPES,
    st.sampled_from([*DTYPES, torch.complex64, torch.complex128]),
    st.booleans(),
)
nested = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.tuples(st.integers(), st.text(max_size=2)), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=nested, note=st.text())
def test_any_nested_structure_comes_back_exactly(plugin, tmp_path, value, note):
    result = plugin.Box([value, plugin.Box(value)], note)
    back = round_trip(result, tmp_path)
    assert type(back) is plugin.Box
    assert same(result, back)


def test_views_that_share_memory_come_back_whole_and_alone(plugin, tmp_path):
    base = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    views = [base[1:], base.T, base[:, ::2], base[0].expand(5, 4), base, base]
    back = round_trip(plugin.Box(views), tmp_path).value
    assert all(torch.equal(a, b) for a, b in zip(views, back, strict=True))
    assert not any(tensor.requires_grad for tensor in back)
    with safe_open(tmp_path / "result.safetensors", framework="pt") as file:
        assert len(file.keys()) == 5  # the same tensor twice is kept once


def test_loaded_tensors_do_not_map_the_file(plugin, tmp_path):
    path = tmp_path / "result.safetensors"
    back = round_trip(plugin.Box(torch.ones(4096)), tmp_path).value
    path.write_bytes(bytes(path.stat().st_size))
    assert back.sum() == 4096


def test_saving_over_a_result_that_fails_keeps_the_old_one(plugin, tmp_path):
    path = tmp_path / "a.safetensors"
    plugin.Box(1).save(path)
    with pytest.raises(WrongType, match=r"Box.value\[0\]\['x'\]\[1\] is a set"):
        plugin.Box([{"x": {1}}]).save(path)
    assert Result.load(path).value == 1
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_tensors_without_plain_bytes_are_refused_when_saving(plugin, tmp_path, value):
    with pytest.raises(WrongType, match=r"Box.value"):
        plugin.Box(value).save(tmp_path / "a")


def test_every_truncation_is_refused(plugin, tmp_path):
    path = tmp_path / "a.safetensors"
    plugin.Box([torch.arange(5), {"k": 1.5}]).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(FileRefused):
            Result.load(path)


def test_every_flipped_byte_is_refused_or_changes_nothing(plugin, tmp_path):
    path = tmp_path / "a.safetensors"
    original = plugin.Box([torch.arange(5), {"k": 1.5}])
    original.save(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with contextlib.suppress(FileRefused):
            assert same(Result.load(path), original)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", b"\x80\x04pickle.", bytes(2000)])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FileRefused, match=r"cannot read a result from .* it is (not|cut|damaged)"):
        Result.load(tmp_path / "a")


def test_a_safetensors_file_of_another_kind_is_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a", {"format": "pt"})
    with pytest.raises(FileRefused, match=r"its schema is None and not 'hooklens.result'"):
        Result.load(tmp_path / "a")


def test_a_missing_file_is_told_as_such(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Result.load(tmp_path / "a")


def forge(path: Path, body: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """A file with a valid digest and any body: what somebody could send."""
    write_envelope(path, _SCHEMA, body, tensors)
    return path


def node(**changes: Any) -> dict:
    return {
        "result": {
            "plugin": "boxes",
            "package": "boxes-dist",
            "module": "boxes",
            "class": "Box",
            "fields": {"value": 1},
        }
        | changes
    }


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[" * 100_000,
        [[[[]]]],
        3,
        {"dict": [[1, 2]]},
        {"call": "os.system"},
        {"tensor": "7"},
        {"tensor": ["7"]},
        {"result": {}},
        {"result": 5},
        node(fields={"value": {"tensor": "7"}}),
        node(fields={"value": {"dict": [[[], 1]]}}),
        node(fields={}),
        node(fields={"value": 1, "unknown": 2}),
        node(fields={"value": "never"}),
    ],
)
def test_a_forged_structure_is_refused(plugin, tmp_path, body):
    with pytest.raises(FileRefused):
        Result.load(forge(tmp_path / "a", body))


def test_tensors_that_nothing_refers_to_are_refused(plugin, tmp_path):
    with pytest.raises(FileRefused, match="do not match its structure"):
        Result.load(forge(tmp_path / "a", node(), {"0": torch.ones(1)}))


@pytest.mark.parametrize("name", ["NotAResult", "dataclass", "Any", "__builtins__", "Nothing", "Box.__init__"])
def test_only_results_of_the_plugin_are_built(plugin, tmp_path, name):
    with pytest.raises(Unavailable, match="has no such result"):
        Result.load(forge(tmp_path / "a", node(**{"class": name})))


def test_no_module_is_imported_because_a_file_names_it(plugin, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('the trap was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for plugin_name in ("trap", "hooklens", "boxes"):
        body = node(plugin=plugin_name, module="trap", **{"class": "Trap"})
        with pytest.raises(Unavailable):
            Result.load(forge(tmp_path / "a", body))
    assert "trap" not in sys.modules


def test_a_missing_plugin_is_named_with_what_installs_it(tmp_path):
    body = node(plugin="spectra", package="hooklens-spectra")
    with pytest.raises(Unavailable, match=r"plugin 'spectra', which is not installed.*pip install hooklens-spectra"):
        Result.load(forge(tmp_path / "a", body))
    body = node(plugin="spectra", package="x; rm -rf ~")
    with pytest.raises(Unavailable) as caught:
        Result.load(forge(tmp_path / "a", body))
    assert "rm -rf" not in str(caught.value)


def test_a_plugin_that_fails_to_import_is_named(tmp_path, monkeypatch):
    install(tmp_path, "broken_boxes", "raise RuntimeError('half installed')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=r"'broken_boxes' .*half installed"):
        Result.load(forge(tmp_path / "a", node(plugin="broken_boxes")))


def test_a_class_that_nothing_could_load_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="not part of a registered plugin"):
        Homeless(torch.ones(2), 1.0).save(tmp_path / "a")


def test_our_own_base_needs_no_entry_point(plugin, tmp_path):
    back = round_trip(plugin.Box(Result()), tmp_path)
    assert type(back.value) is Result


def test_load_through_another_class_says_which_one_it_is(plugin, tmp_path):
    plugin.Box(1).save(tmp_path / "a")
    assert plugin.Box.load(tmp_path / "a").value == 1
    with pytest.raises(WrongType, match="contains a Box"):
        Homeless.load(tmp_path / "a")


def test_repr_shows_shapes_not_numbers():
    inner = Homeless(torch.zeros(2, dtype=torch.bfloat16), float("nan"))
    result = Homeless(torch.zeros(12, 20), 3.2123, inner=inner)
    assert repr(result) == (
        "Homeless(values=Float[12 20], clean=3.212, site='z', "
        "inner=Homeless(values=BFloat16[2], clean=nan, site='z', inner=None))"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, dtype=torch.float64), "Float64[2]"),
        (torch.zeros(2, dtype=torch.bool), "Bool[2]"),
        (torch.zeros(0, 2, dtype=torch.complex128), "Complex128[0 2]"),
        (torch.tensor(2.5), "2.500"),
        (torch.Size([1, 2]), "tuple of 2"),
        ({}, "dict of 0"),
    ],
)
def test_summaries(value, text):
    assert summary(value) == text


@pytest.mark.parametrize("ask", [lambda r: r.top(3), lambda r: r.figure()])
def test_what_a_result_does_not_have_it_says(ask):
    with pytest.raises(WrongType, match="a Homeless has no"):
        ask(Homeless(torch.ones(1), 1.0))


@dataclass(frozen=True, eq=False)
class Layers(Result):
    ranked_by = "fall"
    fall: Tensor
    ranking = property(lambda self: self.fall)

    def table(self, n=None):
        return Table(("layer", "fall"), list(enumerate(self.fall.tolist()))).head(n)


def test_top_ranks_the_rows_of_a_table_that_has_another_order_and_leaves_out_those_without_rank():
    found = Layers(torch.tensor([0.5, float("nan"), -1.0, 2.0]))
    assert [row[0] for row in found.top(2).rows] == [3, 0] and len(found.top()) == 3 and len(found.top(0)) == 0
    assert [row[0] for row in found.table(2).rows] == [0, 1] and found.top(1).columns == found.table().columns


def test_every_result_inherits_top_and_says_by_what_it_ranks():
    for plugin in available():
        plugin.load()
    ours = [
        cls for cls in known_classes().values() if issubclass(cls, Result) and cls.__module__.startswith("hooklens.")
    ]
    assert [cls for cls in ours if "top" in vars(cls) and cls is not Result] == []
    assert [cls for cls in ours if cls.ranking is not None and not cls.ranked_by] == []


def test_a_result_without_a_ranked_table_names_what_it_ranks_instead():
    with pytest.raises(WrongType, match=r"a HeadScores has no top\(k\).*use table\(\) or top_heads\(\)"):
        score_heads(tiny_model(), n=2, draws=2).top(3)


def test_results_are_frozen_and_hashable():
    result = Homeless(torch.ones(1), 1.0)
    with pytest.raises(AttributeError):
        result.clean = 2.0
    assert len({result, result}) == 1


@settings(max_examples=50, deadline=None)
@given(value=nested)
def test_json_is_strict(value):
    try:
        text = json.dumps(plain(value), allow_nan=False)
    except InputError as error:
        assert "become equal" in str(error)
    else:
        assert isinstance(text, str)


def test_json_of_a_result():
    result = Homeless(torch.tensor([[1.0, float("-inf")]]), 1.0, inner=Homeless(torch.ones(0), 2.0))
    assert result.to_json() == {
        "class": "Homeless",
        "values": [[1.0, "-Infinity"]],
        "clean": 1.0,
        "site": "z",
        "inner": {"class": "Homeless", "values": [], "clean": 2.0, "site": "z", "inner": None},
    }
    with pytest.raises(WrongType, match="a set cannot be written as JSON"):
        plain({1, 2})


def test_the_sign_of_a_nan_comes_back(plugin, tmp_path):
    back = round_trip(plugin.Box([float("-nan"), float("nan"), float("-inf")], ""), tmp_path)
    assert [math.copysign(1, x) for x in back.value] == [-1.0, 1.0, -1.0]

"""How the engine computed a result stands in the same fields, and is joined in one way, wherever its values end up."""

import dataclasses
import math

import pytest
import torch

import hooklens as hl
from hooklens.plugins import find
from hooklens.results.account import RunAccount
from hooklens.results.result import Result
from hooklens.testing import tiny_model

NAN = float("nan")


def account(error, n, **changes):
    return RunAccount(**{"computed": 0.5, "largest_error": error, "n_verified": n, "how": "engine"} | changes)


@pytest.mark.parametrize(
    "name", ["patch", "path_patch", "ablate", "run_edges", "knock_out_keys", "trace_information"], ids=str
)
def test_every_result_of_the_engine_says_how_it_was_computed_and_keeps_that_in_its_file(name, tmp_path):
    result = find(name).load().demo(tiny_model()) if name != "run_edges" else runs()
    assert result.how == "engine" and result.n_verified > 0 and result.largest_error < 1e-5 and 0 < result.computed <= 1
    result.save(tmp_path / "result.safetensors")
    assert Result.load(tmp_path / "result.safetensors").account == result.account


def runs():
    model = tiny_model()
    metric = hl.logit_diff(model, answer=5, wrong_answer=6)
    kept = torch.rand(4, hl.circuits.circuit_graph(model).n_edges, generator=torch.Generator().manual_seed(0)) < 0.5
    return hl.circuits.run_edges(model, kept, [[1, 2, 3], [2, 3, 4]], [[1, 4, 3], [2, 5, 4]], metric)


def test_a_run_that_checked_nothing_does_not_hide_the_error_of_another_whichever_comes_first():
    for parts in ([account(NAN, 0), account(1e-6, 2)], [account(1e-6, 2), account(NAN, 0)]):
        joined = RunAccount.joined(parts)
        assert (joined.largest_error, joined.n_verified) == (1e-6, 2)
    assert math.isnan(RunAccount.joined([account(NAN, 0), account(0.0, 0)]).largest_error)


def test_computed_is_weighted_and_ways_and_kernels_are_named_once():
    parts = [account(0.0, 1, computed=1.0, kernel="packed"), account(0.0, 1, computed=0.0, kernel="packed")]
    parts.append(account(0.0, 1, computed=0.0, how="plain loop: asked for", kernel="linear"))
    joined = RunAccount.joined(parts, [2, 1, 1])
    assert (joined.computed, joined.how) == (0.5, "engine and plain loop: asked for")
    assert joined.kernel == "packed and linear" and "torch's own products and weights packed" in joined.exactness


def test_what_was_not_checked_has_no_largest_difference_in_words():
    assert account(NAN, 0).exactness == "0 were run again as plain hooked forward passes."
    assert account(2e-7, 3).exactness.endswith("passes; the largest difference was 2.0e-07.")


def test_the_account_stands_last_in_the_line_of_a_result():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Words(RunAccount, Result):
        site: str

    assert Words(site="z", **account(0.0, 2).account).headline().startswith("site 'z', computed 0.5")

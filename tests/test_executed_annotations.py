"""`pytest --annotations` (tests/annotations.py) executes annotations: types everywhere, and shapes within each call."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from annotations import checked
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor

HERE = Path(__file__).parent


@checked
def added(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Sizes below 3 come back longer."""
    return a + b if len(a) > 2 else torch.zeros(9)


@checked
def halved(value: float) -> int:
    return value / 2


@checked
@dataclass
class Pair:
    left: Float[Tensor, "n"]
    right: Int[Tensor, "n"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: added(torch.zeros(3), torch.zeros(4)),
        lambda: added(torch.zeros(3), torch.zeros(3, dtype=torch.long)),
        lambda: added(torch.zeros(2), torch.zeros(2)),
        lambda: halved("3"),
        lambda: halved(3.0),
        lambda: Pair(torch.zeros(3), torch.zeros(4, dtype=torch.long)),
    ],
)
def test_what_contradicts_an_annotation_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()


def test_calls_have_sizes_of_their_own():
    assert [len(added(torch.zeros(n), torch.zeros(n))) for n in (3, 4)] == [3, 4]
    assert len(Pair(torch.zeros(3), torch.zeros(3, dtype=torch.long)).right) == 3


@pytest.mark.slow
def test_the_package_is_imported_with_its_annotations_executed():
    code = """
import annotations
annotations.install()
import torch
from hooklens.results.statistics import null_p
try:
    null_p(torch.zeros(3), torch.zeros(5, 2))
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout == "Violation\n", done

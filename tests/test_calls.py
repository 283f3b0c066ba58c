"""A call with many positional arguments cannot be read: beyond five they are given by name."""

import ast
from pathlib import Path

import hooklens

MOST = 5
OPERATORS = ("torch.ops.",)  # whose arguments have no names


def crowded(source: str) -> list[tuple[int, str, int]]:
    """Line, name and number of arguments of every call with more than `MOST` positional ones."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) > MOST]
    named = [(call.lineno, ast.unparse(call.func), len(call.args)) for call in calls]
    return [found for found in named if not found[1].startswith(OPERATORS)]


def test_a_call_with_six_positional_arguments_is_seen():
    assert crowded("f(1, 2, 3, 4, 5)\nf(1, 2, 3, 4, 5, *rest)\nf(1, 2, 3, 4, 5, six=6)") == [(2, "f", 6)]


def test_no_call_has_more_than_five_positional_arguments():
    root = Path(hooklens.__file__).parent
    found = {path.name: crowded(path.read_text(encoding="utf-8")) for path in root.rglob("*.py")}
    assert {name: calls for name, calls in found.items() if calls} == {}

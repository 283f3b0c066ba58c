"""Code that can be read: calls by name, conditions on lines of their own, names that say what a thing is."""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hooklens

ROOT = Path(hooklens.__file__).parent
MOST = 5  # positional arguments of a call
OPERATORS = ("torch.ops.",)  # whose arguments have no names
VAGUE = {"found", "one", "each", "made"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

Fault = tuple[int, str]


@functools.cache
def syntax_trees() -> dict[str, ast.AST]:
    """Every module of the library, parsed."""
    paths = sorted(ROOT.rglob("*.py"))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def crowded(tree: ast.AST) -> Iterator[Fault]:
    """Calls with more than five positional arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > MOST:
            name = ast.unparse(node.func)
            if not name.startswith(OPERATORS):
                yield node.lineno, name


def nested(tree: ast.AST) -> Iterator[Fault]:
    """Conditional expressions within another one, or in a comprehension that is an argument."""
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and _conditional(node):
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Call):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            for value in values:
                if isinstance(value, COMPREHENSIONS) and _conditional(value):
                    yield value.lineno, ast.unparse(value)


def _conditional(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node)


def vague(tree: ast.AST) -> Iterator[Fault]:
    """Variables and arguments called by words that say nothing about them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE:
            yield node.lineno, node.id
        if isinstance(node, ast.arg) and node.arg in VAGUE:
            yield node.lineno, node.arg


@pytest.mark.parametrize(
    ("check", "source", "faults"),
    [
        (crowded, "f(1, 2, 3, 4, 5)\nf(1, 2, 3, 4, 5, *rest)\nf(1, 2, 3, 4, 5, six=6)", [2]),
        (nested, "a = b if c else d\na = b if c else (d if e else f)", [2]),
        (nested, "a = [b if c else d for c in e]\nf(b if c else d for c in e)", [2]),
        (nested, "f(g=[b if c else d for c in e])", [1]),
        (vague, "for one in rows:\n    found = one.name\ndef f(row, made): pass", [1, 2, 3]),
    ],
)
def test_the_checks_see_what_they_look_for(check, source, faults):
    assert sorted(line for line, _ in check(ast.parse(source))) == faults


@pytest.mark.parametrize("check", [crowded, nested, vague])
def test_the_library_is_written_plainly(check: Callable[[ast.AST], Iterator[Fault]]):
    faults = {name: list(check(tree)) for name, tree in syntax_trees().items()}
    assert {name: places for name, places in faults.items() if places} == {}

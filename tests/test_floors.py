"""Imports point down: every module may use the floors below its own, and no two modules need each other."""

import ast
from pathlib import Path

import pytest

import hooklens

ROOT = Path(hooklens.__file__).parent
#: From the ground up; a module may import from its own floor and from those below.
FLOORS = (
    ("core",),
    ("results",),
    ("viz",),
    ("model",),
    ("generation",),
    ("anatomy",),
    ("pretrained",),
    ("metrics",),
    ("data",),
    ("sweeps",),
    ("training",),
    ("scratch",),
    ("plugins",),
    ("studies",),
    ("testing", "public", "circuits", "heads", "lens", "patching", "probing", "steering", "weights"),
    ("cli", "__main__"),
)
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
#: Reports are written by studies and the command line; what is below them draws figures, and only when asked.
PAGES = ("hooklens.viz.report", "hooklens.viz.html_page")
#: Doors that open upwards, inside a function: a model generates, and its class is on a lower floor than sampling.
#: A result draws itself, and viz is on the floor above: that door is open to every `figure()`, not to pages.
DOORS = {("hooklens.model.transformer", "hooklens.generation.sampling")}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> set[tuple[str, bool]]:
    """What a module imports of hooklens, and whether only inside a function. Annotations do not count."""
    found: set[tuple[str, bool]] = set()

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hooklens":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add((full if full in MODULES else str(node.module), inside))
        if isinstance(node, ast.Import):
            found.update((alias.name, inside) for alias in node.names if alias.name.partition(".")[0] == "hooklens")
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # what can hold an import
                visit(child, inside)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")), False)
    return {(other, inside) for other, inside in found if other in MODULES and other not in (name, "hooklens")}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[tuple[str, bool]]]:
    return {name: imported(name) for name in MODULES if name != "hooklens"}


def floor(name: str) -> str:
    return name.split(".")[1]


def door(name: str, other: str, inside: bool) -> bool:
    draws = floor(name) == "results" and floor(other) == "viz" and other not in PAGES
    return inside and (draws or (name, other) in DOORS)


def test_every_module_stands_on_a_floor(imports):
    assert {floor(name) for name in imports} == set(HEIGHT)


def test_imports_point_down(imports):
    up = {
        (name, other)
        for name, others in imports.items()
        for other, inside in others
        if HEIGHT[floor(other)] > HEIGHT[floor(name)] and not door(name, other, inside)
    }
    assert up == set()


def test_doors_that_open_upwards_open_inside_functions_and_are_in_use(imports):
    assert {(name, other) for name, other in DOORS if (other, True) in imports[name]} == DOORS


def test_what_is_below_the_studies_draws_only_inside_functions_and_writes_no_page(imports):
    low = [name for name in imports if floor(name) != "viz" and HEIGHT[floor(name)] < HEIGHT["studies"]]
    early = [(name, other) for name in low for other, inside in imports[name] if floor(other) == "viz" and not inside]
    pages = [(name, other) for name in low for other, _ in imports[name] if other in PAGES]
    assert (early, pages) == ([], [])


@pytest.mark.parametrize("inside", [False, True], ids=["when imported", "when called"])
def test_no_modules_need_each_other(inside, imports):
    needs = {
        name: {other for other, late in others if (inside or not late) and not door(name, other, late)}
        for name, others in imports.items()
    }
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    assert needs == {}

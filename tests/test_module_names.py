"""A name says one thing: no two modules share one, no module that of a function in it, a plugin has its function's."""

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest

import hooklens
from hooklens.plugins import available

SOURCE = Path(hooklens.__file__).parent
MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path.stem != "__init__"]
PACKAGES = {path.parent.name for path in SOURCE.rglob("__init__.py")}
OURS = [info for info in available() if info.package == "hooklens"]


def test_every_module_has_a_name_of_its_own():
    several = {stem for stem, n in Counter(path.stem for path in MODULES).items() if n > 1}
    assert len(MODULES) > 150 and not several


def test_no_module_is_called_as_a_function_or_class_in_it():
    same = []
    for path in MODULES:
        names = [
            node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        same += [str(path.relative_to(SOURCE))] * (path.stem in names)
    assert not same


@pytest.mark.parametrize("package", sorted(PACKAGES - {"hooklens"}))
def test_what_a_package_exports_does_not_hide_its_modules(package):
    (init,) = SOURCE.rglob(f"{package}/__init__.py")
    module = importlib.import_module(".".join(("hooklens", *init.parent.relative_to(SOURCE).parts)))
    beside = {path.stem for path in init.parent.glob("*.py")}
    assert not beside & set(getattr(module, "__all__", ()))


def test_a_plugin_is_called_as_the_function_that_it_demonstrates():
    """`hooklens run NAME`, the entry point and `hl.<family>.NAME` are one name."""
    wrong = {}
    for info in OURS:
        function = getattr(info.load(), info.name, None)
        family = importlib.import_module(info.module.rpartition(".")[0])
        if not callable(function) or getattr(family, info.name, None) is not function:
            wrong[info.name] = info.module
    assert len(OURS) > 40 and not wrong

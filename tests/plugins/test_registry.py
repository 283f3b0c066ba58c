"""The registry: every entry point is listed, broken ones with their error; names that do not exist get a hint."""

import importlib
import sys

import pytest

from hooklens.core.errors import InputError, NameNotFound, Unavailable
from hooklens.plugins import available, find

GOOD = '"""What does it answer?\n\nMore."""\ndef demo(model):\n    return None\n'


def install(folder, package, entries, **sources):
    """A distribution as pip would leave it in `folder`."""
    for module, source in sources.items():
        (folder / f"{module}.py").write_text(source)
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[hooklens.plugins]", *lines, ""]))
    importlib.invalidate_caches()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


def named(name):
    return next(info for info in available() if info.name == name)


def test_a_plugin_of_another_package_is_listed_and_found(folder):
    install(folder, "their-package", {"their_method": "their_module"}, their_module=GOOD)
    info = find("their_method")
    assert (info.module, info.package, info.error) == ("their_module", "their-package", None)
    assert info.summary == "What does it answer?"
    assert info.demo()("any model") is None
    assert named("patch").error is None


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError: invalid syntax"),
    ],
)
def test_a_plugin_that_does_not_import_is_listed_with_its_error(folder, source, error):
    install(folder, "broken-package", {"broken": "broken_module"}, broken_module=source)
    assert named("broken").error.startswith(error)
    assert named("patch").error is None
    with pytest.raises(Unavailable, match=r"the plugin 'broken' was asked for.*uninstall the package 'broken-package'"):
        find("broken").load()


def test_an_entry_point_that_names_an_object_is_listed_as_wrong(folder):
    install(folder, "odd-package", {"odd": "odd_module:demo"}, odd_module=GOOD)
    assert "must name a module" in named("odd").error


def test_an_unknown_name_raises_with_the_nearest():
    with pytest.raises(NameNotFound, match="no plugin named 'pathing'; closest: patch"):
        find("pathing")


def test_a_name_that_two_packages_declare_is_refused(folder):
    install(folder, "package-a", {"twice": "module_a"}, module_a=GOOD)
    install(folder, "package-b", {"twice": "module_b"}, module_b=GOOD)
    assert [info.package for info in available() if info.name == "twice"] == ["package-a", "package-b"]
    with pytest.raises(InputError, match=r"declared by 2 packages \(package-., package-.\)"):
        find("twice")


def test_a_module_without_a_docstring_or_demo_says_what_is_missing(folder):
    install(folder, "bare-package", {"bare": "bare_module"}, bare_module="x = 1")
    info = find("bare")
    assert info.summary == ""
    with pytest.raises(InputError, match=r"has no demo\(model\) in bare_module"):
        info.demo()

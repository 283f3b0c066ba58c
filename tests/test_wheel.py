"""A wheel holds every module, and the marker by which type checkers know that hooklens has annotations."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The names of the files in a wheel. It is built from a copy, as setuptools writes into the source folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "hooklens", source / "hooklens", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *offline, "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_type_checkers_of_other_projects_read_our_annotations(files):
    assert "hooklens/py.typed" in files


def test_every_module_is_in_the_wheel(files):
    assert files >= {str(path.relative_to(ROOT)) for path in ROOT.glob("hooklens/**/*.py")}

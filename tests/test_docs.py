"""Every Python block of the README and of docs/ runs, and shows what it says it shows."""

import doctest
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^(?P<slow><!-- slow -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)(?P<path>[^)#]+)[^)]*\)")
NEEDED = {"quickstart", "hooks", "naming", "add_a_plugin", "gotchas", "errors", "design", "patching", "log"}


def run(page, *, slow):
    """The page's blocks in one namespace, in order; those marked slow only where asked for."""
    text, namespace = page.read_text(), {"__name__": "page"}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    failures = []
    for block in BLOCK.finditer(text):
        if block["slow"] and not slow:
            continue
        line = text[: block.start("code")].count("\n")
        if ">>>" not in block["code"]:
            exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)
            continue
        test = doctest.DocTestParser().get_doctest(block["code"], namespace, page.name, str(page), line)
        runner.run(test, out=failures.append, clear_globs=False)
        namespace.update(test.globs)
    assert not failures, "".join(failures)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "a page wrote a file"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_quick_blocks_of_a_page_run(page):
    run(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- slow -->" in p.read_text()], ids=lambda page: page.stem)
def test_all_blocks_of_a_page_run(page):
    run(page, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    missing = [link["path"] for link in LINK.finditer(page.read_text()) if not (page.parent / link["path"]).exists()]
    assert not missing


def test_every_promised_page_is_there():
    assert {page.stem for page in PAGES} >= NEEDED | {"README"}


def test_the_tree_of_files_names_every_module_and_nothing_that_is_not_there():
    tree = (ROOT / "docs/contributing.md").read_text().split("```text\n")[1].split("```")[0]
    folder, named = [], set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.match(r"\s*((?:\S+ )*\S+)", line)[1].split():
            if not re.fullmatch(r"[\w.]+(/|\.py|\.cfg)|\.ci/run", name):
                break  # the words that say what it is
            folder = [*folder[:depth], name.rstrip("/")]
            named.add("/".join(folder))
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing, f"in the tree, but not there: {missing}"
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("hooklens/**/*.py")}
    # a plugin, a family, a study, a command: its folder says what it is
    plugins = {path for path in modules if path.count("/") > 2 or path.split("/")[1] in ("studies", "cli")}
    unnamed = sorted(path for path in modules - plugins - named if not path.endswith("__init__.py"))
    assert not unnamed, f"not in the tree: {unnamed}"
    folders = {
        str(path.relative_to(ROOT)) for path in ROOT.glob("hooklens/plugins/*") if (path / "__init__.py").exists()
    }
    assert folders <= named


def test_a_block_that_shows_something_else_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n>>> 1 + 1\n3\n\n```\n")
    with pytest.raises(AssertionError, match="Expected"):
        run(page, slow=False)
    page.unlink()
    assert torch.is_grad_enabled()

"""The site's reference describes every public name once, and its home page links to what the site holds."""

import importlib
import importlib.util
import inspect
import os
import re
from pathlib import Path
from types import ModuleType

import pytest
from viz.browser import open_page

import hooklens.plugins.lens
from hooklens import Result, public, testing

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def site():
    """The module that mkdocs runs; what it is without mkdocs."""
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "site" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(site):
    return site.reference(site.public_modules())


def test_every_public_name_is_described_once(site, reference):
    described = re.findall(r"^::: (\S+)$", "\n".join(reference.values()), re.MULTILINE)
    assert len(described) == len(set(described))
    folders = [path.parent.name for path in DOCS.parent.glob("hooklens/plugins/*/__init__.py")]
    families = [importlib.import_module(f"hooklens.plugins.{folder}") for folder in folders]
    for module in (public, testing, *families):
        names = {path for path in site.paths(module).values() if path not in reference}
        assert names <= set(described), module.__name__


def test_a_description_is_of_the_value_itself(site):
    path = site.paths(hooklens.plugins.lens)["logit_lens"]
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is hooklens.plugins.lens.logit_lens


def test_every_public_name_has_a_docstring(site):
    bare = [
        f"{page}.{name}"
        for page, module in site.public_modules().items()
        for name in module.__all__
        if not getattr(getattr(module, name), "__doc__", None)
    ]
    assert not bare


def test_a_class_shows_what_it_inherits_from_a_private_base(site):
    base = type("Base", (), {"__module__": "hooklens.testing", "shown": None, "_hidden": None})
    assert site.options(type("Value", (base,), {}), set()) == ["    options:", "      inherited_members: ['shown']"]
    assert site.options(type("Value", (Result,), {}), {f"{Result.__module__}.Result"}) == []


def test_a_module_among_the_names_is_linked_to_its_own_page(site):
    module = ModuleType("pkg", "A package.")
    module.__all__, module.lens = ["lens"], hooklens.plugins.lens
    pages = site.reference({"hooklens": module, "hooklens.plugins.lens": hooklens.plugins.lens})
    assert "- [`lens`](hooklens.plugins.lens.md): Lenses:" in pages["hooklens"] and ":::" not in pages["hooklens"]
    assert pages["hooklens.plugins.lens"].startswith("# hooklens.plugins.lens {#hooklens.plugins.lens}\n")


def test_the_home_page_links_to_pages_and_names_other_files(site):
    readme = "![A report](docs/demo.png) [hooks](docs/hooks.md#names) [MIT](LICENSE) [web](https://example.org/a)"
    assert site.home(readme) == "![A report](demo.png) [hooks](hooks.md#names) MIT [web](https://example.org/a)"
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", site.home(site.README.read_text()))
    assert linked and not [path for path in linked if not (DOCS / path).exists()]


def test_the_summary_is_the_first_line_of_the_docstring(site):
    assert site.summary(testing.tiny_model) == inspect.getdoc(testing.tiny_model).splitlines()[0]


PAGE = """<body><script src="iframe-worker.js"></script><script>
const worker = new Worker("double.js");
worker.addEventListener("message", (event) => document.body.append(`twice is ${event.data}`));
worker.postMessage(21);
</script>"""


def test_a_worker_of_a_page_that_was_opened_from_a_file_answers(tmp_path):
    shim = (DOCS / "site" / "iframe-worker.js").read_text()
    files = {
        "iframe-worker.js": shim,
        "double.js": 'addEventListener("message", (event) => postMessage(2 * event.data))',
    }
    for name, text in {**files, "page.html": PAGE}.items():
        (tmp_path / name).write_text(text)
    page = open_page(tmp_path / "page.html")
    assert "twice is 42" in page.dom and page.console == []
    (tmp_path / "iframe-worker.js").write_text("")
    assert "twice is 42" not in open_page(tmp_path / "page.html").dom  # so the shim is needed


@pytest.mark.skipif("HOOKLENS_SITE" not in os.environ, reason="HOOKLENS_SITE names no folder with a built site")
def test_the_site_is_searched_without_a_server_and_loads_nothing_from_a_network():
    page = open_page(Path(os.environ["HOOKLENS_SITE"]) / "index.html", query="?q=lens_logits")
    assert re.search(
        r'href="[^"]*hooklens\.plugins\.lens\.html[^"]*\.lens_logits" class="md-search-result__link"', page.dom
    )
    assert page.console == [] and not [address for address in page.requests if not address.startswith("file:")]

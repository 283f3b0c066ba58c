"""The pages that the site adds to those of docs/: its home page, which is the README, and the API reference."""

import importlib
import inspect
import logging
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hooklens

README = Path(__file__).parents[2] / "README.md"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)]*)\)")
_SESSION = re.compile(r"^```python\n(?=>>>)", re.MULTILINE)
_LOADED = re.compile(r'<(?:script|img|link(?! rel="(?:canonical|prev|next)"))\b[^>]*?\s(?:src|href)="([^"#?]+)')


def on_config(config):
    """Add the reference to the navigation, a page for each module."""
    config.nav.append({"Reference": [{name: f"reference/{name}.md"} for name in public_modules()]})


def on_files(files, config):
    """Add the home page and the pages of the reference."""
    from mkdocs.structure.files import File

    pages = {f"reference/{name}.md": text for name, text in reference(public_modules()).items()}
    pages["index.md"] = home(README.read_text(encoding="utf-8"))
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, **_):
    """Highlight a block that shows an interactive session as one."""
    return _SESSION.sub("```pycon\n", markdown)


def on_post_build(config):
    """Warn of everything that a page loads and that the site does not hold; a strict build fails then."""
    site = Path(config.site_dir)
    for page in sorted(site.rglob("*.html")):
        for address in sorted(set(_LOADED.findall(page.read_text(encoding="utf-8")))):
            folder = site if address.startswith("/") else page.parent
            if not (folder / address.lstrip("/")).exists():
                logging.getLogger("mkdocs.hooks").warning("%s loads %s, which is not in the site", page.name, address)


def home(readme: str) -> str:
    """The README with its links relative to docs/. A link to a file outside docs/ becomes plain text."""

    def link(match: re.Match) -> str:
        image, text, path = match.groups()
        inside = path.removeprefix("docs/")
        return text if inside == path else f"{image}[{text}]({inside})"

    return _LINK.sub(link, readme)


def public_modules() -> dict[str, ModuleType]:
    """Every module whose `__all__` is public, by the name that users import: hooklens first, then its packages."""
    names = ["hooklens.public", "hooklens.testing"]
    packages = [info.name for info in pkgutil.walk_packages(hooklens.__path__, "hooklens.") if info.ispkg]
    names += [name for name in packages if name != "hooklens.cli"]  # a program, described by its --help
    modules = map(importlib.import_module, names)
    return {module.__name__.removesuffix(".public"): module for module in modules if hasattr(module, "__all__")}


def reference(modules: dict[str, ModuleType]) -> dict[str, str]:
    """The text of each module's page: an overview, then every name that no earlier page describes."""
    public = {path for module in modules.values() for path in paths(module).values()}
    described = set(modules)
    pages = {}
    for page, module in modules.items():
        overview, descriptions = [], []
        for name, path in paths(module).items():
            value = getattr(module, name)
            target = f"({path}.md)" if path in modules else f"[{path}]"
            overview.append(f"- [`{name}`]{target}: {summary(value)}")
            if path not in described:
                descriptions += ["", f"::: {path}", *options(value, public)]
                described.add(path)
        title = f"# {page} {{#{page}}}"
        pages[page] = "\n".join([title, "", summary(sys.modules[page]), "", *overview, *descriptions, ""])
    return pages


def paths(module: ModuleType) -> dict[str, str]:
    """Where each name of a module's `__all__` is defined: its docstring is there."""
    return {name: _defined_at(getattr(module, name)) or f"{module.__name__}.{name}" for name in module.__all__}


def _defined_at(value: object) -> str | None:
    if isinstance(value, ModuleType):
        return value.__name__
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if module and name and getattr(sys.modules.get(module), name, None) is value else None


def summary(value: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(value) or "").partition("\n")[0]


def options(value: object, public: set[str]) -> list[str]:
    """How to show a class: with what it inherits from classes that are not public, and with the fields of a tuple."""
    if not isinstance(value, type):
        return []
    inherited = sorted(set(_inherited(value, public)))
    shown = [f"      inherited_members: {inherited}"] if inherited else []
    shown += ["      show_if_no_docstring: true"] if issubclass(value, tuple) else []
    return ["    options:", *shown] if shown else []


def _inherited(value: type, public: set[str]) -> Iterator[str]:
    for base in value.__mro__[1:]:
        if base.__module__.startswith("hooklens") and _defined_at(base) not in public:
            yield from (name for name in vars(base) if not name.startswith("_"))

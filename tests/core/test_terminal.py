"""Nothing that a file, a model or a user calls something acts on a terminal."""

import io
import json
import warnings

import pytest
from rich.console import Console

from hooklens.core import errors
from hooklens.core import progress_bar as module
from hooklens.core.terminal import json_line, printable, visible
from hooklens.results.table import Table
from hooklens.testing import tiny_model
from hooklens.viz.report import Report

#: An OSC that renames the window, a colour, the same as a C1 control, marks that turn the direction around, DEL.
EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202etxt\u2066\x7f\r\x08"
CONTROLS = [*map(chr, range(32)), *map(chr, range(127, 160)), *"\u061c\u200b\u200e\u202a\u202e\u2028\u2066\ufeff\ud800"]


def harmless(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize("c", CONTROLS, ids=[f"{ord(c):x}" for c in CONTROLS])
def test_no_control_character_is_printed(c):
    text = f"a{c}b"
    assert visible(text).isprintable() and harmless(printable(text))
    assert printable(text) == (text if c in "\n\t" else visible(text))
    line = json_line({text: [text]})
    assert line.isprintable() and json.loads(line) == {text: [text]}


def test_letters_of_every_script_stay():
    text = "é ß 日本 עברית العربية 🙂 ∅·↵"
    assert visible(text) == printable(text) == text and text in json_line(text)


@pytest.mark.parametrize("kind", errors.HooklensError.__subclasses__(), ids=lambda e: e.__name__)
def test_an_error_that_quotes_a_name_is_harmless_also_outside_the_command_line(kind):
    error = kind(f"no tensor named {EVIL!s}")
    assert harmless(str(error)) and "owned" in str(error)
    assert str(kind("plain")) == "plain"


def test_a_bar_shows_its_title_and_acts_on_nothing(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **options: Console(file=written, force_terminal=True, width=200))
    with module.progress(EVIL + "[bold]x[/bold]", 2, show=True) as advance:
        advance(2)
    assert "owned" in written.getvalue() and "[bold]x[/bold]" in written.getvalue()
    for acting in ("\x1b]", "\x07", "\x9b", "\u202e"):
        assert acting not in written.getvalue()


def test_a_table_on_a_terminal_shows_names(monkeypatch):
    written = io.StringIO()
    Console(file=written, width=200).print(Table((EVIL, "n"), [(EVIL, 1)]))
    assert harmless(written.getvalue()) and harmless(str(Table((EVIL,), [(EVIL,)])))


def test_a_page_shows_a_hostile_title(tmp_path):
    report = Report(EVIL).heading(EVIL).text(EVIL).numbers({EVIL: EVIL}).table(Table((EVIL,), [(EVIL,)]), EVIL)
    page = report.to_html()
    assert harmless(page) and "<h1>\\x1b]0;owned" in page and "<title>\\x1b]0;owned" in page


def test_a_model_is_shown_by_its_name_only():
    assert harmless(repr(tiny_model(model_name=EVIL)))


def test_a_streamed_continuation_is_harmless(capsys):
    from hooklens.generation.sampling import _print

    _print(0, EVIL)
    assert harmless(capsys.readouterr().out)


def test_a_warning_about_a_cached_file_is_harmless(tmp_path, monkeypatch):
    from hooklens.pretrained import assets

    folder = tmp_path / EVIL.replace("/", "")
    monkeypatch.setattr(assets, "cache_folder", lambda: folder)
    monkeypatch.setattr(assets, "cached", lambda name: None)
    monkeypatch.setattr(assets, "_work_folder", lambda asset: (_ for _ in ()).throw(RuntimeError))
    asset = assets.find_asset("shakespeare")
    (folder / f"{asset.name}-{asset.version}").mkdir(parents=True)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(RuntimeError):
        warnings.simplefilter("always")
        assets.fetch("shakespeare")
    assert len(caught) == 1 and harmless(str(caught[0].message))

"""Reports: one page that needs nothing, the numbers beside it, and nothing in them interpreted."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import open_page
from nasty import NASTY

from hooklens import viz
from hooklens.core.errors import InputError
from hooklens.results.result import Result
from hooklens.results.table import Table


class Elements(HTMLParser):
    """Every kind of element and attribute that a document has, scripts' own text aside."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def nasty_report() -> viz.Report:
    """Every part of a report, with nasty words wherever a word can stand."""
    n, word = len(NASTY), NASTY[0] + NASTY[1] + NASTY[3] + "\ud800"
    report = viz.Report(word).heading(word).text(word).numbers({word: 1.0, "word": word})
    report.table(Table([word, "x"], [(token, 1.0) for token in NASTY]), caption=word)
    report.prompts(NASTY, NASTY[::-1], clean_top=[(t, 0.05) for t in NASTY], corrupted_top=[(word, 1.0)], caption=word)
    report.tokens(viz.token_strip(NASTY, torch.randn(n), title=word, hover=NASTY), caption=word)
    words = {"title": word, "x_title": word, "y_title": word}
    grid = torch.randn(n, n)
    report.figure(viz.heatmap(grid, x=NASTY, y=NASTY, hover=[NASTY] * n, colourbar=word, **words), word)
    report.figure(viz.bars(grid[0], grid[0] - 1, grid[0] + 1, NASTY, marks={word: 0.0}, **words), word)
    report.figure(viz.lines(dict.fromkeys(NASTY, grid[0]), marks={word: 0.0}, **words), word)
    report.figure(viz.scatter(grid[0], grid[1], NASTY, colour=grid[2], colourbar=word, **words), word)
    return report.figure(viz.attention_heads(grid.tril()[None], NASTY, [word], title=word), word)


def test_nothing_in_a_report_is_run_fetched_or_taken_for_markup(tmp_path):
    path = nasty_report().save(tmp_path / "nasty.html", data={"tokens": NASTY})
    page = open_page(path)
    assert page.console == []
    assert page.requests == []
    assert page.figures == 5
    assert page.count("<script") == 7  # five figures' data, Plotly, the drawing
    elements = Elements()
    elements.feed(page.dom)
    assert elements.tags.isdisjoint({"img", "a", "iframe", "object", "embed", "form"})
    assert not any(name.startswith("on") or name in ("src", "srcset") for name in elements.attributes)
    assert "<h1>&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;img" in page.dom


def test_a_script_that_slipped_in_would_not_run(tmp_path):
    report = viz.Report("x").figure(viz.bars(torch.ones(2)))
    bad = '<p id="calm"></p><script>document.getElementById("calm").id = "run"</script><img src="http://example.com/a.png">'
    path = report.tokens(viz.Html(bad + '<img src="data:," onerror="document.title = 1">')).save(tmp_path / "a.html")
    page = open_page(path)
    assert 'id="calm"' in page.dom and "<title>x</title>" in page.dom
    assert page.requests == []
    assert any("Content Security Policy" in line for line in page.console)
    assert page.figures == 1


def test_many_figures_carry_plotly_once(tmp_path):
    bars = viz.bars(torch.ones(2))
    one = viz.Report("x").figure(bars).to_html()
    three = viz.Report("x").figure(bars).figure(bars).figure(bars).to_html()
    assert len(three) - len(one) < 20_000 < 1_000_000 < len(one)
    assert "Plotly" not in viz.Report("x").text("no figure").to_html()


def test_no_address_outside_plotly_itself():
    import plotly.offline

    page = nasty_report().to_html().replace(plotly.offline.get_plotlyjs(), "")
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page and "@import" not in page


def test_the_numbers_stand_beside_the_page_as_strict_json(tmp_path):
    report = viz.Report("<t>").numbers({"clean": torch.tensor(2.5), "odd": float("nan")})
    report.table(Table(["head", "x"], [("L0H1", 0.25), (None, float("inf"))]), caption="heads")
    path = report.save(tmp_path / "a.html", data={"sweep": Result(), "values": torch.eye(2)})
    assert path == tmp_path / "a.html"
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "title": "<t>",
        "numbers": {"clean": 2.5, "odd": "NaN"},
        "tables": [{"caption": "heads", "columns": ["head", "x"], "rows": [["L0H1", 0.25], [None, "Infinity"]]}],
        "data": {"sweep": {"class": "Result"}, "values": [[1.0, 0.0], [0.0, 1.0]]},
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.json"]


@pytest.mark.parametrize("path", ["a.json", "missing/a.html", ""])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        viz.Report("x").save(Path(path))
    assert list(tmp_path.iterdir()) == []


def test_data_that_json_cannot_hold_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        viz.Report("x").save(tmp_path / "a.html", data={"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_differing_tokens_are_marked_by_position_or_aligned():
    same_length = viz.Report("x").prompts(["a", "b", "a"], ["a", "a", "b"]).to_html()
    assert same_length.count('class="token differs"') == 4
    longer = viz.Report("x").prompts(["a", "b", "c"], ["a", "x", "b", "c"]).to_html()
    assert longer.count('class="token differs"') == 1


def test_a_figure_given_to_a_report_stays_as_it_was():
    figure = viz.bars(torch.ones(2), title="kept")
    page = viz.Report("x").figure(figure).to_html()
    assert figure.layout.title.text == "kept"
    assert "<h3>kept</h3>" in page

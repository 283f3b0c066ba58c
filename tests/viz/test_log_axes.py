"""Logarithmic axes, histograms and sliders: what they show, what they leave out, and what a browser makes of them."""

import math
import re

import pytest
import torch
from browser import open_page
from nasty import NASTY

from hooklens import viz
from hooklens.core.errors import InputError
from hooklens.viz.drawing import mark_steps
from hooklens.viz.small_multiples import panels


def test_a_logarithmic_axis_leaves_out_what_it_cannot_show():
    values = torch.tensor([0.0, 1.0, 100.0, -1.0])
    figure = viz.lines(
        {"loss": values}, torch.tensor([0.0, 1.0, 2.0, 3.0]), log="xy", marks={"first": 10.0, "none": 0.0}
    )
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert [math.isnan(y) for y in figure.data[0].y] == [True, False, False, True]
    assert math.isnan(figure.data[0].x[0])
    # a line is placed by its value and its name by the logarithm; without one, the line is not drawn
    assert [shape.y0 for shape in figure.layout.shapes] == [10.0]
    assert [note.y for note in figure.layout.annotations] == [1.0]
    assert viz.lines({"loss": values}).layout.yaxis.type is None
    with pytest.raises(InputError, match='"x", "y" or "xy"'):
        viz.lines({"loss": values}, log="z")


def test_the_ticks_of_a_logarithmic_axis_were_powers_and_numbers_mixed(tmp_path):
    ends = [(0.03, 30.0), (1e-8, 1.0), (0.0, 1e7)]
    figures = [viz.lines({"norm": torch.tensor(pair)}, log="y") for pair in ends]
    report = viz.Report("x").figure(figures[0]).figure(figures[1]).figure(panels([figures[2], figures[2]]))
    decimal, power, panelled = (
        re.findall(r'class="y2?tick"><text[^>]*>(.*?)</text>', drawn)
        for drawn in open_page(report.save(tmp_path / "a.html")).dom.split('<g class="cartesianlayer">')[1:]
    )
    assert {"0.1", "1", "10"} <= set(decimal) and all(re.fullmatch(r"[\d.]+", tick) for tick in decimal), decimal
    for ticks in (power, panelled):
        assert len(ticks) > 3 and all(re.fullmatch(r"\de[−+]\d", tick) for tick in ticks), ticks


def test_the_digits_between_two_powers_met_on_an_axis_of_one_or_two_of_them():
    ticks = [viz.lines({"error": torch.tensor(pair)}, log="y").layout.yaxis.dtick for pair in ((0.5, 10.0), (1.0, 3.0))]
    assert ticks == ["D2", None]


def test_lines_may_have_their_own_places():
    figure = viz.lines({"a": torch.ones(3), "b": torch.ones(2)}, {"a": torch.arange(3), "b": torch.tensor([0, 2])})
    assert [list(trace.x) for trace in figure.data] == [[0, 1, 2], [0, 2]]


def coloured(name):
    return viz.scatter(torch.rand(3), torch.rand(3), title=name, colour=torch.rand(3), colourbar=name)


@pytest.mark.parametrize("draw", [lambda name: viz.heatmap(torch.rand(3, 3), colourbar=name), coloured])
def test_stacked_figures_have_their_colour_bars_beside_them(draw):
    both = panels([draw(name) for name in "ab"])
    bars = [trace.colorbar if trace.type == "heatmap" else trace.marker.colorbar for trace in both.data]
    spans = [(bar.y - bar.len / 2, bar.y + bar.len / 2) for bar in bars]
    for span, axis in zip(spans, (both.layout.yaxis, both.layout.yaxis2), strict=True):
        assert span == pytest.approx(axis.domain)
    assert spans[1][1] < spans[0][0]


def test_stacked_figures_keep_their_marks_on_their_own_axes():
    steps = torch.tensor([1.0, 10.0, 100.0])
    figure = viz.lines({"a": steps}, steps, log="x", marks={"level": 5.0})
    both = panels([mark_steps(figure, {"memorised": 10, "never": 0}), mark_steps(figure, {})])
    refs = [(shape.xref, shape.yref) for shape in both.layout.shapes]
    assert refs[:2] == [("x domain", "y"), ("x", "y domain")]
    assert refs[2:] == [("x2 domain", "y2"), ("x2", "y2 domain")]
    assert [(shape.xref, shape.yref) for shape in figure.layout.shapes] == refs[:2]  # and can be stacked again
    note = next(note for note in both.layout.annotations if note.text == "memorised")
    assert both.layout.shapes[1].x0 == 10 and note.x == 1 and note.xref == "x"  # lines by value, texts by its logarithm


def test_a_few_decades_have_two_and_five_between_powers_of_ten():
    ticks = [
        viz.lines({"a": torch.ones(2)}, torch.tensor([1.0, end]), log="x").layout.xaxis.dtick for end in (5, 1e3, 1e6)
    ]
    assert ticks == [None, "D2", None]


def test_panels_keep_logarithmic_axes():
    both = panels([viz.lines({"a": torch.ones(3)}, log="xy"), viz.lines({"a": torch.ones(3)}, log="x")])
    assert [both.layout[axis].type for axis in ("xaxis", "yaxis", "xaxis2", "yaxis2")] == ["log", "log", "log", None]


def test_a_histogram_draws_every_bin_from_edge_to_edge():
    trace = viz.histogram(torch.tensor([3, 0, 5]), torch.tensor([0.1, 1.0, 10.0, 100.0]), log="x").data[0]
    assert list(trace.y) == [3, 0, 5, 5] and trace.line.shape == "hv" and trace.x[-1] == 100.0
    assert "0.1000 to 1.000" in trace.text[0] and trace.text[2].endswith("<b>5</b>")


@pytest.mark.parametrize(
    ("edges", "log", "says"),
    [
        ([0.0, 1.0], "", "got 2 counts and 2 edges"),
        ([0.0, 2.0, 1.0], "", "which rise"),
        ([0.0, 1.0, 2.0], "x", "above 0"),
    ],
)
def test_a_histogram_without_its_edges_is_refused(edges, log, says):
    with pytest.raises(InputError, match=says):
        viz.histogram(torch.tensor([3, 1]), torch.tensor(edges), log=log)


def maps(n):
    return {f"{10**i:,}": viz.heatmap(torch.eye(2) * 10.0**i, title="map") for i in range(n)}


def test_a_slider_begins_with_the_last_and_shares_colours_and_axes():
    figure = viz.slider(maps(3), title="<step>")
    assert [frame.name for frame in figure.frames] == ["1", "10", "100"]
    assert figure.layout.sliders[0].active == 2 and "<step>" not in figure.layout.sliders[0].currentvalue.prefix
    assert figure.data[0].zmax == 100.0
    assert all(frame.data[0].zmax is None for frame in figure.frames)  # what all frames share is kept once
    assert figure.data[0].z[0][0] == 100.0
    moving = viz.slider(
        {
            "a": viz.lines({"x": torch.tensor([1.0, 2.0])}, log="y"),
            "b": viz.lines({"x": torch.tensor([1.0, 1e4])}, log="y"),
        }
    )
    assert moving.layout.yaxis.range == pytest.approx((-0.2, 4.2))
    heads = [viz.attention_heads(torch.eye(2)[None] * scale, ["a", "b"]) for scale in (0.5, 1.0)]
    assert viz.slider({"a": heads[1], "b": heads[0]}).layout.coloraxis.cmax == 1.0


def test_figures_of_other_shapes_are_not_put_on_one_slider():
    with pytest.raises(InputError, match="same traces"):
        viz.slider({"a": viz.lines({"a": torch.ones(2)}), "b": viz.lines({"a": torch.ones(2), "b": torch.ones(2)})})
    with pytest.raises(InputError, match="got 0 figures"):
        viz.slider({})


@pytest.mark.slow
def test_a_slider_works_offline_and_its_words_are_text(tmp_path):
    word = NASTY[0] + NASTY[1]
    report = viz.Report("x").figure(viz.slider({word: maps(1)["1"], "last": maps(1)["1"]}, title=word))
    page = open_page(report.save(tmp_path / "a.html"))
    assert (page.console, page.requests, page.figures) == ([], [], 1)
    assert page.count('class="slider-container"') == 1 and "<img src=x" not in page.dom


# A page that moves its slider and scrolls, as a reader would, before its first reload.
_READER = """
if (!sessionStorage.getItem("moved")) {
  sessionStorage.setItem("moved", "1");
  const place = document.querySelector(".plot");
  Plotly.relayout(place, {"sliders[0].active": 0});
  scrollTo(0, 150);
} else {
  for (let i = 1; i < 1000; i++) clearInterval(i);  // once is enough
  const place = document.querySelector(".plot");
  document.title = ["again", place.layout.sliders[0].active, place.calcdata[0][0].z[1][1], scrollY].join(" ");
}
"""


@pytest.mark.slow
def test_a_page_that_reloads_itself_keeps_the_slider_and_the_place(tmp_path):
    report = viz.Report("x").figure(viz.slider(maps(2)))
    for _ in range(40):
        report.text("words")
    again = report.to_html(reload=1.0)
    assert "location.reload()" in again and "location.reload()" not in report.to_html()
    path = tmp_path / "a.html"
    policy, body = again.index("<meta http-equiv"), again.index('<meta name="viewport"')
    # the reader's own script is not among those that the page allows
    path.write_text(again[:policy] + again[body:].replace("</body>", f"<script>{_READER}</script></body>"))
    page = open_page(path)
    assert "<title>again 0 1 150</title>" in page.dom


def with_scripts(path, page, before="", after=""):
    """The page with a reader's scripts, which are not among those that its policy allows."""
    policy, body = page.index("<meta http-equiv"), page.index('<meta name="viewport"')
    page = page[:policy] + f"<script>{before}</script>" + page[body:]
    path.write_text(page.replace("</body>", f"<script>{after}</script></body>"))
    return open_page(path)


_KEYS = """
setTimeout(() => {
  const knob = document.querySelector(".slider-container"), place = knob.closest(".plot"), seen = [];
  const note = () => seen.push(knob.getAttribute("aria-valuetext"), place.calcdata[0][0].z[1][1]);
  knob.focus();
  note();
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
  setTimeout(() => { note(); document.title = [knob.getAttribute("role"), ...seen].join(" "); }, 500);
}, 500);
"""


@pytest.mark.slow
def test_a_slider_could_not_be_moved_with_the_keyboard(tmp_path):
    report = viz.Report("x").figure(viz.slider(maps(3), title="step"))
    page = with_scripts(tmp_path / "a.html", report.to_html(), after=_KEYS)
    assert "<title>slider step 100 100 step 10 10</title>" in page.dom
    assert page.count('role="figure" aria-label="map"') == 1


_BEFORE = """
sessionStorage.setItem("hooklens " + location.pathname,
  JSON.stringify({sliders: {"figure-0": "20"}, zoomed: {"figure-0": {"xaxis": [0.25, 0.75]}}}));
"""
_AFTER = """
setTimeout(() => {
  const place = document.querySelector(".plot");
  document.title = [place.layout.sliders[0].active, place.calcdata[0][0].z[1][1], place.layout.xaxis.range].join(" ");
}, 500);
"""


@pytest.mark.slow
def test_a_reload_lost_the_zoom_and_a_step_that_is_no_longer_on_the_slider(tmp_path):
    page = viz.Report("x").figure(viz.slider(maps(3))).to_html()
    seen = with_scripts(tmp_path / "a.html", page, before=_BEFORE, after=_AFTER)
    assert "<title>1 10 0.25,0.75</title>" in seen.dom  # of 1, 10 and 100, the nearest to 20


def test_every_place_on_a_slider_repeated_what_all_of_them_share():
    figures = {str(i): viz.attention_heads(torch.eye(8)[None] * i, list("abcdefgh")) for i in (1, 2)}
    for frame in viz.slider(figures).frames:
        assert frame.data[0].z is not None and frame.data[0].text is None

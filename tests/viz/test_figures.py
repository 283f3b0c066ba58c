"""Figures: what is drawn is what was given, labels stay apart, and words stay words."""

import contextlib
import json
import re

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from nasty import NASTY

from hooklens import viz
from hooklens.core.errors import InputError, WrongType
from hooklens.viz.text import label, script_safe
from hooklens.viz.theme import DIVERGING, SEQUENTIAL, colour_at, luminance, text_on

GRID = torch.tensor([[1.0, -3.0, float("nan")], [0.5, float("inf"), 0.0]])


def test_values_beside_a_null_count_every_draw_and_name_what_is_undefined():
    null = torch.tensor([0.0, 0.1, 0.1, 0.9, float("nan")])
    found = {"<b>": (0.5, 0.4, 0.6), "alone": (0.7, float("nan"), float("nan"))}
    figure = viz.beside(found, null, marks={"<i>": 1.0}, drawn="<u>")
    bars, first, second = figure.data
    assert sum(bars.y) == 4 and bars.x[0] - bars.width[0] / 2 == pytest.approx(0.0)
    assert bars.x[-1] + bars.width[-1] / 2 == pytest.approx(0.9)
    assert "5, 1 undefined" in bars.name and "<u>" not in bars.name
    assert (first.x[0], first.error_x.array[0], first.error_x.arrayminus[0]) == pytest.approx((0.5, 0.1, 0.1))
    assert "<b>" not in first.name and second.error_x.array is None and min(first.y[0], second.y[0]) > max(bars.y)
    assert figure.layout.shapes[0].x0 == 1.0 and "<i>" not in figure.layout.annotations[0].text
    assert sum(viz.beside({}, torch.full((3,), float("nan"))).data[0].y) == 0
    assert sum(viz.beside({}, torch.zeros(3)).data[0].y) == 3


@contextlib.contextmanager
def refused(error, says):
    """Where the signatures are executed, they may refuse what does not fit before our own check does."""
    with pytest.raises((error, TypeCheckError)) as caught:
        yield
    assert isinstance(caught.value, TypeCheckError) or re.search(says, str(caught.value))


def test_a_heat_map_draws_the_values_and_leaves_gaps_where_there_are_none():
    trace = viz.heatmap(GRID.to(torch.bfloat16).requires_grad_()).data[0]
    np.testing.assert_array_equal(trace.z, [[1, -3, np.nan], [0.5, np.nan, 0]])
    assert (trace.zmin, trace.zmax) == (-3, 3)
    assert viz.heatmap(GRID, diverging=False).data[0].zmin == -3
    assert viz.heatmap(GRID, zmid=1.0).data[0].zmax == 5


def test_equal_labels_are_not_merged():
    axis = viz.heatmap(torch.rand(2, 3), x=[" the", " cat", " the"]).layout.xaxis
    assert list(axis.tickvals) == [0, 1, 2]
    assert list(axis.ticktext) == ["·the", "·cat", "·the"]


def test_row_zero_is_on_top():
    assert viz.heatmap(GRID).layout.yaxis.range == (1.5, -0.5)


def test_of_very_many_labels_some_are_shown():
    axis = viz.heatmap(torch.rand(1, 3072)).layout.xaxis
    assert len(axis.tickvals) <= 64 and axis.ticktext[1] == str(axis.tickvals[1])


@pytest.mark.parametrize(
    "values", [torch.full((2, 2), torch.nan), torch.zeros(2, 2), torch.zeros(0, 3), torch.ones(1, 1)]
)
@pytest.mark.parametrize("diverging", [True, False])
def test_grids_without_a_range_still_draw(values, diverging):
    trace = viz.heatmap(values, diverging=diverging).data[0]
    assert trace.zmin < trace.zmax


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: viz.heatmap(GRID[0]), r"\[y x\], got shape \[3\]"),
        (lambda: viz.heatmap(GRID, x=["a"]), "got 1 labels for 3 entries"),
        (lambda: viz.bars(GRID[0], labels=["a"]), "got 1 labels for 3"),
        (lambda: viz.bars(GRID[0], GRID[0][:2], GRID[0]), "got 3 values, 2 low, 3 high"),
        (lambda: viz.lines({"a": GRID[0]}, GRID[0][:2]), "got 2 x, 3 values"),
        (lambda: viz.scatter(GRID[0], GRID[0][:2]), "got 3 x, 2 y"),
        (lambda: viz.heatmap(GRID, hover=[["a"] * 3]), "got 2 rows, 1 hover"),
        (lambda: viz.token_strip(["a"], GRID[0]), "got 1 labels for 3"),
        (lambda: viz.attention_heads(torch.ones(1, 2, 2), ["a"]), r"1 tokens"),
        (lambda: viz.attention_heads(torch.ones(0, 2, 2), ["a", "b"]), r"\[0, 2, 2\]"),
    ],
)
def test_values_and_labels_that_do_not_fit_are_refused(draw, says):
    with refused(InputError, says):
        draw()


def test_an_interval_that_is_not_known_has_no_whiskers():
    unknown = torch.tensor([torch.nan, torch.nan])
    assert len(viz.bars(torch.ones(2), unknown, unknown).data) == 1
    half_known = torch.tensor([torch.nan, 2.0])
    assert len(viz.bars(torch.ones(2), half_known - 1, half_known).data) == 2


def test_whiskers_end_where_the_interval_ends_even_beside_the_value():
    whiskers = viz.bars(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])).data[1]
    assert whiskers.y[0] - whiskers.error_y.array[0] == 2 and whiskers.y[0] + whiskers.error_y.array[0] == 4


def test_heads_share_one_colour_scale_and_name_their_axes_once():
    figure = viz.attention_heads(torch.rand(5, 4, 4), list("abca"), ncols=3)
    assert len(figure.data) == 5 and {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    shown = [figure.layout[f"xaxis{i or ''}"].showticklabels for i in ("", 2, 3, 4, 5)]
    assert shown == [False, False, True, True, True]


def test_queries_are_the_last_tokens_when_there_are_fewer():
    figure = viz.attention_heads(torch.rand(1, 1, 3), ["a", "b", "c"])
    assert list(figure.layout.yaxis.ticktext) == ["c"]
    assert figure.data[0].text[0][0].startswith("0<br>from c (2)<br>to a (0)")


def test_words_in_figures_are_escaped_everywhere():
    figures = [
        viz.heatmap(torch.rand(1, len(NASTY)), x=NASTY, hover=[NASTY], title=NASTY[1], colourbar="<b>"),
        viz.attention_heads(torch.rand(1, len(NASTY), len(NASTY)), NASTY, ["<b>"], title="<b>"),
        viz.lines({"<b>": torch.rand(2)}, marks={"<b>": 1.0}, x_title="<b>"),
    ]
    for figure in figures:
        shown = json.loads(figure.to_json())
        layout = {**shown["layout"], "template": None}
        text = json.dumps([shown["data"], layout], ensure_ascii=False)
        assert "<b>&" not in text.replace("<b>0.", "") and "<img" not in text and "<a " not in text
        assert "&lt;b&gt;" in text


def test_a_strip_can_be_read_on_every_colour():
    for scale in (DIVERGING, SEQUENTIAL):
        for step in range(101):
            background = colour_at(scale, step / 100)
            low, high = sorted(map(luminance, (background, text_on(background))))
            assert (high + 0.05) / (low + 0.05) >= 4.5  # the contrast of WCAG 2.1


def test_a_strip_shows_white_space_and_escapes_the_rest():
    strip = viz.token_strip(NASTY, torch.arange(float(len(NASTY))), title="<b>", hover=NASTY)
    assert "<script" not in strip and "<img" not in strip and "<b>" not in strip and "<a " not in strip
    assert strip.count("<br>") == 1 and "↵" in strip and "∅" in strip
    assert 'onmouseover="alert' not in strip
    assert strip._repr_html_() == strip


def test_a_token_without_a_number_has_no_colour():
    strip = viz.token_strip(["a", "b"], torch.tensor([float("nan"), 1.0]), diverging=False)
    assert strip.count("outline:1px dashed") == 1


def test_labels_show_what_is_not_seen():
    assert label(" a\tb\x00 ") == r"·a⇥b\x00·"
    assert label("x" * 100) == "x" * 59 + "…"


def test_json_in_a_script_parses_to_the_same():
    text = json.dumps(NASTY, ensure_ascii=False)
    safe = script_safe(text)
    assert json.loads(safe) == NASTY
    assert not set("<>&\u2028\u2029") & set(safe)


def test_what_cannot_be_drawn_is_told():
    with refused(WrongType, "heatmap draws a tensor of real numbers"):
        viz.heatmap("words")


def test_a_heat_map_writes_into_its_cells_and_keeps_its_boxes():
    cells = [[" the", "<b>", "\n"], ["a very long token", "", " x"]]
    trace = viz.heatmap(GRID, cells=cells, hover=[[("two", "<i>lines"), "one", "one"]] * 2).data[0]
    assert trace.texttemplate == "%{text}"
    assert [list(line) for line in trace.text] == [["·the", "&lt;b&gt;", "↵"], ["a very l…", "∅", "·x"]]
    assert trace.hovertext[0][0].endswith("<br>two<br>&lt;i&gt;lines")
    with refused(InputError, "as many"):
        viz.heatmap(GRID, cells=cells[:1])
    with refused(InputError, "as many"):
        viz.heatmap(GRID, hover=[["one"]] * 2)


def test_the_names_of_marks_that_lie_close_do_not_overlap():
    """Two baselines of accuracy 1 were written over each other."""
    marks = {"one": 1.0, "other": 0.99, "chance": 0.5, "third": 1.0}
    figure = viz.lines({"a": torch.tensor([0.0, 1.0])}, marks=marks)
    places = {note.text: (note.xanchor, note.yanchor) for note in figure.layout.annotations}
    assert len({places[name] for name in ("one", "other", "third")}) == 3 and places["chance"] == places["one"]


def test_a_few_whole_numbers_have_no_tick_between_them():
    counted = viz.lines({"loss": torch.rand(4)})
    assert counted.layout.xaxis.dtick == 1
    assert viz.lines({"loss": torch.rand(4)}, torch.linspace(0, 1, 4)).layout.xaxis.dtick is None
    assert viz.lines({"loss": torch.rand(40)}).layout.xaxis.dtick is None
    assert viz.lines({"loss": torch.rand(3)}, torch.tensor([1, 2, 4]), log="x").layout.xaxis.dtick != 1


def test_a_number_that_goes_around_has_one_colour_at_both_ends():
    around = viz.scatter(torch.rand(3), torch.rand(3), colour=torch.arange(3), cyclic=True).data[0].marker.colorscale
    along = viz.scatter(torch.rand(3), torch.rand(3), colour=torch.arange(3)).data[0].marker.colorscale
    assert around[0][1] == around[-1][1] and along[0][1] != along[-1][1]

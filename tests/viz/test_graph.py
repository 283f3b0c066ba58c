"""Layered graphs: every box and arrow is there, nothing in a name is taken for markup."""

import pytest

from hooklens.viz.circuit_drawing import layered_graph


def test_boxes_arrows_and_hover():
    rows = {"in": ["a", "<b>b</b>"], "out": ["c"]}
    edges = [("a", "c.q", 1.0), ("<b>b</b>", "c.v", -0.1), ("a", "c.k", 0.02)]
    figure = layered_graph(rows, edges, "<i>title</i>")
    assert len(figure.layout.shapes) == 3 and figure.layout.annotations[1].text == "&lt;b&gt;b&lt;/b&gt;"
    assert figure.layout.title.text == "&lt;i&gt;title&lt;/i&gt;"
    (hover,) = [trace for trace in figure.data if trace.hoverinfo == "text"]
    assert (
        len(hover.text) == 3 + 9
        and hover.text[1] == "&lt;b&gt;b&lt;/b&gt;"
        and any("&lt;b&gt;b&lt;/b&gt; → c.v" in text for text in hover.text)
    )
    drawn = [trace for trace in figure.data if trace.mode == "lines"]
    widths = {trace.line.width: trace.line.color for trace in drawn}
    assert len(drawn) == 3 and max(widths) == 6.2 and len(set(widths.values())) == 2
    assert sorted(trace.name for trace in drawn if trace.showlegend) == ["lowers the metric", "raises the metric"]
    into = sorted(float(trace.x[16]) for trace in drawn)
    assert into == [-0.22, 0.0, 0.22]  # q, k and v enter left, middle, right


def test_a_graph_may_be_empty_and_a_missing_box_is_named():
    (boxes,) = layered_graph({"in": ["a"]}, []).data  # a circuit without edges had an empty figure
    assert boxes.text == ("a",) and not layered_graph({}, []).data[0].text
    with pytest.raises(ValueError, match="no box named 'x'"):
        layered_graph({"in": ["a"]}, [("a", "x.q", 1.0)])
    with pytest.raises(ValueError, match="twice"):
        layered_graph({"in": ["a"], "out": ["a"]}, [])

"""Maps of the plane have their own scales and boundaries; polygons of one value are one trace."""

import torch
from refused import refused

from hooklens.core.errors import InputError
from hooklens.viz.plane_drawing import plane_maps, polygons


def test_each_map_has_its_own_scale_and_a_line_only_where_it_changes_sign():
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[-1.0, 10.0], [0.0, 0.0]]])
    figure = plane_maps(values, torch.tensor([-1.0, 1.0]), ["<b>", "b"], boundaries=values, points=torch.zeros(3, 2))
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [(trace.zmin, trace.zmax) for trace in maps] == [(-4.0, 4.0), (-10.0, 10.0)]
    assert [trace.type for trace in figure.data].count("contour") == 1
    assert [len(trace.x) for trace in figure.data if trace.type == "scatter"] == [3, 3]
    assert "<b>" not in figure.layout.annotations[0].text


def test_polygons_of_one_value_are_one_outline_with_gaps():
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    figure = polygons([square, square + 2, square + 4], [5, 7, 5], colourbar="<i>")
    outlines = [trace for trace in figure.data if trace.mode == "lines"]
    assert [len(trace.x) for trace in outlines] == [12, 6] and outlines[0].fillcolor != outlines[1].fillcolor
    assert "<i>" not in outlines[0].text


def test_what_does_not_fit_is_refused():
    with refused(InputError, r"got shape \[1, 2, 2\] and 3 places"):
        plane_maps(torch.zeros(1, 2, 2), torch.zeros(3))
    with refused(InputError, "needs as many corners as values, got 1 corners, 2 values"):
        polygons([torch.zeros(3, 2)], [1, 2])

"""Figures, coloured text and offline reports: the only package of hooklens that imports Plotly."""

from hooklens.viz.circuit_drawing import layered_graph as layered_graph
from hooklens.viz.curves import beside as beside
from hooklens.viz.curves import lines as lines
from hooklens.viz.curves import scatter as scatter
from hooklens.viz.figures import bars as bars
from hooklens.viz.figures import heatmap as heatmap
from hooklens.viz.head_drawing import attention_heads as attention_heads
from hooklens.viz.histograms import histogram as histogram
from hooklens.viz.plane_drawing import plane_maps as plane_maps
from hooklens.viz.plane_drawing import polygons as polygons
from hooklens.viz.report import Report as Report
from hooklens.viz.sliders import slider as slider
from hooklens.viz.small_multiples import panels as panels
from hooklens.viz.text import Html as Html
from hooklens.viz.tokens import token_strip as token_strip

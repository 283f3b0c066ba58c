"""What a notebook shows of a result: its table and its figure, never a dump of fields, and nothing unescaped."""

from dataclasses import dataclass

import plotly.io
import pytest
import torch

import hooklens as hl
from hooklens.model.describe import describe
from hooklens.model.sampling import Generation
from hooklens.plugins.lens.logit_lens import logit_lens
from hooklens.plugins.patching.activation import demo as sweep_demo
from hooklens.result import Result
from hooklens.table import Table
from hooklens.testing import induction_model, tiny_model

BAD = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def in_jupyter(monkeypatch):
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")


def test_a_sweep_and_a_lens_were_dumps_of_fields():
    for result in (sweep_demo(tiny_model()), logit_lens(induction_model(), [[3, 1, 4, 9, 3]])):
        bundle = result._repr_mimebundle_()
        assert "<table>" in bundle["text/html"] and "Float[" not in bundle["text/html"]
        assert bundle["application/vnd.plotly.v1+json"]["data"][0]["type"] == "heatmap"


def test_a_generation_was_a_dump_of_fields():
    made = Generation([torch.tensor([1])], [torch.tensor([2, 3])], [f"{BAD}\nsecond\x1b[31m"], [True], None, {})
    shown = made._repr_html_()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\nsecond\\x1b[31m" in shown and "<script" not in shown
    assert "2 new tokens, stopped by itself" in shown
    assert made._repr_mimebundle_() == {"text/html": shown}  # no picture
    real = hl.testing.tiny_model().generate([[1, 2], [3]], 4)
    assert real._repr_html_().count("4 new tokens") == 2


def test_everything_shown_is_escaped_and_long_tables_are_cut():
    @dataclass(frozen=True, eq=False)
    class Long(Result):
        name: str

        def table(self, n: int | None = None) -> Table:
            return Table([BAD], [(self.name,)] * 60).head(n)

    shown = Long(BAD)._repr_html_()
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 25 and "36 more rows" in shown


def test_a_result_whose_picture_cannot_be_drawn_shows_its_table():
    bundle = describe(tiny_model())._repr_mimebundle_()  # figure() draws measured times, and none were measured
    assert list(bundle) == ["text/html"] and "<svg" in bundle["text/html"]


def test_a_renderer_that_writes_html_keeps_the_table(monkeypatch):
    monkeypatch.setattr(plotly.io.renderers, "default", "notebook_connected")
    shown = sweep_demo(tiny_model())._repr_mimebundle_()["text/html"]
    assert "Plotly.newPlot" in shown and "<table>" in shown


def test_print_of_a_description_was_a_dump_of_fields():
    found = describe(tiny_model(), n=16)
    lines = str(found).splitlines()
    assert lines[0].startswith("tiny: ") and f"{found.parameters:,} parameters; L = 2, n = 16" in lines[0]
    assert "\n".join(lines[1:]) == str(found.table()) and repr(found).startswith("Description(")

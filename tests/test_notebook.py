"""What a notebook shows of a result: its table and its figure, never a dump of fields, and nothing unescaped."""

import re
from dataclasses import dataclass

import plotly.io
import pytest
import torch

import hooklens as hl
from hooklens.anatomy.description import describe
from hooklens.core.terminal import printable
from hooklens.generation.sampling import Generation
from hooklens.plugins import find
from hooklens.plugins.lens.layer_lens import logit_lens
from hooklens.plugins.patching.activation import demo as sweep_demo
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.results.result import Result, summary
from hooklens.results.table import Table
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
    head, table = str(found).removesuffix(str(found.table())), str(found.table())
    assert head.startswith(f"tiny: {found.parameters:,} parameters") and "L = 2, n = 16" in head
    assert len(head.splitlines()) == 2 and str(found) == head + table and repr(found).startswith("Description: ")


def test_print_of_a_sweep_was_a_dump_of_fields():
    sweep = sweep_demo(tiny_model())
    for shown in (str(sweep), repr(sweep)):
        head, *rows = shown.splitlines()
        assert head.startswith(f"PatchSweep: clean {summary(sweep.clean)}, corrupted {summary(sweep.corrupted)}, site ")
        assert rows == [*str(sweep.table(8)).splitlines(), "... more rows: .table(None)"]
    assert "Float[" not in shown and max(map(len, shown.splitlines())) < 125


def test_print_of_any_demo_is_its_name_a_line_and_its_first_rows():
    model = tiny_model()
    for name in ("score_copying", "direct_logit_attribution", "path_patch", "trace_predictions", "prune_edges"):
        found = find(name).demo()(model)
        lines = repr(found).splitlines()
        assert lines[0].startswith(type(found).__name__) and len(lines) <= 11
        assert lines[1] == str(found.table(9).head(8)).splitlines()[0]


def test_the_line_above_the_rows_begins_with_what_they_are_compared_to():
    for name, baseline in (("ablate", "base"), ("score_positions", "chance"), ("patch", "clean")):
        found = find(name).demo()(tiny_model())
        assert repr(found).startswith(f"{type(found).__name__}: {baseline} {summary(getattr(found, baseline))}, ")


def test_a_result_whose_table_fails_is_still_printed():
    @dataclass(frozen=True, eq=False)
    class Half(Result):
        name: str

        def table(self, n: int | None = None) -> Table:
            raise RuntimeError("not made yet")

    assert repr(Half("a")) == "Half(name='a')"


def with_tokenizer():
    model = tiny_model(d_vocab=256, n_ctx=512)
    model.tokenizer = tiny_tokenizer()
    return model


def test_print_of_a_generation_was_a_dump_of_fields_without_its_text():
    made = with_tokenizer().generate(["ab", "x" * 400], 3)
    lines = str(made).splitlines()
    assert lines[0] == "Generation: 2 prompts" and lines[1] == "prompt 0: ab" and repr(made) == str(made)
    assert f"  3 new tokens: {printable(made.texts[0])}" in str(made) and f"prompt 1: ...{'x' * 300}" in lines
    ids = tiny_model().generate([1, 2], 2)
    assert str(ids).startswith("Generation: 1 prompt\nprompt 0: 1 2\n  2 new tokens: ")
    assert "... 2 more: .texts" in str(tiny_model().generate([[1]] * 10, 1))


def test_the_prompt_was_missing_from_what_a_notebook_shows_of_a_generation():
    made = Generation([torch.tensor([1])], [torch.tensor([2])], ["<i>new"], [False], None, {}, [f"{BAD}\x1b[31m"])
    shown = made._repr_html_()
    prompt, continuation = re.findall(r'<span class="(?:prompt|continuation)" style="[^"]+">(.*?)</span>', shown)
    assert prompt == "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m" and continuation == "&lt;i&gt;new"
    real = with_tokenizer().generate("ab<", 2)
    assert real.prompt_texts == ["ab<"] and ">ab&lt;</span>" in real._repr_html_()

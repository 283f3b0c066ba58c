"""Tables: what is shown is legible, and nothing in a cell is interpreted."""

from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from hooklens.core.errors import InputError
from hooklens.results.table import Table, format_number

NASTY = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&amp;", "<b>", "a|b", "[red]x[/red]"]


def test_columns_line_up_also_with_wide_characters():
    lines = str(Table(["token", "p"], [("日本", 0.5), ("é", 0.25), ("e\u0301", 0.25)])).split("\n")
    assert lines == ["token       p", "日本   0.5000", "é      0.2500", "e\u0301      0.2500"]


def test_control_characters_do_not_reach_the_terminal():
    text = str(Table(["token"], [("\x1b[31mred\n\u202egnol",)]))
    assert text.split("\n")[1] == r"\x1b[31mred\n\u202egnol"


def test_html_is_escaped():
    markup = Table(NASTY, [NASTY]).to_html()
    assert "<script" not in markup and "<img" not in markup and "<b>" not in markup
    assert "&amp;amp;" in markup


def test_markdown_is_escaped():
    line = Table(["token"], [("<b> a|b *c* `d`",)]).to_markdown().split("\n")[2]
    assert line == r"| &lt;b&gt; a\|b \*c\* \`d\` |"


def test_rich_shows_brackets_as_they_are():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(Table(["token", "p"], [("[red]x[/red]", 1.0)]))
    assert "[red]x[/red]" in console.export_text()


def test_numbers_of_a_column_share_their_decimals():
    table = Table(["x"], [(123.456,), (-0.5,), (0.0,), (1e-12,), (float("nan"),), (float("-inf"),)])
    assert [row[0] for row in table.texts()] == ["123.5", "-0.5", "0.0", "1.0e-12", "nan", "-inf"]


def test_scalars_of_torch_and_numpy_are_numbers():
    table = Table(["x", "n"], [(torch.tensor(0.5), np.int64(3)), (np.float32(0.25), torch.tensor(4))])
    assert table.rows == ((0.5, 3), (0.25, 4))
    assert table.is_numeric() == [True, True]


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "1"), (10**12, "1000000000000"), (12345678.0, "1.235e+07"), (0.0, "0"), (-3.21, "-3.210")],
)
def test_single_numbers(value, text):
    assert format_number(value) == text


def test_a_ragged_row_is_refused():
    with pytest.raises(InputError, match="got 1 in row 1"):
        Table(["a", "b"], [(1, 2), (1,)])


@pytest.mark.parametrize("form", [str, Table.to_html, Table.to_markdown, Table.texts])
def test_an_empty_table_still_prints(form):
    form(Table(["a", "b"], []))
    form(Table([], []))


def on_a_terminal(table, width):
    console = Console(width=width, record=True, file=StringIO())
    console.print(table)
    return console.export_text()


HEADS = Table(
    ["head", "called", "patched", "low", "high", "direct", "d. low", "d. high", "attends to IO", "margin", "copies"],
    [
        ("L23H0", "restores the logit difference", 0.4112, 0.3604, 0.4511, 0.101, 0.0812, 0.123, 0.331, 0.23, 1.0),
        ("L1H1", "no clear effect", -0.0188, -1.89, 2.46, -0.0768, -2.421, 2.724, 0.0218, -0.041, 0.03),
    ],
)


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_terminal_of_80_columns_cut_every_number_to_an_ellipsis(width):
    text = on_a_terminal(HEADS, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert "0.41 [0.36, 0.45]" in text and "-0.02 [-1.89, 2.46]" in text  # a value and its interval in one column
    shown, left_out = text.partition("No room")[::2]
    for name, cell in (("attends to IO", "0.3310"), ("margin", "0.2300"), ("copies", "1.000")):
        assert (cell in shown) != (name in left_out)
    assert (width >= 120) == (not left_out)


@pytest.mark.parametrize("width", [30, 80])
def test_text_takes_the_room_that_numbers_leave(width):
    lines = on_a_terminal(Table(["text", "n", "m"], [("many words " * 12, 1.25, 2.5)]), width).splitlines()
    assert max(map(len, lines)) <= width and any("1.250" in line for line in lines)


def test_only_what_follows_a_value_is_its_interval():
    table = Table(["low", "high", "x", "y low", "n"], [(1, 2, 3, 4, 5)])
    assert [name for name, _, _ in table.joined()] == ["low", "high", "x", "y low", "n"]
    text = Table(["name", "low", "high"], [("a", 1, 2)])
    assert [name for name, _, _ in text.joined()] == ["name", "low", "high"]
    missing = Table(["x", "low", "high"], [(0.5, float("nan"), float("nan")), (None, None, None)])
    assert missing.joined() == [("x [low, high]", ["0.500", ""], True)]


def test_recovered_was_printed_as_minus_nothing():
    column = Table(["recovered"], [(-0.0,), (0.25,), (0.0,), (torch.tensor(-0.0),)])
    assert column.texts() == [["0.0000"], ["0.2500"], ["0.0000"], ["0.0000"]]
    assert Table(["x"], [(-0.5,), (2000.0,), (-1.0,)]).texts() == [["0"], ["2000"], ["-1"]]
    assert "-0.0" not in column.to_html() + column.to_markdown() + str(column.joined())
    assert Table(["x"], [(-0.0,)]).texts() == [["0.0"]] and format_number(-0.0) == "0" and format_number(-0.01) != "0"

"""The demo's heads are called by one half of the pairs and reported on the other."""

from dataclasses import replace

import torch
from planted_movers import demo_movers

from hooklens.data.prompt_pairs import PromptPairs
from hooklens.plugins.heads.mover_result import NameMovers
from hooklens.results.statistics import halves
from hooklens.studies.ioi_study import IOIStudy
from hooklens.studies.pair_study import by_layer
from hooklens.studies.pair_study import demo as pair_demo
from hooklens.sweeps.settings import engine
from hooklens.testing import tiny_model


def lucky_movers(n: int = 24) -> NameMovers:
    """L0H0 passes all three tests on the pairs that name heads, and does nothing on the others; L0H1 the reverse."""
    movers = demo_movers(n)
    _, reported = halves(n, group=movers.group)
    movers.direct[reported, 0, 0] -= 0.3
    movers.direct[reported, 0, 1] += 0.3
    return movers


def study(n: int = 24) -> IOIStudy:
    model, movers = tiny_model(), lucky_movers(n)
    chosen_on, reported_on = movers.halves()
    tokens = torch.arange(1, 8).expand(n, 7) % model.cfg.d_vocab
    corrupted = tokens.clone()
    corrupted[:, 3] = 0
    columns = {"order": ["ABBA"] * n, "template": ["numbers"] * n, "end": torch.full((n,), 6)}
    pairs = PromptPairs(tokens, corrupted, answer=5, wrong_answer=6, group=movers.group, columns=columns)
    shown = replace(pair_demo(model), layers={})
    with engine(verify=0):
        layers = by_layer(model, pairs)
    return IOIStudy(
        shown=shown,
        pairs=pairs,
        movers=movers,
        layers=layers,
        heads=[(0, 1), (0, 0)],
        total=movers.direct[:, 0, [1, 0]] + 1.0,
        corrupted=torch.ones(n),
        patterns=shown.patterns[:2],
        claims=None,
        chosen_on=chosen_on,
        reported_on=reported_on,
    )


def test_called_and_its_numbers_were_of_the_same_pairs():
    table = lucky_movers().table()
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["L0H0"]["called"] == "name mover" and abs(rows["L0H0"]["direct effect"]) < 0.05
    assert rows["L0H1"]["called"] == "little direct effect" and rows["L0H1"]["direct effect"] > 0.25
    assert rows["L0H0"]["low"] < 0 < rows["L0H0"]["high"] and table.rows[0][0] == "L0H0"  # ranked by the naming half


def test_the_demos_table_calls_by_one_half_and_reports_the_other():
    found = study()
    assert found.held_out and found.called() == ["no clear effect", "name mover"]
    (mover, *_), (other, *_) = rows = found.table().rows
    assert (mover, other) == ("L0H0", "L0H1")
    assert abs(rows[0][2]) < 0.05 < 0.25 < rows[1][2] and abs(rows[0][5]) < 0.05  # patched and direct
    torch.testing.assert_close(found.recovered[0], found.movers.direct[found.reported_on, 0, 1].mean())


def test_the_demos_page_says_on_which_pairs_heads_were_called():
    report = study().report()
    page = report.to_html()
    heads = next(table for table in report._tables if table["columns"][0] == "head")
    assert all(f"{name}: " in heads["caption"] for name in heads["columns"])
    assert "labelled by 12 of the pairs; every number comes from the other 12, which share no group with them" in page
    assert "-0%" not in page and "the strongest are ." not in page and "No other head restores" in page
    assert page.index("attention to the indirect object") < page.index("attends to IO</th>")  # picture, then table


def test_one_group_names_nobody_and_says_that_there_is_no_interval():
    movers = replace(demo_movers(4), group=torch.zeros(4, dtype=torch.long))
    chosen, reported = movers.halves()
    assert chosen.tolist() == reported.tolist() == [0, 1, 2, 3]
    assert {row[1] for row in movers.table().rows} == {"no interval"}

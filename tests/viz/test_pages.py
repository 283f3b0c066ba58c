"""The pages of studies: captions say what was done, every column is explained, and a page stays short."""

import functools
import re

import pytest
import torch
from browser import open_page

import hooklens as hl
from hooklens import viz
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.plugins.heads import classify_heads
from hooklens.plugins.heads.ece_change import CalibrationChange
from hooklens.plugins.probing.probe_training import demo as probe_demo
from hooklens.results.claims import Measured, claim, family
from hooklens.studies import probe_report, study_circuit, taxonomy_report
from hooklens.studies.head_study import demo as head_demo
from hooklens.studies.lens_study import study_lens
from hooklens.studies.pair_study import study_pair
from hooklens.testing import induction_model, tiny_model

CLEAN, CORRUPTED = [1, 2, 3, 4, 5], [1, 4, 3, 6, 5]
CLAIMS = ["claim", "status", "verdict", "effect", "low", "high", "control", "q"]  # explained in sentences


def pair(corrupted=CORRUPTED, **options):
    with hl.engine(verify=0):
        return study_pair(tiny_model(), PromptPairs(CLEAN, corrupted, answer=5, wrong_answer=6), **options)


def caption(study, site):
    return study.patched(study.sweeps[site])


def test_the_caption_of_layer_by_head_stayed_on_other_grids_of_z():
    assert "one head at a time, at all positions" in caption(pair(sites=["z"]), "z")
    assert "one layer at a time, at all positions" in caption(pair(sites=["z"], by="layer"), "z")
    assert "one head at a time, one token position" in caption(pair(sites=["z"], by="layer x head x pos"), "z")
    page = pair(sites=["z"], by="layer").report().to_html()
    assert "one layer at a time, at all positions" in page and "one head at a time" not in page


def test_all_positions_was_said_where_only_the_shared_tokens_are_patched():
    study = pair([1, 4, 3, 6, 6, 5], sites=["z"], by="layer")
    assert study.shared == (1, 1)
    page = study.report().to_html()
    assert "at all positions" not in page.lower() and "All positions" not in page
    assert page.count("only at the first 1 and the last 1 tokens, which both prompts share") == 3  # z, attention, MLP


def test_zero_and_one_were_explained_where_neither_is_shown():
    model = tiny_model()
    with torch.no_grad():
        model.embed.weight[9] = model.embed.weight[2]  # another token, and the same run
    with hl.engine(verify=0):
        study = study_pair(model, PromptPairs(CLEAN, [1, 9, 3, 4, 5], answer=5, wrong_answer=6), sites=["z"])
    assert not study.sweeps["z"].defined
    assert "1: as in the clean run" not in caption(study, "z") and "its change is shown" in caption(study, "z")


@functools.cache
def circuit_report(full=False):
    model = tiny_model(
        n_heads=4, n_key_value_heads=2, positional_embedding_type="rotary", gated_mlp=True, normalization_type="RMS"
    )
    return study_circuit(model, demo_pairs(model, 4), edges=12, full=full).report()


def lens_report(n=3):
    rows = [[3, 1, 4, 3], [5, 2, 6, 5], [7, 9, 8, 7]]
    return study_lens(
        induction_model(), (rows * 4)[:n], answer=([1, 2, 9] * 4)[:n], wrong_answer=([4, 6, 8] * 4)[:n]
    ).report()


REPORTS = {
    "pair": lambda: pair().report(),
    "lens": lens_report,
    "heads": lambda: taxonomy_report(classify_heads(induction_model(), n=6)),
    "heads on pairs": lambda: head_demo(tiny_model()).report(),
    "circuit": circuit_report,
    "circuit in full": lambda: circuit_report(full=True),
    "probe": lambda: probe_report(probe_demo(tiny_model())),
}
SLOW = ("circuit in full", "probe")


def unexplained(table):
    said = table["caption"].lower()
    if table["columns"] == CLAIMS:
        return [name for name in CLAIMS if not re.search(rf"\b{name}\b", said)]
    return [name for name in table["columns"] if f"{re.sub(' with maximum.*', '', name.lower())}: " not in said]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in REPORTS]
)
def test_a_column_stood_on_the_page_without_a_word_about_it(name):
    """Such as "control rank", "placebo", "rests", "ECE change"."""
    tables = [table for table in REPORTS[name]()._tables if table["caption"] != "Columns as above."]
    assert tables and not [(table["caption"], missing) for table in tables if (missing := unexplained(table))]


def test_every_kind_of_evidence_about_heads_is_explained():
    """Those too that the model of the test above does not show."""
    from hooklens.plugins.heads.head_labels import _EFFECT, _SUPPRESSION, Taxonomy
    from hooklens.studies import heads_page as report

    assert {*_EFFECT, *_SUPPRESSION, "score", "q", "rests", "by position"} <= Taxonomy.terms.keys()
    change = CalibrationChange([], 0.1, *[torch.zeros(0)] * 3, torch.zeros(0, 1), torch.zeros(1, 0), "repeats")
    assert set(change.table().columns[1:]) <= report._CALIBRATION.keys()


def test_the_letter_g_of_a_key_value_head_was_never_explained():
    assert "L5G1 is a key/value head (G)" in circuit_report().to_html()


def test_ten_prompts_gave_ten_open_lens_maps():
    before, *folds = lens_report(10).to_html().split("<details>")
    assert before.count('class="plot" id="figure') == 3  # the trajectory, the heads, the first prompt
    assert [fold.count('class="plot" id="figure') for fold in folds] == [1] * 9


def test_many_claims_made_a_long_table_before_anything_else():
    measured = {"observation": Measured.of("seen", [1.0] * 6), "control": Measured.of("control", [0.0] * 6)}
    made = [
        claim("m", f"L0H{i} matters", intervention=Measured.of("effect", [i / 30, 1.0] * 3), **measured)
        for i in range(30)
    ]
    page = viz.Report("x").claims(family("m", made)).to_html()
    before, behind = page.split("<details>")[:2]
    assert before.count("<tr>") == 21 and "The 20 of 30 claims with the smallest q." in before
    assert behind.count("<tr>") == 31 and "All 30 claims" in behind


def test_a_figure_behind_a_fold_is_drawn_when_it_is_opened(tmp_path):
    report = viz.Report("x")
    for summary in ("<closed>", "open"):
        with report.fold(summary):
            report.figure(viz.bars(torch.ones(2)))
    path = report.save(tmp_path / "a.html")
    # the figures are drawn first, then the second fold opens: as after a click
    opening = 'document.querySelectorAll("details")[1].open = true;'
    path.write_text(re.sub("<meta http-equiv.*?>", "", path.read_text()) + f"<script>{opening}</script>")
    page = open_page(path)
    assert page.figures == 1 and page.console == []
    assert "<details><summary>&lt;closed&gt;" in page.dom and '<details open=""><summary>open' in page.dom


def test_a_fold_closes_when_something_raises_inside():
    report = viz.Report("x")
    with pytest.raises(KeyError), report.fold("more"):
        raise KeyError
    assert report.text("after").to_html().index("</details>") < report.to_html().index("after")


def test_every_head_at_every_position_was_a_hairline():
    model = tiny_model(n_layers=8, n_heads=4, d_model=16)
    metric = hl.logit_diff(model, answer=5, wrong_answer=6)
    with hl.engine(verify=0):
        sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z", by="layer x head x pos")
    drawn, whole = sweep.figure(), sweep.figure(rows=None)
    assert "the 24 strongest of 32 rows" in drawn.layout.title.text
    kept = set(drawn.layout.yaxis.ticktext)
    strongest = [sweep.name_of(index).split(" ")[0] for index in sweep.order()]
    assert kept == set(list(dict.fromkeys(strongest))[:24])
    assert list(drawn.layout.yaxis.ticktext) == [name for name in whole.layout.yaxis.ticktext if name in kept]
    assert len(whole.layout.yaxis.ticktext) == 32 and (whole.layout.height - 130) / 32 >= 15


def test_names_of_attention_maps_ran_into_each_other_on_a_narrow_page():
    names = ["L24H4, lowers the logit difference", "L0H1", "<b>restores</b> the logit difference"]
    figure = viz.attention_heads(torch.eye(3).expand(3, 3, 3), ["a", "b", "c"], names)
    titles = [note.text for note in figure.layout.annotations]
    assert titles[0].replace("<br>", " ") == names[0] and "&lt;b&gt;restores" in titles[2]
    assert max(len(line) for title in titles[:2] for line in title.split("<br>")) * 7 <= 400 / 3

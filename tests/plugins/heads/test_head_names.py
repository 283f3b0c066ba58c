"""Name movers for the taxonomy: what each p-value answers to, and what chance gives."""

import functools
from dataclasses import replace

import pytest
import torch
from planted_movers import demo_movers
from plugins.heads.test_name_movers import known_model, known_pairs

from hooklens.core.errors import InputError
from hooklens.data.indirect_object import NAMES
from hooklens.plugins.heads.mover_result import Criteria, NameMovers
from hooklens.plugins.heads.name_movers import find_name_movers
from hooklens.plugins.heads.named import copying_p, evidence_of, name_evidence
from hooklens.plugins.heads.taxonomy import classify_heads
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.studies import taxonomy_report
from hooklens.testing import tiny_model


def test_a_head_that_raises_all_names_alike_does_not_copy():
    """Its names' ranks go together: their mean was called far from chance in 39 % of such heads."""
    generator = torch.Generator().manual_seed(0)
    names, heads = 24, 400
    liked, loud = torch.randn(names, generator=generator), torch.randn(names, generator=generator)
    noise = 0.3 * torch.randn(names, 1, heads, names, generator=generator)
    written = 5.0 + liked + loud[:, None, None, None] + noise  # some names are liked, some sources are loud
    p, negative = copying_p(written)
    for level in (0.05, 0.5):
        for one in (p, negative):
            assert abs(float((one <= level).float().mean()) - level) < 4 * (level * (1 - level) / heads) ** 0.5 + 0.01
    assert copying_p(written - noise)[0].eq(1).all()  # to the last bit: nothing is left of it


def test_a_head_that_copies_names_and_one_that_writes_their_opposite():
    eye = torch.eye(12)[:, None, None]
    written = torch.cat([eye, -eye], 2) + 0.2 * torch.randn(12, 1, 2, 12, generator=torch.Generator().manual_seed(0))
    copies, suppresses = copying_p(written)
    assert copies[0, 0] < 0.01 < 0.9 < copies[0, 1] and suppresses[0, 1] < 0.01 < 0.9 < suppresses[0, 0]


def made_up(n=96, heads=4) -> NameMovers:
    """L0H0 moves names, L0H1 is its negative, L0H2 acts and copies but looks elsewhere, L0H3 is idle."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return 0.02 * torch.randn(*shape, generator=generator)

    copies = torch.tensor([1.0, -1.0, 1.0, 0.0])
    return replace(
        demo_movers(n, heads),
        margin=torch.tensor([0.5, 0.5, -0.5, 0.0]) + noise(n, 1, heads),
        direct=torch.tensor([0.3, -0.2, 0.3, 0.0]) + noise(n, 1, heads),
        rank=torch.zeros(16, 1, heads, dtype=torch.long),
        written=torch.eye(16)[:, None, None] * copies[:, None] + noise(16, 1, heads, 16),
        name=torch.arange(n) % 16,
        group=torch.arange(n) // 4,
        criteria=Criteria(),
    )


def test_each_label_takes_all_three_and_the_negative_one_is_the_mirror_image():
    found = evidence_of(made_up())
    assert found.labelled(0.05) == {"name mover": [(0, 0)], "negative name mover": [(0, 1)]}
    booster = replace(made_up(), written=torch.ones(16, 1, 4, 16) * torch.arange(16.0))
    assert evidence_of(booster).labelled(0.05) == {"name mover": [], "negative name mover": []}
    undone = replace(made_up(), gap=torch.randn(96, generator=torch.Generator().manual_seed(1)))
    assert not any(evidence_of(undone).labelled(0.05).values())


@pytest.fixture(scope="module")
def reader():
    return tiny_tokenizer(" ".join(f"Ġ{name}" for name in NAMES))


def test_freshly_initialised_models_copy_names_by_chance(reader):
    p = []
    for seed in range(6):
        model = tiny_model(seed=seed, d_vocab=440, n_heads=4, d_model=32, n_ctx=80)
        model.tokenizer = reader
        found, note = name_evidence(model, 64, seed=seed)
        assert found is not None, note
        assert not any(found.labelled(0.05).values())
        p.append(torch.stack(copying_p(found.named.written)).flatten())
    p = torch.cat(p)
    for level in (0.05, 0.5):
        assert abs(float((p <= level).float().mean()) - level) < 4 * (level * (1 - level) / len(p)) ** 0.5 + 0.02


def test_what_is_written_of_names_is_the_full_ov_circuit():
    found = find_name_movers(known_model(), known_pairs())
    names = len(found.written)
    torch.testing.assert_close(found.written[:, 1, 0], torch.eye(names))  # L1H0 copies, L1H1 writes a quarter less
    torch.testing.assert_close(found.written[:, 1, 1], -0.25 * torch.eye(names))


@functools.cache
def of_one_layer():
    """A taxonomy of four heads, in which the evidence of names is put."""
    return classify_heads(tiny_model(n_layers=1, n_heads=4, d_head=2), n=6, draws=50, ioi=0)


def test_name_movers_have_rows_of_their_own():
    """A row showed the label of names beside the numbers of the nearest label of repeats."""
    found = replace(of_one_layer(), names=evidence_of(made_up()))
    assert found.labels()[0][:2] == ["name mover", "negative name mover"]
    rows = {row[0]: dict(zip(found.table().columns, row, strict=True)) for row in found.table().rows}
    movers = found.names.reported
    assert rows["L0H0"]["label"] == "name mover" and rows["L0H1"]["label"] == "negative name mover"
    assert rows["L0H0"]["score"] == pytest.approx(float(movers.margin.mean(0)[0, 0]))
    assert rows["L0H0"]["effect"] == pytest.approx(float(movers.share[0, 0]))
    assert rows["L0H0"]["low"] < rows["L0H0"]["effect"] < rows["L0H0"]["high"] and rows["L0H0"]["q"] < 0.05
    assert rows["L0H1"]["high"] < 0
    counted = {row[0]: row[1] for row in found.counts().rows}
    assert counted["name mover"] == counted["negative name mover"] == 1 and counted["unlabelled"] == 2
    assert "negative name mover" in str(taxonomy_report(found).to_html())


def test_heads_were_labelled_and_measured_on_the_same_pairs():
    """Numbers of the pairs that label flatter the heads so called: shown are those of the other half."""
    movers = made_up()
    found = evidence_of(movers)
    chosen, reported = found.chosen_on, found.reported_on
    assert not torch.isin(movers.group[chosen], movers.group[reported]).any() and len(chosen) == len(reported) == 48
    assert "labelled by 48 pairs, measured on 48 others" in found.note(0.05)
    lucky = movers.direct.clone()
    lucky[chosen] += 1.0  # where they label, everything restores
    found = evidence_of(replace(movers, direct=lucky))
    row = dict(zip(found.table().columns, next(r for r in found.table().rows if r[0] == "L0H0"), strict=True))
    assert row["direct effect"] == pytest.approx(float(movers.direct[reported, 0, 0].mean()), abs=1e-6)
    whole = replace(of_one_layer(), names=found, note=found.note(0.05))
    rows = {r[0]: dict(zip(whole.table().columns, r, strict=True)) for r in whole.table().rows}
    assert rows["L0H0"]["label"] == "name mover" and rows["L0H0"]["effect"] == row["direct effect"] < 0.5
    assert "measured on 48 others" in str(taxonomy_report(whole).to_html())


def test_too_few_pairs_for_halves_are_said_to_be():
    movers = made_up(8)
    one = evidence_of(replace(movers, group=torch.zeros(8, dtype=torch.long)))
    assert "labelled and measured on the same 8 pairs" in one.note(0.05) and one.chosen_on.equal(one.reported_on)
    two = evidence_of(movers).note(0.05)
    assert "4 pairs, measured on 4 others" in two and "groups to label by: 1" in two and "64 pairs are enough" in two
    assert "cannot reach" not in evidence_of(made_up(64)).note(0.05)  # 8 groups label: 8 p of 2^-8 each lie below 0.05


def test_dropout_that_is_on_is_refused():
    model = tiny_model()
    model.add_module("dropout", torch.nn.Dropout(0.1))
    with pytest.raises(InputError, match="dropout"):
        find_name_movers(model, known_pairs())

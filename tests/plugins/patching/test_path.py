"""The result of a path-patching sweep: what it says in numbers, tables and pictures."""

import pytest
import torch
from model.zoo import zoo_model

import hooklens as hl
from hooklens.plugins.patching.path import Fixed, PathSweep, demo, path_patch
from hooklens.plugins.patching.two_runs import excludes_zero
from hooklens.results.statistics import ratio_interval
from hooklens.testing import induction_model, tiny_model


def made(moved, gap=2.0, group=None, into="corrupted", reaches=None):
    """A sweep of heads of one layer with these effects."""
    n, count = moved.shape
    base, other = torch.zeros(n), torch.full((n,), gap)
    clean, corrupted = (other, base) if into == "corrupted" else (base, other)
    place = torch.tensor([[0, head] for head in range(count)])
    return PathSweep(
        moved,
        clean,
        corrupted,
        [f"L0H{i}" for i in range(count)],
        ["L1H0.q"],
        "edges",
        into,
        place,
        torch.ones(count, dtype=torch.bool) if reaches is None else reaches,
        (2, count),
        torch.arange(n) if group is None else group,
        computed=1.0,
        largest_error=0.0,
        n_verified=0,
        how="engine",
    )


def test_shares_are_of_the_way_to_the_other_run_in_both_directions():
    moved = torch.tensor([[1.0, -0.5], [1.0, -0.5]])
    into_corrupted = made(moved)
    assert into_corrupted.share.tolist() == into_corrupted.recovered.tolist() == [0.5, -0.25]
    into_clean = made(moved, into="clean")
    assert into_clean.share.tolist() == [0.5, -0.25] and into_clean.recovered.tolist() == [0.5, 1.25]
    assert (into_clean.clean, into_clean.corrupted) == (0.0, 2.0)


def test_recovered_is_that_of_patch():
    model = zoo_model("gpt2", dtype=torch.float64)
    clean, corrupted = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 5, 3, 4]])
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    for value in ("clean", "corrupted"):
        paths = path_patch(model, clean, corrupted, metric, receivers="all", senders="heads", value=value)
        patches = hl.patch(model, clean, corrupted, metric, site="z", value=value)
        torch.testing.assert_close(paths.recovered, patches.recovered.flatten())
        torch.testing.assert_close(paths.effect, patches.effect.flatten())
        assert (paths.clean, paths.corrupted) == (patches.clean, patches.corrupted)


def test_intervals_resample_groups():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(6).repeat_interleave(4)
    by_group = torch.randn(6, 3, generator=generator)[group]
    sweep, alone = made(by_group, group=group), made(by_group)
    low, high = sweep.interval()
    expected = ratio_interval(by_group, torch.full((24,), 2.0), group=group)
    assert torch.equal(low, expected[0]) and torch.equal(high, expected[1])
    assert bool(((high - low) > 1.3 * (alone.interval()[1] - alone.interval()[0])).all())


def test_one_group_has_no_interval_and_no_halves():
    sweep = made(torch.ones(3, 2), group=torch.zeros(3, dtype=torch.long))
    assert bool(sweep.interval()[0].isnan().all()) and len(sweep.table().columns) == 3
    with pytest.raises(hl.HooklensError, match="two halves need at least two independent groups"):
        sweep.held_out()


def test_what_is_chosen_on_one_half_shrinks_on_the_other_where_nothing_is_there():
    noise = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
    noise[:, 7] += 1.5
    table = made(noise).held_out(5)
    first, *others = table.rows
    assert first[0] == "L0H7" and first[2] == pytest.approx(0.75, abs=0.25) and first[-1] < 0.01
    assert all(abs(row[2]) < abs(row[1]) and row[-1] > 0.05 for row in others)


def test_a_difference_that_could_be_chance_has_no_shares():
    sweep = made(torch.ones(4, 2))
    unsure = sweep.of_pairs(torch.arange(4))
    unsure = PathSweep(**{**vars(unsure), "clean_per_pair": torch.tensor([1.0, -1.0, 1.0, -1.0])})
    assert not unsure.defined and bool(unsure.share.isnan().all()) and bool(unsure.recovered.isnan().all())
    assert excludes_zero(torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.long)) and not excludes_zero(
        torch.zeros(2), torch.arange(2)
    )


def test_the_grid_has_a_column_of_mlps_and_holes_where_nothing_reaches():
    model = tiny_model()
    sweep = path_patch(model, [[1, 2, 3]], [[1, 4, 3]], lambda x: x[:, -1, 0], receivers=["L1H1.k", "MLP0"])
    grid = sweep.grid(sweep.values)
    assert grid.shape == (2, 3) and grid.isfinite().tolist() == [[True] * 3, [False] * 3]
    assert [float(x) for x in grid[0]] == [
        float(sweep.values[sweep.senders.index(n)]) for n in ("L0H0", "L0H1", "MLP0")
    ]
    drawn = sweep.figure()
    assert list(drawn.layout.xaxis.ticktext) == ["H0", "H1", "MLP"]
    assert "L1H1.k, MLP0 (edges)" in drawn.layout.title.text


def test_tables_list_senders_that_reach_largest_first():
    reaches = torch.tensor([True, True, False])
    sweep = made(torch.tensor([[0.1, -2.0, 9.0], [0.1, -2.0, 9.0]]), reaches=reaches)
    assert [row[0] for row in sweep.table(None).rows] == ["L0H1", "L0H0"] and len(sweep.top(1).rows) == 1


def test_semantics_stand_in_the_result():
    model = induction_model()
    metric = hl.logit_diff(model, answer=1, wrong_answer=4)
    sweep = path_patch(model, [[3, 1, 4, 9, 3]], [[5, 1, 4, 9, 3]], metric, receivers=Fixed(("k", 1, 1)))
    assert sweep.semantics == "fixed receivers" and sweep.receivers == ["L1H1.k"] and sweep.into == "corrupted"
    assert 0 < sweep.computed < 1 and sweep.largest_error < 1e-5 and sweep.n_verified == 1


def test_the_demo_names_its_receivers():
    assert demo(tiny_model()).receivers == ["L1H0.q", "L1H0.v"]
    assert demo(tiny_model(n_heads=4, n_key_value_heads=2)).receivers == ["L1H0.q", "L1G0.v"]
    assert demo(tiny_model(n_layers=1)).receivers == ["final"]

"""Directions: tokens along them, angles between them, and what a probe of one data set says of another."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from hooklens.core.errors import InputError
from hooklens.plugins.probing.directions import TokenProjection, fisher, project_tokens
from hooklens.plugins.probing.geometry import Geometry, measure_geometry
from hooklens.plugins.probing.probe_transfer import Transfer, transfer_probe
from hooklens.plugins.probing.probes import MassMean, Probe
from hooklens.plugins.probing.scoring import Trainer, as_rows
from hooklens.plugins.probing.task import read_task
from hooklens.results.statistics import auc
from hooklens.testing import tiny_model

VOCAB, D = 80, 24


def marked(strength: float = 1.0):
    """Odd tokens carry one unit vector, tokens above the middle another one at right angles."""
    model = tiny_model(d_vocab=VOCAB, d_model=D, dtype=torch.float64)
    both = torch.linalg.qr(torch.randn(D, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].T
    with torch.no_grad():
        model.W_E[1::2] += strength * both[0]
        model.W_E[VOCAB // 2 :] += strength * both[1]
    return model, both


def of(direction) -> Probe:
    zero = torch.zeros_like(direction)
    return Probe(torch.stack([zero, direction]), torch.zeros(2).double(), torch.stack([zero, direction]))


def test_auc_and_fisher_by_their_definitions():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(6, (5, 40), generator=generator).double()  # with ties
    label = torch.randint(2, (40,), generator=generator)
    for row, found in zip(values, auc(values, label == 1), strict=True):
        assert float(found) == pytest.approx(roc_auc_score(label.numpy(), row.numpy()))
    one, other = values[0][label == 1], values[0][label == 0]
    expected = (one.mean() - other.mean()) ** 2 / (one.var(correction=0) + other.var(correction=0))
    assert float(fisher(values, label)[0]) == pytest.approx(float(expected))


def test_two_gaussians_have_the_auc_that_is_known():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(40_000) % 2
    values = torch.randn(1, 40_000, generator=generator, dtype=torch.float64) + 1.5 * label
    assert float(auc(values, label == 1)[0]) == pytest.approx(
        0.5 * (1 + math.erf(1.5 / 2)), abs=0.01
    )  # Phi(d' / sqrt 2)
    assert float(fisher(values, label)[0]) == pytest.approx(1.5**2 / 2, abs=0.03)


def test_tokens_lie_along_the_direction_that_marks_them():
    model, both = marked()
    tokens = torch.arange(VOCAB)
    found = project_tokens(model, of(both[0]), tokens, tokens % 2, second=of(both[1]))
    torch.testing.assert_close(found.along, model.W_E.detach() @ both[0])
    torch.testing.assert_close(found.across, model.W_E.detach() @ both[1])
    assert found.auc > 0.95 and found.p == pytest.approx(1 / 501)
    beside = project_tokens(model, of(both[1]), tokens, tokens % 2)
    assert beside.auc < 0.65 and beside.p > 0.01
    assert float(beside.across @ beside.along) != 0.0 and beside.across_name == "largest remaining variance"


def test_a_projection_is_a_result(tmp_path):
    model, both = marked()
    tokens = torch.arange(VOCAB)
    found = project_tokens(model, of(both[0]), tokens, tokens % 2, draws=50)
    found.save(tmp_path / "found.safetensors")
    assert str(TokenProjection.load(tmp_path / "found.safetensors").table()) == str(found.table())
    assert len(found.top_tokens(3)) == 6 and len(found.table(1)) == 1
    drawn = found.figure()
    assert [trace.name for trace in drawn.data] == ["0", "1"] and sum(len(trace.x) for trace in drawn.data) == VOCAB
    with pytest.raises(InputError, match="0 or 1"):
        project_tokens(model, of(both[0]), tokens, tokens % 3)
    with pytest.raises(InputError, match="vectors of size 5"):
        project_tokens(model, of(torch.ones(5).double()), tokens, tokens % 2)


def tasks(model, seed: int = 0):
    tokens = torch.randint(VOCAB, (160, 2), generator=torch.Generator().manual_seed(seed))
    last = tokens[:, -1].tolist()
    again = torch.randint(VOCAB, (160, 2), generator=torch.Generator().manual_seed(seed + 1))
    return [
        read_task(model, tokens, [i % 2 for i in last], group=[f"t{i}" for i in last], name="odd"),
        read_task(model, tokens, [int(i >= VOCAB // 2) for i in last], group=[f"t{i}" for i in last], name="upper"),
        read_task(model, again, [int(i) % 2 for i in again[:, -1]], name="odd again"),
    ]


def test_directions_at_right_angles_and_directions_of_the_same_thing():
    model, _ = marked(3.0)
    found = measure_geometry(model, tasks(model), site=("resid_pre", 0), draws=60)
    assert abs(float(found.cosine[0, 1])) < 0.35 and float(found.cosine[0, 2]) > 0.9
    assert bool((found.repeat > 0.9).all())
    assert float(found.p[0, 2]) == pytest.approx(1 / 61) and bool(found.p.diagonal().isnan().all())
    torch.testing.assert_close(found.cosine.diagonal(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found.cosine, found.cosine.T)


def test_the_bound_for_isotropic_directions_is_that_of_draws():
    model, _ = marked()
    found = measure_geometry(model, tasks(model)[:1], site=("resid_pre", 0), draws=1)
    drawn = torch.randn(2, 20_000, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines = torch.cosine_similarity(*drawn, dim=-1).abs()
    assert found.isotropic == pytest.approx(float(cosines.quantile(0.95)), abs=0.01)


def test_a_direction_of_few_groups_does_not_look_as_if_it_did_not_repeat():
    """A class that stands in one group only has no second half: NaN, not the 0 of two directions at right angles."""
    model, _ = marked(3.0)
    tokens = torch.randint(VOCAB, (40, 2), generator=torch.Generator().manual_seed(0))
    label = [int(i < 8) for i in range(40)]
    rare = read_task(model, tokens, label, group=[max(i, 7) for i in range(40)], name="in a group")
    two = read_task(model, tokens, label, group=[max(i, 3) if i < 4 else max(i, 7) for i in range(40)], name="in two")
    found = measure_geometry(model, [rare, two], site=("resid_pre", 0), draws=2)
    assert math.isnan(float(found.repeat[0])) and found.repeat[1].abs() > 1e-6


def test_geometry_is_a_result(tmp_path):
    model, _ = marked()
    found = measure_geometry(model, tasks(model), site=("resid_pre", 0), draws=10)
    found.save(tmp_path / "found.safetensors")
    assert str(Geometry.load(tmp_path / "found.safetensors").table()) == str(found.table())
    assert len(found.table()) == 3 and len(found.top(2)) == 2 and found.figure().data
    with pytest.raises(InputError, match="at a single point"):
        measure_geometry(model, tasks(model), site="resid_pre")
    three = read_task(model, [[i] for i in range(30)], [i % 3 for i in range(30)], name="thirds")
    for compare in (measure_geometry, transfer_probe):
        with pytest.raises(InputError, match="'thirds' has"):
            compare(model, [three], site=("resid_pre", 0))


def test_a_probe_carries_over_where_the_same_thing_is_asked_and_not_elsewhere():
    model, _ = marked(4.0)
    odd, upper, again = tasks(model)
    free = read_task(model, odd.tokens, odd.label.tolist(), name="odd, ungrouped")
    found = transfer_probe(model, [free, upper, again], site=("resid_pre", 0), draws=39)
    assert float(found.accuracy[0, 2]) > 0.95 and float(found.auc[2, 0]) > 0.95
    assert abs(float(found.auc[2, 1]) - 0.5) < 0.15
    kept = found.n > 0
    assert found.p[0, 2] == found.p[0, 0] == pytest.approx(1 / 40) and found.p[2, 1] > 0.05
    assert found.q[0, 2] < 0.05 < found.q[2, 1] and bool(found.p[~kept].isnan().all())
    assert float(found.null[0, :, 0, 2].std()) > 0.3 > 0.1 > float(found.null[1, :, 0, 2].std())  # see `Transfer`
    assert found.top(1).rows[0][:2] == ("odd, ungrouped", "odd again")
    assert bool((found.low <= found.accuracy)[kept].all()) and bool((found.accuracy <= found.high)[kept].all())


def test_what_is_shared_with_the_training_task_is_left_out():
    model, _ = marked()
    odd, upper, again = tasks(model)
    found = transfer_probe(model, [odd, upper, again], site=("resid_pre", 0), draws=2)
    assert found.n[0, 1] == 0 and math.isnan(float(found.accuracy[0, 1]))  # the same prompts under another question
    assert 0 < int(found.n[0, 2]) <= 160 and found.n.diagonal().tolist() == [160] * 3
    x = model.run_with_cache(torch.stack(odd.tokens), "blocks.0.hook_resid_pre")[1]["resid_pre", 0][:, -1]
    weight, bias, _ = Trainer(MassMean(), 2).fit(as_rows(x), odd.label.numpy())
    rows = torch.stack(again.tokens)
    new = [i for i, row in enumerate(rows.tolist()) if row not in torch.stack(odd.tokens).tolist()]
    y = model.run_with_cache(rows[new], "blocks.0.hook_resid_pre")[1]["resid_pre", 0][:, -1]
    said = (y @ torch.from_numpy(weight).T + torch.from_numpy(bias)).argmax(1)
    assert float(found.accuracy[0, 2]) == pytest.approx(float((said == again.label[new]).double().mean()))


def test_transfer_is_a_result(tmp_path):
    model, _ = marked()
    found = transfer_probe(model, tasks(model), site=("resid_pre", 0), draws=5)
    found.save(tmp_path / "found.safetensors")
    assert str(Transfer.load(tmp_path / "found.safetensors").table()) == str(found.table())
    assert len(found.table()) == 9 and found.figure().data

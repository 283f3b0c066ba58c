"""hl.patch: what its result says, its intervals, and answers that are known."""

import json

import pytest
import torch

import hooklens as hl
from hooklens.data.prompts import common_ends
from hooklens.model.config import LinearScore
from hooklens.plugins.patching.activation import PatchSweep, demo
from hooklens.results.result import summary
from hooklens.results.statistics import ratio_interval
from hooklens.studies import study_pair
from hooklens.testing import or_gate, tiny_model

CORRUPTED = torch.tensor([[1, 5, 2, 7], [4, 4, 9, 0], [8, 1, 1, 3], [2, 2, 6, 1]])
CLEAN = torch.tensor([[1, 5, 8, 7], [4, 3, 9, 0], [3, 1, 1, 3], [2, 2, 7, 5]])


def made(per_pair, clean, corrupted, **changes) -> PatchSweep:
    """A sweep by layer with these numbers."""
    per_pair = torch.tensor(per_pair, dtype=torch.float64)
    fields = {
        "site": "resid_pre",
        "by": ("layer",),
        "into": "corrupted",
        "replacement": "clean",
        "computed": 0.5,
        "largest_error": 0.0,
    }
    labels = {"layer": [f"L{i}" for i in range(per_pair.shape[1])]}
    ends = (torch.tensor(end, dtype=torch.float64) for end in (clean, corrupted))
    return PatchSweep(per_pair, *ends, **fields | {"labels": labels, "n_verified": 1, "how": "engine"} | changes)


# -- what the numbers mean


def test_recovered_is_a_ratio_of_means():
    sweep = made([[1.0, 2.0], [5.0, 2.0]], clean=[2.0, 10.0], corrupted=[0.0, 0.0])
    assert sweep.values.tolist() == [3.0, 2.0]
    assert sweep.recovered.tolist() == [0.5, 2 / 6]  # not the mean of 1/2 and 1/2, of 1 and 1/5
    assert (sweep.clean, sweep.corrupted) == (6.0, 0.0)
    assert sweep.effect.tolist() == [3.0, 2.0]
    noised = made(
        [[1.0, 2.0], [5.0, 2.0]], clean=[2.0, 10.0], corrupted=[0.0, 0.0], into="clean", replacement="corrupted"
    )
    assert noised.effect.tolist() == [-3.0, -4.0] and noised.order() == [(1,), (0,)]


def test_recovered_is_undefined_where_chance_alone_would_do():
    """The clean-corrupted gaps are 1, -1, 2, -1.5: their interval includes 0, though their mean does not."""
    sweep = made([[1.0], [0.0], [0.0], [2.0]], clean=[1.0, -1.0, 2.0, -1.5], corrupted=[0.0] * 4)
    assert not sweep.defined and sweep.clean != sweep.corrupted
    assert bool(sweep.recovered.isnan().all()) and all(bool(end.isnan().all()) for end in sweep.interval())
    assert "NaN" in str(sweep.table()) or "nan" in str(sweep.table())
    sure = made([[1.0], [0.0], [0.0], [2.0]], clean=[1.0, 1.5, 2.0, 1.5], corrupted=[0.0] * 4)
    assert sure.defined and bool(sure.recovered.isfinite().all())
    assert made([[1.0]], clean=[1.0], corrupted=[0.5]).defined
    assert not made([[1.0]], clean=[1.0], corrupted=[1.0]).defined


def test_the_bootstrap_recomputes_both_means():
    """Against a loop that draws the same pairs and divides the two means of each draw; percentiles as Hesterberg's."""
    from scipy.stats import norm, t

    generator = torch.Generator().manual_seed(3)
    numerator = torch.randn(7, 5, generator=generator, dtype=torch.float64) + 1
    denominator = torch.rand(7, generator=generator, dtype=torch.float64) + 0.5
    low, high = ratio_interval(numerator, denominator, level=0.9, draws=300, seed=4)
    drawn = torch.randint(7, (300, 7), generator=torch.Generator().manual_seed(4))
    ratios = torch.stack([numerator[rows].mean(0) / denominator[rows].mean() for rows in drawn])
    tail = float(norm.cdf(-t.ppf(0.95, 6) * (7 / 6) ** 0.5))
    torch.testing.assert_close(low, ratios.quantile(tail, dim=0), atol=1e-3, rtol=1e-3)  # t by a series, good to 1e-4
    torch.testing.assert_close(high, ratios.quantile(1 - tail, dim=0), atol=1e-3, rtol=1e-3)


def test_an_interval_covers_what_it_should():
    """Of 200 samples of 40 pairs from a known ratio 2, about 95 in 100 intervals hold it."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(200):
        below = torch.rand(40, generator=generator, dtype=torch.float64) + 0.5
        above = 2 * below + 0.5 * torch.randn(40, generator=generator, dtype=torch.float64)
        low, high = ratio_interval(above[:, None], below, draws=300, seed=seed)
        held += bool(low <= 2 <= high)
    assert 178 <= held <= 199


def test_intervals_of_a_sweep_hold_its_share():
    model = tiny_model(dtype=torch.float64)
    sweep = hl.patch(model, CLEAN, CORRUPTED, hl.kl(model, CLEAN), site="mlp_out")  # 0 at clean, negative elsewhere
    assert sweep.defined
    low, high = sweep.interval()
    assert bool((low <= sweep.recovered + 1e-9).all() and (sweep.recovered <= high + 1e-9).all())
    wider = sweep.interval(0.99)
    assert bool((wider[0] <= low).all() and (high <= wider[1]).all())
    assert torch.equal(sweep.interval()[0], low)  # drawn by seed


# -- rows, pictures, files


SWEEPS = {
    "layer x pos": {"site": "resid_pre"},
    "layer x head": {"site": "z"},
    "layer": {"site": "mlp_out", "by": "layer"},
    "layer x head x pos": {"site": "q", "by": "layer x head x pos"},
    "layer x neuron": {"site": "post", "by": "layer x neuron"},
    "noising": {"site": "attn_out", "value": "corrupted"},
    "zero": {"site": "z", "value": "zero"},
    "mean": {"site": "mlp_post", "value": "mean"},
}


SIZES = [(name, n) for name in SWEEPS for n in (1, 4) if (name, n) != ("mean", 1)]  # a mean is over pairs


@pytest.mark.parametrize(("name", "n_pairs"), SIZES)
def test_tables_pictures_and_files(name, n_pairs, tmp_path):
    model = tiny_model()
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    sweep = hl.patch(model, CLEAN[:n_pairs], CORRUPTED[:n_pairs], metric, **SWEEPS[name])
    assert sweep.per_pair.shape == (n_pairs, *sweep.values.shape) and len(sweep.by) == sweep.values.ndim
    top = sweep.top(2)
    assert len(top.rows) == 2 and len(sweep.table(None).rows) == sweep.values.numel()
    moved = [
        abs(row[1] - (sweep.corrupted if sweep.into == "corrupted" else sweep.clean)) for row in sweep.table().rows
    ]
    assert moved == sorted(moved, reverse=True)
    assert repr(sweep).startswith(f"PatchSweep: clean {summary(sweep.clean)}, corrupted ")
    assert top.rows[0][0] in repr(sweep) and "Float[" not in repr(sweep)
    sweep.figure().to_json()
    path = tmp_path / "sweep.safetensors"
    sweep.save(path)
    back = PatchSweep.load(path)
    assert torch.equal(back.per_pair, sweep.per_pair) and back.labels == sweep.labels
    assert tuple(back.by) == sweep.by and (back.clean, back.computed, back.how) == (
        sweep.clean,
        sweep.computed,
        sweep.how,
    )
    assert str(back.table()) == str(sweep.table())
    assert json.loads(json.dumps(sweep.to_json(), allow_nan=False))["site"] == sweep.site


def test_names():
    model = tiny_model()
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    sweep = hl.patch(model, CLEAN[:1], CORRUPTED[:1], metric)
    assert sweep.labels == {"layer": ["L0", "L1"], "pos": ["1", "5", "8 |2", "7"]}
    assert sweep.name_of((1, 2)) == "L1 '8 |2' (2)"
    assert hl.patch(model, CLEAN, CORRUPTED, metric, site="z").name_of((1, 0)) == "L1H0"
    neurons = hl.patch(model, CLEAN, CORRUPTED, metric, site="post", by="layer x neuron")
    assert neurons.name_of((0, 17)) == "L0N17"


def test_demo_runs_on_the_smallest_models():
    for model in (tiny_model(), tiny_model(n_layers=1, n_ctx=1), tiny_model(d_vocab=3, n_ctx=4)):
        assert demo(model).how == "engine"


def test_common_ends():
    cases = {
        ((1, 2, 3), (1, 2, 3)): (3, 0),
        ((1, 2, 3), (1, 2)): (2, 0),
        ((1, 1, 1), (1, 1)): (2, 0),
        ((1, 2, 9), (3, 9)): (0, 1),
        ((5,), (6,)): (0, 0),
        ((1, 2, 1), (1, 1)): (1, 1),
    }
    for (a, b), expected in cases.items():
        assert common_ends(torch.tensor(a), torch.tensor(b)) == expected


# -- known answers


def test_or_gate():
    """Either head alone carries the gate: zeroing one leaves 1, zeroing both gives 0."""
    gate, tokens = or_gate(), torch.tensor([[0]])

    def says(logits):
        return logits[:, -1, 1]

    heads = hl.patch(gate, tokens, tokens, says, site="z", value="zero")
    assert heads.values.tolist() == [[1.0, 1.0]] and heads.clean == 1
    assert hl.patch(gate, tokens, tokens, says, site="z", by="layer", value="zero").values.tolist() == [0.0]
    assert hl.patch(gate, tokens, tokens, says, site="attn_out", value="zero").values.tolist() == [[0.0]]


def test_effects_add_up_in_a_linear_model():
    """No norm, no MLP, uniform attention: the effects of all positions are the effect of the layer."""
    model = tiny_model(attn_only=True, normalization_type=None, score_fn=LinearScore(), dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:  # q k = 1 whatever is read: the pattern is the same on both prompts
            for linear in (block.attn.q, block.attn.k):
                linear.weight.zero_()
                linear.bias.fill_(1.0)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    for site in ("resid_pre", "resid_post", "attn_out"):
        cells = hl.patch(model, CLEAN, CORRUPTED, metric, site=site)
        layers = hl.patch(model, CLEAN, CORRUPTED, metric, site=site, by="layer")
        torch.testing.assert_close(cells.effect.sum(1), layers.effect, atol=1e-12, rtol=1e-9)
    heads = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
    layers = hl.patch(model, CLEAN, CORRUPTED, metric, site="z", by="layer")
    torch.testing.assert_close(heads.effect.sum(1), layers.effect, atol=1e-12, rtol=1e-9)
    whole = hl.patch(model, CLEAN, CORRUPTED, metric, site="resid_pre", by="layer")
    torch.testing.assert_close(whole.per_pair, whole.clean_per_pair[:, None].expand(-1, 2), atol=1e-12, rtol=1e-9)


def test_restoring_and_noising_everything_are_each_other_reversed():
    model = tiny_model(dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    there = hl.patch(model, CLEAN, CORRUPTED, metric, by="layer")
    back = hl.patch(model, CLEAN, CORRUPTED, metric, by="layer", value="corrupted")
    swapped = hl.patch(model, CORRUPTED, CLEAN, metric, by="layer")
    assert (there.into, back.into) == ("corrupted", "clean")
    torch.testing.assert_close(there.values, torch.full_like(there.values, there.clean))
    torch.testing.assert_close(back.values, torch.full_like(back.values, there.corrupted))
    torch.testing.assert_close(back.per_pair, swapped.per_pair)


def test_the_table_of_a_study_of_two_pairs_was_refused():
    clean, corrupted = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5]]), torch.tensor([[1, 5, 3, 4], [2, 6, 4, 5]])
    study = study_pair(tiny_model(), hl.PromptPairs(clean, corrupted, answer=[5, 6], wrong_answer=[6, 7]))
    assert study.table(4).columns[-2:] == ("95% low", "95% high") and len(study.table(4)) == 4

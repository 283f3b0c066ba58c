"""ablate: each kind against a loop of hooked forwards, what its result says, and answers that are known."""

import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.zoo import ZOO, zoo_model

import hooklens as hl
from hooklens.core.errors import InputError, NameNotFound
from hooklens.plugins.patching.ablation import AblationSweep, ablate
from hooklens.plugins.patching.ablation_comparison import AblationComparison, compare_ablations
from hooklens.results.claims import HeldOutEffects
from hooklens.results.statistics import q_values, sign_flip_p
from hooklens.sweeps.planning import Patch
from hooklens.sweeps.replacement import OtherRun, Resample
from hooklens.testing import induction_model, or_gate, tiny_model

PROMPTS = torch.tensor([[1, 5, 2, 7], [4, 4, 9, 0], [8, 1, 1, 3], [2, 2, 6, 1]])
OTHERS = torch.tensor([[3, 0, 10, 7], [6, 6, 2, 9], [7, 7, 5, 3], [9, 8, 1, 0]])


def metric_of(model):
    return hl.logit_diff(model, answer=[3, 1, 4, 1], wrong_answer=[4, 2, 3, 0])


def heads_loop(model, prompts, metric, value):
    """prompt layer head: one hooked forward a head; `value(name)` is what is written, broadcast over prompts."""
    out = torch.zeros(len(prompts), model.cfg.n_layers, model.cfg.n_heads, dtype=model.dtype)
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.attn.hook_z"
        for head in range(model.cfg.n_heads):

            def write(z, hook, head=head, name=name):
                z[:, :, head] = value(name)[..., head, :]
                return z

            out[:, layer, head] = metric(model.run_with_hooks(prompts, fwd_hooks=[(name, write)]))
    return out.detach()


def cache_of(model, prompts):
    with torch.no_grad():
        return model.run_with_cache(prompts, names="z")[1]


# -- each kind is what the loop gives


@pytest.mark.parametrize("name", [name for name in ZOO if "d_vocab_out" not in ZOO[name]])
def test_zero_and_mean_are_the_loop_in_every_family(name):
    model = zoo_model(name, dtype=torch.float64)
    metric, cache = metric_of(model), cache_of(model, PROMPTS)
    with hl.engine(memory=1):  # every bin on its own
        zero = ablate(model, PROMPTS, metric, value="zero")
    mean = ablate(model, PROMPTS, metric, value="mean of others")
    expected = heads_loop(model, PROMPTS, metric, lambda name: torch.zeros_like(cache[name]))
    torch.testing.assert_close(zero.per_prompt, expected, atol=1e-10, rtol=1e-10)
    n = len(PROMPTS)
    expected = heads_loop(model, PROMPTS, metric, lambda name: (cache[name].sum(0) - cache[name]) / (n - 1))
    torch.testing.assert_close(mean.per_prompt, expected, atol=1e-10, rtol=1e-10)
    expected = heads_loop(model, PROMPTS, metric, lambda name: cache[name].mean(0))
    for value in ("mean", hl.Mean(PROMPTS)):
        with_own = ablate(model, PROMPTS, metric, value=value)
        torch.testing.assert_close(with_own.per_prompt, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(zero.base_per_prompt, metric(model(PROMPTS)).detach(), atol=1e-10, rtol=1e-10)


def test_freeze_is_the_loop():
    model = tiny_model(dtype=torch.float64)
    cache = cache_of(model, OTHERS)
    found = ablate(model, PROMPTS, metric_of(model), value=OtherRun(OTHERS))
    expected = heads_loop(model, PROMPTS, metric_of(model), lambda name: cache[name])
    torch.testing.assert_close(found.per_prompt, expected, atol=1e-10, rtol=1e-10)
    assert found.replacement == "other run"


def test_all_draws_of_a_resample_are_the_mean_over_the_other_prompts():
    """With as many draws as there are other prompts each is drawn once, so the mean needs no seed to be known."""
    model, metric = tiny_model(dtype=torch.float64), metric_of(tiny_model())
    found = ablate(model, PROMPTS, metric, value=Resample(draws=99))
    assert found.by_draw.shape == (3, 2, 2)  # three others
    cache = cache_of(model, PROMPTS)
    shifted = [
        heads_loop(model, PROMPTS, metric, lambda name, by=by: cache[name].roll(by, 0)) for by in (1, 2, 3)
    ]  # together, every prompt's activation in every other prompt
    torch.testing.assert_close(found.per_prompt, torch.stack(shifted).mean(0), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.by_draw.mean(0), found.effect, atol=1e-10, rtol=1e-10)


@functools.cache
def two_prompts():
    model, two = tiny_model(), PROMPTS[:2]
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    return model, metric, two, ablate(model, two, metric, value=OtherRun(two.flip(0)))


@given(seed=st.integers(0, 10**6), draws=st.integers(1, 5))
@settings(max_examples=8, deadline=None)
def test_resampling_never_writes_a_prompts_own_activation(seed, draws):
    """Two prompts: each can only receive the other's, whatever the seed; a repeated prompt is no other one."""
    model, metric, two, swapped = two_prompts()
    drawn = ablate(model, two, metric, value=Resample(draws=draws, seed=seed))
    torch.testing.assert_close(drawn.per_prompt, swapped.per_prompt)
    repeated = torch.cat([two, two])
    drawn = ablate(model, repeated, metric, value=Resample(draws=draws, seed=seed))
    torch.testing.assert_close(drawn.per_prompt, swapped.per_prompt.repeat(2, 1, 1), atol=1e-5, rtol=1e-4)


def test_draws_come_from_the_seed_and_the_reference():
    model, metric = tiny_model(), metric_of(tiny_model())
    first, again, other = (
        ablate(model, PROMPTS, metric, value=Resample(draws=1, seed=seed)).per_prompt for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    alone = ablate(model, PROMPTS[:1], metric.pairs(torch.tensor([0])), value=Resample(OTHERS[:1]))
    frozen = ablate(model, PROMPTS[:1], metric.pairs(torch.tensor([0])), value=OtherRun(OTHERS[:1]))
    assert torch.equal(alone.per_prompt, frozen.per_prompt) and len(alone.by_draw) == 1


def test_a_mean_over_prompts_of_other_lengths_is_over_all_positions():
    model, metric = tiny_model(dtype=torch.float64), metric_of(tiny_model())
    reference = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    acts = [cache_of(model, torch.tensor([row])) for row in reference]
    found = ablate(model, PROMPTS, metric, value=hl.Mean(reference))
    expected = heads_loop(
        model, PROMPTS, metric, lambda name: torch.cat([cache[name][0] for cache in acts]).mean(0)[None, None]
    )
    torch.testing.assert_close(found.per_prompt, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_mean_does_not_hold_the_prompt_that_is_ablated(dtype):
    """With two prompts the mean of the others is the other prompt, so that mean and resample are the same."""
    model, two = tiny_model(dtype=dtype), PROMPTS[:2]
    metric = hl.log_prob(model, answer=3)
    mean, other = (ablate(model, two, metric, value=value) for value in ("mean of others", Resample(draws=1)))
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(mean.per_prompt, other.per_prompt, atol=tolerance, rtol=tolerance)


def test_the_mean_of_the_others_is_over_all_their_positions_where_lengths_differ():
    model = tiny_model(dtype=torch.float64)
    mixed = [[1, 5, 2], [4, 4, 9, 0], [8, 1, 1], [2, 2, 6, 1]]
    metric = hl.log_prob(model, answer=3)
    found = ablate(model, mixed, metric, value="mean of others")
    for i, row in enumerate(mixed):
        alone = ablate(model, [row], metric, value=hl.Mean(mixed[:i] + mixed[i + 1 :]))
        torch.testing.assert_close(found.per_prompt[i], alone.per_prompt[0], atol=1e-10, rtol=1e-10)


def test_prompts_of_several_lengths_are_those_of_each_length_together():
    model = tiny_model(dtype=torch.float64)
    mixed = [[1, 5, 2], [4, 4, 9, 0], [8, 1, 1], [2, 2, 6, 1]]
    metric = metric_of(model)
    for value in ("zero", Resample()):
        found = ablate(model, mixed, metric, value=value)
        for rows in ([0, 2], [1, 3]):
            part = metric.pairs(torch.tensor(rows))
            alone = ablate(model, [mixed[i] for i in rows], part, value=value)
            torch.testing.assert_close(found.per_prompt[rows], alone.per_prompt, atol=1e-10, rtol=1e-10)


UNITS = {
    "heads": {"site": "z"},
    "heads by position": {"site": "z", "by": "layer x head x pos"},
    "neurons": {"site": "post", "by": "layer x neuron"},
    "whole attention layers": {"site": "attn_out", "by": "layer"},
    "whole MLP layers": {"site": "mlp_out", "by": "layer"},
    "positions": {"site": "mlp_out", "by": "layer x pos"},
    "some": {"site": "z", "patches": [Patch(1, head=0), Patch(0, pos=2, head=1)]},
}


VALUES = ["zero", "mean", "mean of others", "resample", OtherRun(OTHERS)]
EVERY_OTHER = [(unit, VALUES[(i + j) % 5]) for i, unit in enumerate(UNITS) for j in (0, 2)]  # each twice or more


@pytest.mark.parametrize(("unit", "value"), EVERY_OTHER)
def test_every_unit_and_kind_tables_draws_and_survives_a_file(unit, value, tmp_path):
    model = tiny_model()
    sweep = ablate(model, PROMPTS, metric_of(model), value=value, group=[0, 0, 1, 1], **UNITS[unit])
    assert sweep.how == "engine" and sweep.largest_error < 1e-5 and sweep.n_verified > 0
    assert sweep.per_prompt.shape == (4, *sweep.effect.shape) and sweep.group.tolist() == [0, 0, 1, 1]
    low, high = sweep.interval()
    assert bool((low <= sweep.effect + 1e-6).all() and (sweep.effect <= high + 1e-6).all())
    effects = [abs(row[2]) for row in sweep.table(None).rows]
    assert effects == sorted(effects, reverse=True) and len(effects) == sweep.effect.numel()
    sweep.figure().to_json()
    sweep.save(tmp_path / "sweep.safetensors")
    back = AblationSweep.load(tmp_path / "sweep.safetensors")
    assert torch.equal(back.per_prompt, sweep.per_prompt) and str(back.table()) == str(sweep.table())
    json.dumps(sweep.to_json(), allow_nan=False)


def test_a_negative_position_of_a_patch_was_refused_and_one_name_was_read_letter_by_letter():
    model = tiny_model()
    metric = metric_of(model)
    last = ablate(model, PROMPTS, metric, value="zero", patches=["L1H0@-1", "L0@-2"])
    counted = ablate(model, PROMPTS, metric, value="zero", patches=[Patch(1, pos=3, head=0), Patch(0, pos=2)])
    assert torch.equal(last.per_prompt, counted.per_prompt)
    assert last.labels == {"patch": ["L1H0@-1", "L0@-2"]} and counted.labels == {"patch": ["L1H0@3", "L0@2"]}
    for one in ("L1H0", Patch(1, head=0), (1, 0)):
        assert ablate(model, PROMPTS, metric, value="zero", patches=one).labels == {"patch": ["L1H0"]}
    with pytest.raises(InputError, match=r"pos -5 of z asked for; there are positions 0 to 3 \(or -4 to -1\)"):
        ablate(model, PROMPTS, metric, value="zero", patches="L1H0@-5")


GROUPED = tiny_model(n_heads=4, n_key_value_heads=2, normalization_type="RMS")


@pytest.mark.parametrize("site", ["k", "v"])
def test_the_row_of_a_key_head_that_heads_share_was_named_as_if_it_were_a_head(site):
    metric = metric_of(GROUPED)
    sweep = ablate(GROUPED, PROMPTS, metric, site=site, value="zero")
    assert sweep.names == [f"L{layer}G{head}.{site}" for layer in range(2) for head in range(2)]
    assert sweep.table(1).rows[0][0] in sweep.names and f"G1.{site}" in sweep.figure().to_json()
    one = sweep.top(1).rows[0][0]  # a row's name asks for that row
    assert ablate(GROUPED, PROMPTS, metric, site=site, value="zero", patches=[one]).names == [one]
    patched = hl.patch(GROUPED, PROMPTS, PROMPTS.flip(0), metric, site=site, by="layer x head x pos")
    assert patched.name_of((1, 1, 0)).startswith(f"L1G1.{site} ")


def test_a_key_head_was_refused_as_a_patch_and_a_head_is_now_the_key_head_that_it_reads():
    metric = metric_of(GROUPED)
    grid = ablate(GROUPED, PROMPTS, metric, site="k", value="zero")
    asked = ["L1G1.k", "L0H1.k", "L0H1", (1, 3), ("z", 0), "L0G1.k@-1", Patch(1, head=0)]
    found = ablate(GROUPED, PROMPTS, metric, site="k", value="zero", patches=asked)
    assert found.names == ["L1G1.k", "L0G0.k", "L0G1.k", "L0G1.k@-1", "L1G0.k"]
    torch.testing.assert_close(found.per_prompt[:, 1], grid.per_prompt[:, 0, 0])
    assert not torch.equal(grid.per_prompt[:, 0, 0], grid.per_prompt[:, 0, 1])
    queries = ablate(GROUPED, PROMPTS, metric, site="q", value="zero", patches=["L0H3"])
    assert queries.names == ["L0H3.q"]


@pytest.mark.parametrize(
    ("site", "asked", "says"),
    [
        ("z", "MLP0", 'MLP0 was asked for as a patch of z, which has layers such as "L0", heads such as "L0H0"'),
        ("k", "L0H1.v", 'L0H1.v was asked for as a patch of k, which has .*heads such as "L0G0.k"'),
        ("resid_pre", "L0H1", 'L0H1 was asked for as a patch of resid_pre, which has layers such as "L0"'),
        ("post", "embed", 'embed was asked for as a patch of post, which has .*neurons such as "L0N0"'),
        ("mlp_out", "L0N3", 'L0N3 was asked for as a patch of mlp_out, which has layers such as "MLP0"'),
        ("z", "l0h0", "no patch of z is called 'l0h0'; closest: L0H0"),
        ("v", Patch(0, head=2), "head 2 of v asked for; there are key/value heads 0 to 1"),
    ],
)
def test_what_is_no_component_of_the_site_is_refused_with_what_is(site, asked, says):
    with pytest.raises(InputError, match=says):
        ablate(GROUPED, PROMPTS, metric_of(GROUPED), site=site, value="zero", patches=[asked])


def test_an_mlp_is_ablated_by_its_name_and_has_it_in_the_table():
    model, metric = tiny_model(), metric_of(tiny_model())
    whole = ablate(model, PROMPTS, metric, site="mlp_out", by="layer", value="zero")
    assert whole.names == ["MLP0", "MLP1"]
    one = ablate(model, PROMPTS, metric, site="mlp_out", value="zero", patches=["MLP1"])
    assert one.names == ["MLP1"]
    torch.testing.assert_close(one.per_prompt[:, 0], whole.per_prompt[:, 1])


def test_names():
    model = tiny_model()
    some = ablate(model, PROMPTS, metric_of(model), value="zero", **UNITS["some"])
    assert some.labels == {"patch": ["L1H0", "L0H1@2"]} and some.name_of((1,)) == "L0H1@2"
    whole = ablate(model, PROMPTS, metric_of(model), value="zero")
    torch.testing.assert_close(some.per_prompt[:, 0], whole.per_prompt[:, 1, 0])


def test_one_prompt_has_no_interval():
    model = tiny_model()
    sweep = ablate(model, PROMPTS[:1], hl.logit_diff(model, answer=3, wrong_answer=4), value="zero")
    assert bool(sweep.interval()[0].isnan().all()) and bool((sweep.p == 1).all())
    assert list(sweep.table().columns) == ["z", "metric", "effect (zero)"]


# -- statistics


def test_p_and_q_are_over_groups_and_the_whole_family():
    model = tiny_model()
    group = torch.tensor([0, 0, 1, 2])
    sweep = ablate(model, PROMPTS, metric_of(model), value="zero", group=group)
    assert torch.equal(sweep.p, sign_flip_p(sweep.effect_per_prompt, group=group)) and sweep.least_q == 1
    assert torch.equal(sweep.q, q_values(sweep.p)) and bool((sweep.q >= sweep.p).all())
    alone = ablate(model, PROMPTS, metric_of(model), value="zero")
    assert float(alone.p.min()) >= 2 / 2**4 and float(sweep.p.min()) >= 2 / 2**3


def test_the_top_is_chosen_on_one_half_and_measured_on_the_other(tmp_path):
    model = tiny_model(n_heads=4)
    tokens = torch.randint(11, (16, 5), generator=torch.Generator().manual_seed(0))
    sweep = ablate(model, tokens, hl.log_prob(model, answer=3), value="zero", group=torch.arange(16) // 2)
    top = sweep.held_out_top(3)
    assert not set(top.chosen_on.tolist()) & set(top.reported_on.tolist())
    assert {i // 2 for i in top.chosen_on.tolist()}.isdisjoint(i // 2 for i in top.reported_on.tolist())
    chosen = sweep.effect_per_prompt[top.chosen_on].mean(0)
    best = chosen.flatten().abs().argsort(descending=True)[:3]
    assert top.names == [f"L{int(i) // 4}H{int(i) % 4}" for i in best]
    torch.testing.assert_close(top.chosen_by, chosen.flatten()[best])
    reported = sweep.effect_per_prompt[top.reported_on].flatten(1)[:, best]
    torch.testing.assert_close(top.mean, reported.mean(0)[None])
    assert bool((top.low <= top.mean).all() and (top.mean <= top.high).all())
    top.save(tmp_path / "top.safetensors")
    assert str(HeldOutEffects.load(tmp_path / "top.safetensors").table()) == str(top.table())
    assert len(top.table(2)) == 2 and len(top.figure().data)


def test_the_largest_of_many_null_effects_shrinks_on_the_other_half():
    """Effects that are noise: what was chosen is large where it was chosen, and not elsewhere."""
    noise = torch.randn(40, 500, generator=torch.Generator().manual_seed(1))
    sweep = made(noise)
    top = sweep.held_out_top(10)
    assert float(top.chosen_by.abs().mean()) > 3 * float(top.mean.abs().mean()) and bool((top.q > 0.05).all())
    assert bool((sweep.q > 0.05).all())  # 500 tests of nothing


def test_a_real_effect_among_noise_is_found_and_stays():
    noise = torch.randn(40, 500, generator=torch.Generator().manual_seed(1))
    noise[:, 17] -= 2.0
    sweep = made(noise)
    top = sweep.held_out_top(1)
    assert top.names == ["L17"] and float(top.q[0, 0]) < 0.01 and float(top.high[0, 0]) < 0
    assert [i for i, q in enumerate(sweep.q.tolist()) if q < 0.05] == [17]
    assert float(sweep.q[17]) == pytest.approx(sweep.least_q, rel=1e-6)  # its p is that of no flip in 20,000


def made(effects) -> AblationSweep:
    """A sweep by layer with these effects."""
    n, cells = effects.shape
    labels = {"layer": [f"L{i}" for i in range(cells)]}
    rest = (torch.arange(n), "mlp_out", ("layer",), "zero", labels)
    account = {"computed": 1.0, "largest_error": 0.0, "n_verified": 1, "how": "engine"}
    return AblationSweep(effects, torch.zeros(n), effects.mean(0)[None], *rest, **account)


# -- side by side


def test_a_comparison_holds_the_three_sweeps(tmp_path):
    model = tiny_model()
    found = compare_ablations(model, PROMPTS, metric_of(model))
    for kind, sweep in found.sweeps.items():
        assert torch.equal(sweep.per_prompt, ablate(model, PROMPTS, metric_of(model), value=kind).per_prompt)
        assert sweep.replacement == kind
    assert -1 <= found.correlation <= 1 and len(found.figure().data) == 1
    assert len(found.table(3)) == 3 and found.top(1).rows[0][0] == found.zero.top(1).rows[0][0]
    top = found.held_out_top(2)
    assert top.mean.shape == (3, 2) and top.kinds == ["zero", "mean of others", "resample"]
    assert [row[1] for row in top.table().rows] == ["zero", "mean of others", "resample"] * 2
    found.save(tmp_path / "comparison.safetensors")
    assert str(AblationComparison.load(tmp_path / "comparison.safetensors").table()) == str(found.table())


def test_a_head_that_writes_a_constant_matters_only_when_zeroed():
    """Its value is a bias: the rest of the model counts on it, and no prompt differs in it."""
    model = tiny_model(attn_only=True, dtype=torch.float64)
    with torch.no_grad():
        model.W_V[0, 1] = 0.0
        model.b_V[0, 1] = 2.0
    found = compare_ablations(model, PROMPTS, metric_of(model))
    assert float(found.zero.effect[0, 1].abs()) > 0.1
    for sweep in (found.mean, found.resample):
        torch.testing.assert_close(sweep.per_prompt[:, 0, 1], sweep.base_per_prompt, atol=1e-12, rtol=1e-12)


# -- known answers


def test_or_gate():
    """Either head alone carries the gate: no single ablation shows that they matter, taking both away does."""
    gate = or_gate()

    def says(logits):
        return logits[:, -1, 1]

    assert ablate(gate, [[0]], says, value="zero").effect.tolist() == [[0.0, 0.0]]
    assert ablate(gate, [[0]], says, site="attn_out", by="layer", value="zero").effect.tolist() == [-1.0]


def test_induction_heads():
    """Both heads carry the copy; the other two write nothing, in every kind."""
    model = induction_model()
    prompts = torch.tensor([[3, 1, 4, 3], [5, 2, 6, 5], [7, 9, 8, 7]])
    metric = hl.log_prob(model, answer=[1, 2, 9])
    for value in ("zero", "mean", "mean of others", "resample"):
        effect = ablate(model, prompts, metric, value=value).effect
        assert float(effect[1, 1]) < -1 and effect[0, 1] == effect[1, 0] == 0
    with torch.no_grad():  # without the previous-token head the induction head sees only where it does not belong
        assert float(ablate(model, prompts, metric, value="zero").effect[0, 0]) < -1


def test_ablating_with_the_same_run_changes_nothing():
    model = tiny_model()
    sweep = ablate(model, PROMPTS, metric_of(model), value=OtherRun(PROMPTS))
    assert torch.equal(sweep.effect_per_prompt, torch.zeros(4, 2, 2)) and bool((sweep.p == 1).all())


# -- what is refused


REFUSED = {
    "a kind that does not exist": ({"value": "zeros"}, NameNotFound, "closest: zero"),
    "no draws": ({"value": Resample(draws=0)}, InputError, "draws is a whole number of at least 1"),
    "a reference of another length": ({"value": Resample([[1, 2]])}, InputError, "another prompt of 4 tokens"),
    "a run of another length": ({"value": OtherRun([[1, 2]] * 4)}, InputError, "position by position"),
    "too few runs": ({"value": OtherRun(PROMPTS[:2])}, InputError, "got 2 for 4"),
    "labels for other prompts": ({"group": [0, 1]}, InputError, "one value per pair, got 2 for 4"),
    "a site without heads": ({"site": "mlp_out", "by": "layer x head"}, InputError, "layer x pos"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_ablated_is_refused_in_words(case):
    asked, error, words = REFUSED[case]
    model = tiny_model()
    with pytest.raises(error, match=words):
        ablate(model, PROMPTS, metric_of(model), **asked)


def test_a_run_of_a_pair_is_refused_where_prompts_have_no_pairs():
    model = tiny_model()
    for value in ("clean", "corrupted"):
        with pytest.raises(InputError, match="these prompts have no pairs"):
            ablate(model, PROMPTS, metric_of(model), value=value)


def test_one_prompt_cannot_be_resampled_or_averaged_over():
    model = tiny_model()
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    refused = {"resample": "another prompt of 4 tokens", "mean": "there is one prompt", "mean of others": "one prompt"}
    for value, words in refused.items():
        with pytest.raises(InputError, match=words):
            ablate(model, PROMPTS[:1], metric, value=value)
    with pytest.raises(InputError, match="k must be between 1 and the number of components, 4"):
        ablate(model, PROMPTS, metric, value="zero").held_out_top(5)

"""Results make their own claims: with their control beside them, and no more than their own tests allow."""

from dataclasses import replace

import pytest
import torch

import hooklens as hl
import hooklens.plugins.probing.probe_use
import hooklens.plugins.steering.coefficients
from hooklens.core.errors import InputError
from hooklens.plugins.heads import classify_heads
from hooklens.plugins.patching import ablate
from hooklens.results.claims import Measured, Registration, claim
from hooklens.studies import causal_claims, steering_claims, taxonomy_claims, taxonomy_report
from hooklens.studies import circuit_study as circuit_study
from hooklens.testing import induction_model, tiny_model


def test_a_taxonomy_claims_the_heads_it_labels_and_no_other():
    model = induction_model()
    with torch.no_grad():
        model.blocks[1].attn.W_Q[1].mul_(0.002)  # so that other keys hold as much as its target, for the placebo
    found = classify_heads(model, ioi=0)
    claims = taxonomy_claims(found, model)
    assert {one.statement for one in claims.claims} == {"L0H0 is a previous token head", "L1H1 is an induction head"}
    assert {one.statement for one in claims.claims if one.causal} == {"L1H1 is an induction head"}
    assert {one.intervention.metric for one in claims.claims} == {"minus_repeat_loss"}
    assert "Claims" in taxonomy_report(found).to_html()


def test_a_taxonomy_without_scores_claims_nothing():
    found = classify_heads(induction_model(), ioi=0)
    assert taxonomy_claims(replace(found, effect=torch.full_like(found.effect, torch.nan))) is None


def test_a_registered_ablation_is_tested_on_the_half_that_did_not_choose(tmp_path):
    model = tiny_model(n_heads=4)
    tokens = torch.randint(11, (24, 5), generator=torch.Generator().manual_seed(0))
    metric = hl.log_prob(model, answer=3)
    found = ablate(model, tokens, metric, value="zero").held_out_top(2)
    control = "effect of zero ablation, mean of the rest"
    words = f"{found.names[0]} matters (zero ablation)"
    plan = Registration(words, "log_prob", control, 0.0, 12, side="below").write(tmp_path / "plan.json")
    claims = found.claims(model, metric, registered=[plan])
    assert claims.claims[0].departures == [] and claims.claims[0].registered is plan
    assert claims.claims[1].status == "exploratory" and len(claims.claims[0].intervention.per_prompt) == 12


def test_the_edge_of_a_null_is_reached_by_few_of_its_draws():
    draws = torch.randn(400, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for side in (1.0, -1.0):
        shifted = draws + side  # the further edge is that of this side
        edge = Measured.edge_of("random", shifted)
        assert int((side * shifted.mean(1) > side * edge.mean).sum()) == 9  # of 400; 2.5 % of 401 is 10.02
    assert abs(Measured.edge_of("random", draws[:5]).mean) == float(draws[:5].mean(1).abs().max())
    with pytest.raises(InputError, match="one row per draw"):
        Measured.edge_of("random", torch.zeros(3))


def test_random_draws_that_move_the_metric_further_to_the_other_side_are_the_control():
    """The edge used to be taken on the side of the effect: draws of -3 to 0.1 left 0.1 as the control of 0.3."""
    effect = Measured.of("effect", [0.3, 0.31, 0.29, 0.32, 0.28, 0.3])
    draws = torch.linspace(-3, 0.1, 100, dtype=torch.float64)[:, None].expand(-1, 6)
    edge = Measured.edge_of("random", draws)
    assert edge.mean < -2.9
    assert not claim("a model", "it matters", observation=effect, intervention=effect, control=edge).causal


def steered(effect, *, n=12, draws=50):
    """A sweep over three coefficients whose effect is this large beside random directions of unit effects."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(3, n, generator=generator)
    random = torch.randn(draws, 3, 1, generator=generator) + 0.1 * torch.randn(draws, 3, n, generator=generator)
    coefficients = torch.tensor([-1.0, 0.0, 2.0])
    found = hooklens.plugins.steering.coefficients.demo(tiny_model())
    return replace(
        found,
        coefficients=coefficients,
        metric=coefficients[:, None] * effect + noise,
        base_per_prompt=torch.zeros(n),
        random_metric=coefficients[:, None] * random,
        group=torch.arange(n),
        continuation_loss=torch.zeros(3, n),
        base_continuation_loss=torch.zeros(n),
        random_continuation_loss=torch.zeros(1, 3, n),
        random_neutral_loss=torch.zeros(draws, 3, found.neutral_loss.shape[1]),
        repeats=torch.zeros(3, n),
        base_repeats=torch.zeros(n),
    )


def test_steering_is_causal_where_it_moves_further_than_random_directions_do():
    for effect, verdict in ((5.0, "causal"), (1.0, "no causal effect shown")):
        claims = steering_claims(steered(effect), "a model", "logit_diff")
        assert [one.statement.split()[0] for one in claims.claims] == ["-1", "2"]  # 0 adds nothing and is no claim
        assert [one.verdict for one in claims.claims] == [verdict] * 2
    assert [one.side for one in claims.claims] == [-1.0, 1.0]


def test_a_causal_check_claims_what_it_finds_used():
    check = hooklens.plugins.probing.probe_use.demo(tiny_model())
    idle = causal_claims(check, "a model", "logit")
    assert [one.statement[-7:] for one in idle.claims] == ["ablate)", "(steer)"]
    assert not any(one.causal for one in idle.claims) and not check.used
    further = replace(check, fall=check.random_fall.abs().amax() * 3 + check.fall)
    strong = causal_claims(further, "a model", "logit")
    assert all(one.causal for one in strong.claims)
    assert all("random directions" in one.control.what for one in strong.claims)


def test_a_circuit_study_claims_no_more_than_its_pairs_allow():
    study = circuit_study.demo(tiny_model())
    assert "2 groups of prompts cannot give p < 0.5; at least 6 are needed" in study.claim().lacks
    assert "Claims" in study.report().to_html()
    n, generator = 12, torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(102, n, generator=generator)
    parts = {"empty_per_pair": torch.zeros(n), "base_per_pair": 3 + noise[0], "group": torch.arange(n)}
    for kept, verdict in ((2.5, "causal"), (0.4, "no causal effect shown")):
        random = noise[2:] + torch.linspace(0, 1, 100)[:, None]
        faithful = replace(study.faithfulness, per_pair=kept + noise[1], random_per_pair=random, **parts)
        assert replace(study, faithfulness=faithful).claim().verdict == verdict

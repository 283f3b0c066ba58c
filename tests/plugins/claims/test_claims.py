"""Claims say no more than their evidence; registrations cannot be fitted to results; chosen effects shrink."""

import json

import pytest
import torch

from hooklens.core.errors import FileRefused, InputError
from hooklens.plugins.claims.claim import Measured, claim, family
from hooklens.plugins.claims.held_out import held_out_top
from hooklens.plugins.claims.registration import Registration
from hooklens.testing import tiny_model
from hooklens.viz.report import Report

STRONG = [2.0, 1.5, 1.8, 2.2, 1.9, 2.1]
NOTHING = [0.1, -0.1, 0.05, 0.0, -0.05, 0.0]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def measured(values, what="effect", group=None):
    return Measured.of(what, values, group)


def made(model, *, effect=STRONG, control=NOTHING, group=None, registered=None, statement="it matters"):
    return claim(
        model,
        statement,
        observation=measured([0.9] * 6, "seen", group),
        intervention=None if effect is None else measured(effect, "effect", group),
        control=None if control is None else measured(control, "control", group),
        registered=registered,
    )


def test_a_full_set_of_evidence_is_causal(model):
    assert made(model).verdict == "causal" and made(model).require_causal().lacks == []


@pytest.mark.parametrize(
    ("evidence", "lack"),
    [
        ({"effect": None, "control": None}, "an observation alone is a correlation"),
        ({"control": None}, "no control beside it"),
        ({"effect": NOTHING}, "does not lie above 0"),
        ({"control": STRONG}, "does not exceed the control's"),
        ({"group": [0] * 6}, "no interval"),
    ],
)
def test_it_is_not_called_causal_without(model, evidence, lack):
    found = made(model, **evidence)
    assert not found.causal and lack in "; ".join(found.lacks) and "Lacking" in found.sentence()
    with pytest.raises(InputError, match="cannot be called causal"):
        found.require_causal()


def test_effects_below_zero_count_where_they_came_out_or_were_registered(model):
    down = [-x for x in STRONG]
    assert made(model, effect=down).causal
    asked = {"hypothesis": "it matters", "metric": "loss", "control": "control", "threshold": 0.5, "n": 6}
    assert made(model, effect=down, registered=Registration(**asked, side="below")).causal
    assert not made(model, effect=down, registered=Registration(**asked, side="above")).causal


def test_a_registered_claim_is_held_to_what_was_written(model):
    asked = {"hypothesis": "it matters", "metric": "loss", "control": "control", "threshold": 0.5, "n": 6}
    assert made(model).status == "exploratory"
    assert made(model, registered=Registration(**asked)).status.startswith("registered ")
    assert made(model, registered=Registration(**asked)).causal
    for change, told in [
        ({"threshold": 3.0}, "does not lie above 3"),
        ({"n": 64}, "registered n 64, but this is 6"),
        ({"hypothesis": "another"}, "registered hypothesis 'another'"),
        ({"control": "random heads"}, "registered control 'random heads', but this is 'control'"),
    ]:
        found = made(model, registered=Registration(**asked | change))
        assert not found.causal and told in "; ".join(found.lacks)


def test_a_registration_is_written_once_and_any_change_is_seen(tmp_path):
    plan = Registration("it matters", "loss", "control", 0.5, 6)
    path = plan.write(tmp_path / "plan.json")
    assert Registration.read(path).digest == plan.digest
    with pytest.raises(InputError, match="written once"):
        plan.write(path)
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"threshold": 0.1}))
    with pytest.raises(FileRefused, match="changed after it was registered"):
        Registration.read(path)
    path.write_text("{}")
    with pytest.raises(FileRefused, match="not a registration"):
        Registration.read(path)
    digests = {Registration("it matters", "loss", "control", 0.5, n).digest for n in range(2, 20)}
    assert len(digests) == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hypothesis": " "}, "names its hypothesis"), ({"threshold": -1.0}, "at least 0"), ({"n": 1}, "at least 2"),
     ({"side": "up"}, "'above' or 'below'")],
)  # fmt: skip
def test_a_registration_that_could_not_fail_is_refused(change, message):
    asked = {"hypothesis": "h", "metric": "m", "control": "c", "threshold": 0.5, "n": 6}
    with pytest.raises(InputError, match=message):
        Registration(**asked | change)


def test_bad_evidence_is_refused(model):
    with pytest.raises(InputError, match=r"one number a prompt, got shape \[2, 1\]"):
        Measured.of("x", [[1.0], [2.0]])
    with pytest.raises(InputError, match="not finite for 1 of 2"):
        Measured.of("x", [1.0, float("nan")])
    with pytest.raises(TypeError, match="Measured"):
        claim(model, "s", observation=[1.0])
    with pytest.raises(InputError, match="without the intervention"):
        made(model, effect=None)
    with pytest.raises(InputError, match="same prompts"):
        measured([1.0, 2.0]).beyond(measured([1.0]))


def test_q_values_count_the_whole_family(model):
    alone = family(model, [made(model)])
    many = family(model, [made(model), *(made(model, effect=NOTHING) for _ in range(9))])
    assert float(alone.q[0]) == pytest.approx(2 / 64)
    assert float(many.q[0]) == pytest.approx(min(10 * 2 / 64, 1.0))
    assert many.top(1).rows[0][2] == "causal"
    seen_only = made(model, effect=None, control=None)
    assert bool(family(model, [seen_only]).q.isnan().all()) and family(model, [seen_only]).table().rows[0][-1] is None
    with pytest.raises(InputError, match="at least one claim"):
        family(model, [])


def test_reports_mark_what_was_not_registered_and_escape_it(model):
    page = Report("claims").claims(family(model, [made(model, statement="<b>bold</b>")])).to_html()
    assert "exploratory" in page and "<b>bold</b>" not in page and "&lt;b&gt;bold" in page


def test_effects_chosen_from_noise_shrink_and_real_ones_stay(model):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(60, 300, generator=generator)
    names = [f"c{i}" for i in range(300)]
    assert held_out_top(model, noise, names, k=10).shrinkage < 0.6
    real = noise.clone()
    real[:, 7] += 3.0
    found = held_out_top(model, real, names, k=3)
    assert found.names[0] == "c7" and 2.4 < float(found.mean[0]) < 3.6 and float(found.q[0]) < 0.01
    assert not set(found.chosen_on.tolist()) & set(found.reported_on.tolist())


def test_prompts_of_one_group_go_to_one_half(model):
    group = torch.arange(10).repeat_interleave(4)
    found = held_out_top(
        model, torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), list("abcde"), k=2, group=group
    )
    assert not set(group[found.chosen_on].tolist()) & set(group[found.reported_on].tolist())
    for k, names in ((0, "abcde"), (6, "abcde"), (2, "abcd")):
        with pytest.raises(InputError):
            held_out_top(model, torch.zeros(4, 5), list(names), k=k)

"""Coefficient sweeps: every number against a plain run, known answers, controls of the right length, refusals."""

import pytest
import torch
from model.zoo import zoo_model

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.plugins.steering.coefficients import SweepSettings, sweep_coefficients
from hooklens.plugins.steering.steering_edit import steer
from hooklens.plugins.steering.variants import continuation_loss, repeated, unit_controls
from hooklens.testing import tiny_model

PROMPTS = [[1, 5, 2], [4, 9, 10], [3, 3, 7, 8], [6]]
FEW = SweepSettings(controls=3, written=2, new_tokens=4, seed=5)


def direction(seed=0):
    return torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swept(name="gpt2", coefficients=(-2.0, 0.0, 1.5), site=("resid_post", 0), settings=FEW, **more):
    model = zoo_model(name, dtype=torch.float64)
    metric = hl.logit_diff(model, answer=[1, 2, 3, 4], wrong_answer=5)
    return (
        model,
        metric,
        sweep_coefficients(model, PROMPTS, direction(), coefficients, metric, site=site, settings=settings, **more),
    )


def nats(model, row, start):
    return float(-model([row]).detach()[0].log_softmax(-1)[range(start - 1, len(row) - 1), row[start:]].mean())


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        *((name, "all") for name in ("gpt2", "gemma2", "neox", "post")),
        *((n, slice(-1, None)) for n in ("gpt2", "llama")),
    ],
    ids=str,
)
def test_every_number_is_that_of_a_plain_steered_run(name, positions):
    from dataclasses import replace

    neutral = [[1, 2, 3, 4, 5], [9, 8, 7]]
    site = ("resid_mid", 1) if name in ("gpt2", "gemma2") else ("resid_pre", 1)
    model, metric, found = swept(name, site=site, settings=replace(FEW, positions=positions), neutral=neutral)
    controls = unit_controls(3, direction(), 5) * direction().norm()
    everything = [(found.metric, found.neutral_loss, direction())]
    everything += [(found.random_metric[k], found.random_neutral_loss[k], controls[k]) for k in range(3)]
    for measured, paid, vector in everything:
        for c, amount in enumerate(found.coefficients):
            for i, prompt in enumerate(PROMPTS):
                with steer(model, vector, float(amount), site=site, positions=positions):
                    expected = metric.pairs(torch.tensor([i]))(model([prompt]))
                torch.testing.assert_close(measured[c, i], expected[0].detach(), atol=1e-9, rtol=1e-9)
            with steer(model, vector, float(amount), site=site):
                expected = [nats(model, text, 1) for text in neutral]
            assert paid[c].tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(found.metric[1], found.base_per_prompt) and found.effect[1] == 0


def test_what_is_written_is_judged_by_the_unsteered_model():
    model, _, found = swept()
    amounts = [0.0, -2.0, 1.5]
    controls = unit_controls(3, direction(), 5) * direction().norm()
    vectors = torch.stack([direction(), *controls[:2]])
    rows = [torch.zeros(8), *(a * v for v in vectors for a in amounts[1:])]
    own = torch.stack(rows).double().repeat_interleave(len(PROMPTS), 0)
    with model.hooks(fwd_hooks=[(("resid_post", 0), lambda act, hook: act + own[:, None])]):
        out = model.generate(PROMPTS * len(rows), 4, temperature=1.0, seed=5)
    losses = [
        nats(model, row.tolist(), len(row) - len(new)) for row, new in zip(out.tokens, out.new_tokens, strict=True)
    ]
    losses = torch.tensor(losses, dtype=torch.float64).view(len(rows), -1)
    torch.testing.assert_close(found.base_continuation_loss, losses[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.continuation_loss, losses[[1, 0, 2]], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.random_continuation_loss[1], losses[[5, 0, 6]], atol=1e-9, rtol=1e-9)
    assert found.texts[2][3] == " ".join(map(str, out.new_tokens[2 * 4 + 3].tolist()))
    assert found.texts[1] == found.base_texts and found.prompts[0] == "1 5 2"
    # without neutral text, what the steered model pays for the unsteered one's continuations
    with steer(model, direction(), 1.5, site=("resid_post", 0)):
        paid = [nats(model, out.tokens[i].tolist(), len(PROMPTS[i])) for i in range(4)]
    assert found.neutral_loss[2].tolist() == pytest.approx(paid, abs=1e-9)
    torch.testing.assert_close(found.base_neutral_loss, found.base_continuation_loss, atol=1e-9, rtol=1e-9)


def test_where_nothing_stands_between_the_effect_is_the_coefficient_times_the_dot_product():
    """No final norm, the last layer, a logit difference: steering is linear, and the slope is known."""
    model = zoo_model("no_norm", dtype=torch.float64)
    read = (model.W_U[:, 3] - model.W_U[:, 4]).detach()
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    amounts = [-3.0, -1.0, 0.0, 0.5, 2.0]
    found = sweep_coefficients(model, PROMPTS, read, amounts, metric, site=("resid_post", 1), settings=FEW)
    expected = torch.tensor(amounts, dtype=torch.float64) * read.square().sum()
    torch.testing.assert_close(found.effect, expected, atol=1e-9, rtol=1e-9)
    for end in found.interval():
        torch.testing.assert_close(end, expected, atol=1e-9, rtol=1e-9)
    controls = unit_controls(3, direction(), 5) * read.norm()
    torch.testing.assert_close(
        found.random_effect, (controls @ read)[:, None] * found.coefficients, atol=1e-9, rtol=1e-9
    )
    assert (found.random_effect.abs() <= found.effect.abs() + 1e-9).all()  # no vector of that length moves it further
    assert found.p.tolist() == pytest.approx([1 / 4, 1 / 4, 1, 1 / 4, 1 / 4])


def test_controls_have_the_directions_length_and_may_be_given():
    given = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    wide = unit_controls(given, direction(), 0)
    torch.testing.assert_close(wide.norm(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(torch.cosine_similarity(wide, given.double()), torch.ones(5, dtype=torch.float64))
    _, _, found = swept(settings=SweepSettings(controls=direction()[None] * 7, written=1, new_tokens=2))
    torch.testing.assert_close(found.random_metric[0], found.metric, atol=1e-9, rtol=1e-9)


def test_a_metric_of_any_kind_is_read():
    model = zoo_model("gpt2", dtype=torch.float64)
    metric = lambda logits: logits[:, -1].softmax(-1)[:, 3]  # noqa: E731
    found = sweep_coefficients(
        model, [[1, 2], [3, 4]], direction(), [1.0], metric, site=("mlp_out", 1), settings=SweepSettings(2, 1, 3)
    )
    with steer(model, direction(), 1.0, site=("mlp_out", 1)):
        torch.testing.assert_close(found.metric[0], metric(model([[1, 2], [3, 4]])).detach(), atol=1e-9, rtol=1e-9)


def test_repeats_and_losses_of_short_texts():
    assert repeated(torch.tensor([4])) == 0 and repeated(torch.tensor([4, 4, 4, 4])) == pytest.approx(2 / 3)
    model = tiny_model(dtype=torch.float64)
    out = model.generate([[1, 2, 3], [4]], 5, stop=[int(model.generate([4], 2, stop=()).new_tokens[0][1])])
    assert len({len(new) for new in out.new_tokens}) == 2 or out.stopped == [True, True]
    expected = [
        nats(model, row.tolist(), len(row) - len(new)) for row, new in zip(out.tokens, out.new_tokens, strict=True)
    ]
    with torch.no_grad():
        assert continuation_loss(model, out).tolist() == pytest.approx(expected, abs=1e-9)


def test_the_table_has_a_row_a_coefficient_and_shows_text():
    _, _, found = swept()
    table = found.table()
    assert [row[0] for row in table.rows] == [-2.0, 0.0, 1.5]
    assert [row[-1] for row in table.rows] == [text[0] for text in found.texts]
    assert len(found.samples(2)) == 4 and found.top(1).rows[0][1] == float(found.effect[found.effect.abs().argmax()])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"coefficients": []}, "a row of at least one number, all finite"),
        ({"coefficients": [float("nan")]}, "a row of at least one number, all finite"),
        ({"site": "embed"}, "points inside blocks"),
        ({"settings": SweepSettings(positions="generated")}, "read on prompts"),
        ({"settings": SweepSettings(controls=0)}, "at least 1"),
        ({"settings": SweepSettings(controls=torch.ones(2, 3))}, "are \\[draw 8\\]"),
        ({"settings": SweepSettings(group=torch.arange(2))}, "one value per pair"),
        ({"neutral": [[1]]}, "at least two tokens"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_a_reason(change, said):
    with pytest.raises(InputError, match=said):
        swept(**change)


@pytest.mark.slow
def test_smollm2_says_more_kind_words_along_a_direction_than_along_random_ones():
    from hooklens.plugins.steering.contrast import find_direction

    model = hl.load("smollm2-135m-instruct")
    things, words = (
        ("film", "food", "hotel", "game"),
        (("wonderful", "superb"), ("dreadful", "awful")),
    )  # not " terrible", which is asked about
    kind, unkind = ([f"The {thing} was {word}, and I would" for thing in things for word in some] for some in words)
    made = find_direction(model, kind, unkind, group=torch.arange(4).repeat_interleave(2), draws=49)
    assert made.separation[20] > 0.95
    found = sweep_coefficients(
        model,
        ["The cake was", "The show was", "Overall it was"],
        made.at(20),
        [-1.0, 1.0],
        hl.logit_diff(model, answer=" great", wrong_answer=" terrible"),
        site=("resid_post", 20),
        neutral=["Water boils at one hundred degrees at sea level."],
        settings=SweepSettings(controls=8, written=1, new_tokens=4),
    )
    assert found.effect[0] < found.random_effect[:, 0].min() and found.effect[1] > found.random_effect[:, 1].max()


@pytest.mark.parametrize(
    ("name", "site", "shape"),
    [("gpt2", "resid_post", (2, 8)), ("llama", ("z", 1), None), ("gpt2", "z", (2, 2, 4)), ("llama", "v", None)],
)
def test_directions_a_layer_and_at_heads_are_swept_as_plain_steered_runs(name, site, shape):
    model = zoo_model(name, dtype=torch.float64)
    heads = model.cfg.n_key_value_heads if site == "v" else model.cfg.n_heads
    shape = shape or (heads, model.cfg.d_head)
    v = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v[..., 0, :] = 0  # the controls leave alone what the direction leaves alone
    metric = hl.logit_diff(model, answer=[1, 2, 3, 4], wrong_answer=5)
    found = sweep_coefficients(model, PROMPTS, v, [-2.0, 1.5], metric, site=site, settings=FEW)
    controls = unit_controls(3, v, 5) * v.norm(dim=-1, keepdim=True)
    assert not controls[..., 0, :].any() and controls[..., 1, :].any()
    for measured, vector in ((found.metric, v), (found.random_metric[1], controls[1])):
        for c, amount in enumerate((-2.0, 1.5)):
            for i, prompt in enumerate(PROMPTS):
                with steer(model, vector, amount, site=site):
                    expected = metric.pairs(torch.tensor([i]))(model([prompt]))
                torch.testing.assert_close(measured[c, i], expected[0].detach(), atol=1e-9, rtol=1e-9)


def test_controls_of_a_direction_a_layer_have_its_length_at_every_layer():
    v = direction()[:6].view(2, 3) * torch.tensor([[1.0], [50.0]])
    for controls in (4, torch.ones(4, 2, 3)):
        found = unit_controls(controls, v, 0) * v.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(found.norm(dim=-1), v.norm(dim=-1).expand(4, 2))


def test_coefficient_0_does_not_enlarge_the_family():
    _, _, with_0 = swept(coefficients=(-2.0, 0.0, 0.0, 1.5))
    _, _, without = swept(coefficients=(-2.0, 1.5))
    assert with_0.q[[0, 3]].tolist() == pytest.approx(without.q.tolist())
    assert with_0.q[[1, 2]].tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_a_direction_that_means_nothing_is_rarely_beyond_random_ones():
    model, metric = tiny_model(), lambda logits: logits[:, -1, 3]
    small = 0
    for seed in range(80):
        settings = SweepSettings(controls=19, written=1, new_tokens=1, seed=1000 + seed)
        found = sweep_coefficients(
            model, [[1, 2], [3, 4]], direction(seed=seed), [1.0], metric, site=("resid_post", 0), settings=settings
        )
        small += int(found.p[0] <= 0.05)
    assert small <= 8  # 4 are expected

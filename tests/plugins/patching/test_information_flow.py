"""Which path carries how much: in models where it is known, and against the sweeps that it is made of."""

from dataclasses import replace

import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError, InputError
from hooklens.plugins.patching.flow import Choice, InformationFlow
from hooklens.plugins.patching.information_flow import trace_information
from hooklens.plugins.patching.path import path_patch
from hooklens.results.statistics import halves
from hooklens.sweeps.nodes import At
from hooklens.testing import induction_model, tiny_model

N = 8
FIRST = torch.tensor([[a, 1 + a % 2, 4, 9, a] for a in (3, 5, 6, 7, 8, 10, 3, 5)])
CLEAN, CORRUPTED = FIRST, FIRST.clone()
CORRUPTED[:, 0] = 0  # the head that looks back no longer tells what came before the answer
ANSWER, WRONG = CLEAN[:, 1].tolist(), [4] * N


def flow(model, **changes):
    metric = changes.pop("metric", None) or hl.logit_diff(model, answer=ANSWER, wrong_answer=WRONG)
    arguments = {"choice": Choice(per_receiver=2, draws=19)} | changes
    return trace_information(model, CLEAN, CORRUPTED, metric, **arguments)


def test_in_an_induction_model_the_previous_token_head_carries_all_to_the_keys():
    found = flow(induction_model(), receivers=[("k", 1, 1), "final"], senders="heads")
    shares = dict(zip(found.paths, found.share.tolist(), strict=True))
    assert shares["L0H0 to L1H1.k"] == pytest.approx(1, abs=1e-5)
    assert shares["L1H1 to final"] == pytest.approx(1, abs=1e-5)
    assert shares["L0H1 to L1H1.k"] == 0
    p = dict(zip(found.paths, found.p_turned.tolist(), strict=True))
    # turned, L0H0 tells the keys nothing they can use; a sender that changes nothing is reached by every draw
    assert p["L0H0 to L1H1.k"] == p["L1H1 to final"] == pytest.approx(1 / (19 * 4 + 1)) and p["L0H1 to L1H1.k"] == 1
    # 6 senders are too few for a rank to say much, and the result says so: 2 reach the keys, 4 the logits
    assert dict(zip(found.paths, found.p.tolist(), strict=True))["L1H1 to final"] == pytest.approx(2 / 6)
    assert found.least_q == pytest.approx(4 / 6)
    of = dict(zip(found.paths, found.of_receiver.tolist(), strict=True))
    assert of["L0H0 to L1H1.k"] == pytest.approx(1, abs=1e-5)
    assert found.order()[0] in (0, 2) and found.halved and len(found.gap) == N // 2


def test_each_number_is_that_of_the_sweeps_it_is_made_of():
    model = tiny_model(n_layers=3, dtype=torch.float64)
    group = torch.arange(N) // 2
    found = flow(model, receivers=[("q", 2, 0), "MLP1"], choice=Choice(per_receiver=2, draws=19, group=group))
    first, second = halves(N, group=group, seed=0)
    for receiver, name in ((("q", 2, 0), "L2H0.q"), ("MLP1", "MLP1")):
        metric = hl.logit_diff(model, answer=ANSWER, wrong_answer=WRONG)
        sweep = path_patch(model, CLEAN, CORRUPTED, metric, receivers=receiver).grouped(group)
        chosen = sweep.of_pairs(first).order()[:2]
        columns = [i for i, path in enumerate(found.paths) if path.endswith(f"to {name}")]
        assert [found.paths[i] for i in columns] == [f"{sweep.senders[i]} to {name}" for i in chosen]
        torch.testing.assert_close(found.moved[:, columns], sweep.moved[second][:, chosen], atol=1e-9, rtol=1e-9)
    whole = hl.patch(model, CLEAN, CORRUPTED, metric, site="q")
    moved = (whole.per_pair[:, 2, 0] - whole.corrupted_per_pair)[second]
    torch.testing.assert_close(found.total[:, 0], moved, atol=1e-9, rtol=1e-9)
    mlp = hl.patch(model, CLEAN, CORRUPTED, metric, site="mlp_out", by="layer")
    moved = (mlp.per_pair[:, 1] - mlp.corrupted_per_pair)[second]
    torch.testing.assert_close(found.total[:, 2], moved, atol=1e-9, rtol=1e-9)
    assert torch.equal(found.group, group[second])


def test_receivers_of_one_name_are_patched_together():
    model = tiny_model(n_layers=3, dtype=torch.float64)
    found = flow(model, receivers={"queries": [("q", 2)], "rest": "final"})
    metric = hl.logit_diff(model, answer=ANSWER, wrong_answer=WRONG)
    both = path_patch(model, CLEAN, CORRUPTED, metric, receivers=[("q", 2)])
    _, second = halves(N, seed=0)
    sender = both.senders.index(found.paths[0].removesuffix(" to queries"))
    torch.testing.assert_close(found.moved[:, 0], both.moved[second, sender], atol=1e-9, rtol=1e-9)
    assert found.receivers == ["queries"] * 2 + ["rest"] * 2
    torch.testing.assert_close(found.total[:, 2], found.gap, atol=1e-9, rtol=1e-9)


def test_a_plain_function_is_asked_about_all_pairs():
    model = tiny_model(dtype=torch.float64)
    answers = torch.tensor(ANSWER)

    def metric(logits):
        assert len(logits) == N
        return logits[torch.arange(N), -1, answers] - logits[:, -1, 4]

    one, other = flow(model, receivers=("q", 1, 0)), flow(model, receivers=("q", 1, 0), metric=metric)
    torch.testing.assert_close(one.moved, other.moved, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(one.total, other.total, atol=1e-9, rtol=1e-9)
    assert one.paths == other.paths


def test_a_single_pair_is_reported_as_what_it_is():
    model = induction_model()
    metric = hl.logit_diff(model, answer=1, wrong_answer=4)
    one = trace_information(
        model, [[3, 1, 4, 9, 3]], [[0, 1, 4, 9, 3]], metric, receivers="final", senders=[(1, 1)], choice=Choice(draws=3)
    )
    assert not one.halved and bool(one.interval()[0].isnan().all()) and bool(one.typical.isnan().all())
    assert one.share.tolist() == pytest.approx([1.0], abs=1e-5) and one.figure().data[0].type == "bar"


def test_prompts_that_do_not_differ_carry_nothing():
    model = tiny_model()
    metric = hl.logit_diff(model, answer=ANSWER, wrong_answer=WRONG)
    with pytest.raises(InputError, match="the same tokens"):
        trace_information(model, CLEAN, CLEAN, metric, receivers="final", choice=Choice(draws=3))


def test_choosing_on_fewer_pairs_leaves_those_that_report():
    model = tiny_model(dtype=torch.float64)
    few = flow(model, receivers="final", choice=Choice(per_receiver=1, draws=3, choose_on=1))
    _, second = halves(N, seed=0)
    metric = hl.logit_diff(model, answer=ANSWER, wrong_answer=WRONG)
    sweep = path_patch(model, CLEAN, CORRUPTED, metric)
    column = sweep.senders.index(few.paths[0].removesuffix(" to final"))
    torch.testing.assert_close(few.moved[:, 0], sweep.moved[second, column], atol=1e-9, rtol=1e-9)


def planted(n_paths, *, real, seed=0, spread=1.0, n_pairs=8, n_others=120, receivers=1, draws=None):
    """Paths whose effects are drawn as those of turned and other senders are, but for some that act ten times so."""
    generator, options = torch.Generator().manual_seed(seed), Choice()
    draws = draws or options.draws
    moved = torch.randn(n_pairs, n_paths, generator=generator)
    turned = torch.randn(draws, n_pairs, n_paths, generator=generator)
    size = 1 + spread * torch.rand(n_paths, generator=generator)  # paths differ in what a random direction does
    others = torch.randn(n_others, receivers, generator=generator) / n_pairs**0.5
    to = [i * receivers // n_paths for i in range(n_paths)]
    moved[:, :real] += 10.0
    return InformationFlow(
        [f"L0H{i} to R{to[i]}" for i in range(n_paths)],
        [f"R{i}" for i in to],
        torch.ones(n_paths),
        moved * size,
        turned * size,
        others[:, to] * size[:1],
        moved,
        torch.full((n_pairs,), 10.0) + torch.randn(n_pairs, generator=generator),
        torch.arange(n_pairs),
        True,
        options,
        computed=1.0,
        largest_error=0.0,
        n_verified=0,
        how="engine",
    )


@pytest.mark.parametrize(("n_paths", "receivers"), [(4, 1), (12, 3), (20, 5)])
def test_a_single_real_path_among_all_that_are_reported_reaches_q_below_005(n_paths, receivers):
    found = planted(n_paths, real=1, receivers=receivers)
    assert found.least_q < 0.05 and float(found.q[0]) < 0.05
    assert int((found.q < 0.05).sum()) == 1


@pytest.mark.parametrize("real", [0, 3])
def test_p_is_calibrated_where_the_direction_does_not_matter(real):
    """However many paths beside it are real, and though random directions do more at one path than at another."""
    runs = [planted(5, real=real, seed=seed, spread=9.0) for seed in range(300)]
    p = torch.stack([run.p_turned[real:] for run in runs]).flatten()
    for level in (0.05, 0.2, 0.5):
        wide = 4 * (level * (1 - level) / len(p)) ** 0.5
        assert abs(float((p <= level).double().mean()) - level) < wide
    assert all(bool((run.p >= run.p_turned).all()) for run in runs)


def test_the_direction_matters_but_every_sender_does_as_much():
    """Random directions move little along any one read-out; a head then beats them without being special."""
    found = planted(4, real=0)
    small = replace(found, turned=found.turned / 100)
    assert bool((small.p_turned < 0.05).any()) and bool((small.q > 0.05).all())
    special = replace(planted(4, real=1), turned=found.turned / 100)
    assert (special.q < 0.05).tolist() == [True, False, False, False]


def test_a_real_path_of_a_model_with_many_senders_is_found_at_the_defaults():
    """120 heads of layer 0 write noise of one size; one writes the answer's direction where the pairs differ."""
    model, metric = one_talks()
    found = trace_information(model, CLEAN, CORRUPTED, metric, receivers="final", senders=[(0, i) for i in range(120)])
    assert found.paths[0] == "L0H7 to final" and found.least_q < 0.05
    assert (found.q < 0.05).tolist() == [True, False, False, False]


def one_talks():
    model = tiny_model(n_layers=1, n_heads=120, d_model=32, d_head=2, attn_only=True, normalization_type=None)
    with torch.no_grad():
        model.W_Q[0] = 0.0  # attention is uniform, so that each head moves what its values say
        toward = model.W_U[:, 1] - model.W_U[:, 4]
        model.W_V[0, 7] = 0.0
        model.W_V[0, 7, :, 0] = (model.W_E[3:].mean(0) - model.W_E[0]) * 3
        model.W_O[0, 7] = 0.0
        model.W_O[0, 7, 0] = toward * 3
    return model, hl.logit_diff(model, answer=1, wrong_answer=4)


def test_positions_are_those_of_the_pairs_that_report():
    model = tiny_model(n_layers=3, dtype=torch.float64)
    where = torch.tensor([0, 4, 0, 4, 0, 4, 0, 4])
    receivers = {"values": At(("v", 2), where, "first"), "end": At("final", -1)}
    found = flow(model, receivers=receivers, senders=At("heads", where, "S"))
    metric = hl.logit_diff(model, answer=ANSWER, wrong_answer=WRONG)
    _, second = halves(N, seed=0)
    for column, receiver in ((0, receivers["values"]), (2, receivers["end"])):
        sweep = path_patch(model, CLEAN, CORRUPTED, metric, receivers=receiver, senders=At("heads", where, "S"))
        sender = sweep.senders.index(found.paths[column].split(" to ")[0])
        torch.testing.assert_close(found.moved[:, column], sweep.moved[second, sender], atol=1e-9, rtol=1e-9)
    assert found.paths[0].split(" to ")[0].endswith("@S")
    v = model.run_with_cache(CLEAN, "v")[1]["v", 2]

    def write(act, hook):
        rows = torch.arange(N)
        act[rows, where] = v[rows, where]
        return act

    logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(("v", 2), write)])
    expected = metric(logits) - metric(model(CORRUPTED))
    torch.testing.assert_close(found.total[:, 0], expected[second], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.total[:, 2], found.gap, atol=1e-9, rtol=1e-9)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(hl.HooklensError, match="draws is a whole number of at least 1, got 0"):
        Choice(draws=0)
    with pytest.raises(hl.HooklensError, match="got 1 clean and 2 corrupted"):
        trace_information(tiny_model(), [[1, 2]], [[1, 2], [1, 3]], lambda x: x[:, 0, 0], receivers="final")
    with pytest.raises(hl.HooklensError, match=r"no sender reaches L0H0\.q"):
        flow(tiny_model(), receivers=("q", 0, 0))


def test_an_interrupted_study_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    from hooklens.sweeps.resume import Progressed

    model, save, saves = tiny_model(n_layers=3), Progressed.save, []

    def save_and_stop(self, *finished):
        save(self, *finished)
        saves.append(self.path.name)
        if len(saves) == 3:
            raise KeyboardInterrupt

    study = {"receivers": [("q", 2, 0), "MLP1"], "choice": Choice(per_receiver=1, draws=3)}
    monkeypatch.setattr(Progressed, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        flow(model, **study, resume=tmp_path / "study")
    resumed, whole = flow(model, **study, resume=tmp_path / "study"), flow(model, **study)
    assert saves == ["paths-0", "paths-1", "paths-2", "paths-3"]  # what was finished was not run again
    assert torch.equal(resumed.moved, whole.moved) and torch.equal(resumed.turned, whole.turned)
    assert resumed.paths == whole.paths and torch.equal(resumed.gap, whole.gap)


@pytest.mark.parametrize(
    ("given", "says"), [({"receivers": {}}, "receivers= is an empty dict"), ({"choice": 5}, "choice is a Choice")]
)
def test_arguments_that_name_nothing_are_refused(given, says):
    with refused(HooklensError, says):
        trace_information(tiny_model(), [[1, 2]], [[3, 2]], answer_metric, **{"receivers": "final"} | given)


def answer_metric(logits):
    return logits[:, -1, 1]

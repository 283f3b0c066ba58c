"""What an edit along a probe's direction does, against plain hooked runs and where the answer is known."""

import pytest
import torch
from model.zoo import zoo_model

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.data.prompts import Pairs
from hooklens.plugins.probing.edited_runs import moves_along
from hooklens.plugins.probing.gathering import gather
from hooklens.plugins.probing.probe_training import train_probe
from hooklens.plugins.probing.probe_use import CausalCheck, check_probe_use, random_directions
from hooklens.plugins.probing.probes import MassMean, Probe
from hooklens.plugins.probing.task import read_task
from hooklens.sweeps.many_edits import run_edits
from hooklens.testing import tiny_model

VOCAB, D = 40, 12
INERT, ACTIVE = D - 1, D - 2


def two_copies():
    """Odd tokens are marked in two dimensions of the stream: one that nothing later reads, one that the logits read."""
    model = tiny_model(d_vocab=VOCAB, d_model=D, normalization_type=None, dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            for name in ("W_Q", "W_K", "W_V"):
                getattr(block.attn, name)[:, [INERT, ACTIVE]] = 0.0
            block.mlp.W_in[[INERT, ACTIVE]] = 0.0
            block.attn.W_O[:, :, [INERT, ACTIVE]] = 0.0
            block.mlp.W_out[:, [INERT, ACTIVE]] = 0.0
        model.W_E[:, [INERT, ACTIVE]] = 0.0
        model.W_pos[:, [INERT, ACTIVE]] = 0.0
        model.W_E[1::2, INERT] = model.W_E[1::2, ACTIVE] = 3.0
        model.W_U[INERT] = 0.0
        model.W_U[ACTIVE] = 0.0
        model.W_U[ACTIVE, 1], model.W_U[ACTIVE, 0] = 3.0, -1.0
    return model


def along(dim: int, layer: int = 0) -> Probe:
    weight, means = torch.zeros(2, D, dtype=torch.float64), torch.zeros(2, D, dtype=torch.float64)
    weight[1, dim], means[1, dim] = 1.0, 3.0
    bias = torch.tensor([0.0, -1.5], dtype=torch.float64)
    return Probe(weight, bias, means, point=f"blocks.{layer}.hook_resid_post")


def odd(model, n: int = 30, lengths=(3,), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCAB, (lengths[i % len(lengths)],), generator=generator).tolist() for i in range(n)]
    return read_task(model, rows, [row[-1] % 2 for row in rows])


def test_a_probe_that_is_right_about_what_nothing_reads_has_no_effect():
    model = two_copies()
    check = check_probe_use(model, along(INERT), odd(model), hl.logit_diff(model, answer=1, wrong_answer=0), draws=20)
    assert check.accuracy == 1.0
    assert bool((check.fall.abs() < 1e-12).all()) and check.p.tolist() == [1.0, 1.0] and not check.used
    assert bool((check.random.abs().amax(-1) > 1e-3).all())  # random directions do something: the metric can move


def test_what_ablation_of_one_direction_leaves_is_read_by_a_new_probe():
    """The class stands twice in the stream: with one direction gone a new probe reads the other."""
    model, metric = two_copies(), hl.logit_diff(two_copies(), answer=1, wrong_answer=0)
    check = check_probe_use(model, along(ACTIVE), odd(model, 60), metric, draws=1)
    assert check.refit_accuracy[0] == 1.0 and check.refit_accuracy[1] > 0.9
    with torch.no_grad():
        model.W_E[:, INERT] = 0.0
        model.W_E[1:, :ACTIVE] = model.W_E[0, :ACTIVE]
        model.W_pos.zero_()
    alone = check_probe_use(model, along(ACTIVE), odd(model, 60), metric, draws=1)
    assert alone.refit_accuracy[0] == 1.0 and alone.refit_accuracy[1] <= 0.6
    assert "after" in alone.figure().layout.title.text


def test_the_effect_of_what_the_logits_read_is_the_one_that_was_set():
    """Ablating moves a coordinate of 0 or 3 to 1.5, steering by a gap of 3; a unit of it is worth 3 + 1."""
    model = two_copies()
    metric = hl.logit_diff(model, answer=1, wrong_answer=0)
    check = check_probe_use(model, along(ACTIVE), odd(model, 60), metric, draws=40)
    label = check.label
    weight = 60 / (2 * torch.bincount(label).double()[label])
    torch.testing.assert_close(check.fall[0], 6.0 * weight, atol=1e-9, rtol=0)
    torch.testing.assert_close(check.fall[1], 12.0 * weight, atol=1e-9, rtol=0)
    assert check.effect.tolist() == pytest.approx([6.0, 12.0]) and check.used
    doubled = check_probe_use(model, along(ACTIVE), odd(model, 60), metric, draws=1, strength=2.0)
    assert doubled.effect.tolist() == pytest.approx([6.0, 24.0])


KINDS = {
    "plain": ({}, "resid_post"),
    "attention's z": ({}, "z"),
    "grouped rotary keys": (
        {"n_heads": 4, "n_key_value_heads": 2, "positional_embedding_type": "rotary", "normalization_type": "RMS"},
        "k",
    ),
    "rotated keys": ({"positional_embedding_type": "rotary"}, "rot_k"),
    "before the block": ({}, "resid_pre"),
    "the MLP's output": ({}, "mlp_out"),
    "the last layer": ({"n_layers": 1}, "resid_mid"),
}


@pytest.mark.slow
@pytest.mark.parametrize("by_metric", [True, False], ids=["reads", "whole logits"])
@pytest.mark.parametrize("name", KINDS)
def test_edits_are_those_of_a_hooked_run_of_each_prompt(name, by_metric):
    changes, site = KINDS[name]
    model = tiny_model(d_vocab=VOCAB, dtype=torch.float64, **changes)
    task = odd(model, 24, lengths=(3, 5, 4) if by_metric else (4,))
    task = read_task(model, task.tokens, task.label.tolist(), pos=[-1 - i % 2 for i in range(24)])
    layer = 0
    probe, _ = train_probe(model, task, site=(site, layer), kind=MassMean(), null_draws=1)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4) if by_metric else difference
    check = check_probe_use(model, probe, task, metric, draws=3, seed=5)
    x = gather(model, task, site=probe.point).x[0]
    null = random_directions(x, task.label, 3, 5)
    where, sign = probe.direction, 2 * task.label.double() - 1
    amount = [probe.middle - probe.coordinate(x), -sign * probe.gap]
    clean = torch.stack([plain(model, metric, row, probe.point, 0, x[0] * 0) for row in task.tokens])
    weight = sign * 24 / (2 * torch.bincount(task.label).double()[task.label])
    for edit in range(2):
        for found, direction in ((check.fall[edit], where), (None, null[1, 2])):
            moved = [
                plain(model, metric, row, probe.point, int(p), a * direction)
                for row, p, a in zip(task.tokens, task.pos, amount[edit], strict=True)
            ]
            fall = weight * (clean - torch.stack(moved))
            if found is None:
                torch.testing.assert_close(check.random[edit, 1, 2], fall.mean(), atol=1e-9, rtol=0)
            else:
                torch.testing.assert_close(found, fall, atol=1e-9, rtol=0)


def difference(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


def plain(model, metric, row, point, pos, change):
    def add(act, hook):
        act[0, pos] += change.view_as(act[0, pos])
        return act

    return metric(model.run_with_hooks(row[None], fwd_hooks=[(point, add)]))[0]


def test_random_directions_are_of_unit_length_and_vary_as_the_activations_do():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0] *= 10
    label = torch.arange(500) % 2
    x[:, 1] += 1000 * label  # what tells the classes apart is not part of how they vary within
    isotropic, varied = random_directions(x, label, 400, 0)
    for drawn in (isotropic, varied):
        torch.testing.assert_close(drawn.norm(dim=1), torch.ones(400, dtype=torch.float64))
    assert float((isotropic**2).mean(0)[0]) == pytest.approx(0.25, abs=0.04)
    assert float((varied**2).mean(0)[0]) > 0.75 and float((varied**2).mean(0)[1]) < 0.1


def test_after_ablation_the_probe_cannot_tell_whatever_its_kind():
    """The oblique step of a probe that reads and writes along different directions: it then reads the middle."""
    generator = torch.Generator().manual_seed(0)
    weight, step, means, x = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (2, 2, 2, 9))
    probe = Probe(weight, torch.zeros(2).double(), means, step=step)
    moved = x + (probe.middle - probe.coordinate(x))[:, None] * probe.direction
    torch.testing.assert_close(probe.coordinate(moved), torch.full((9,), probe.middle, dtype=torch.float64))


def test_what_is_told_is_half_the_difference_of_the_class_means():
    model = two_copies()
    metric = hl.logit_diff(model, answer=1, wrong_answer=0)
    task = odd(model, 31)
    check = check_probe_use(model, along(ACTIVE), task, metric, draws=2)
    values = metric(model(torch.stack(task.tokens)))
    halfway = (values[task.label == 1].mean() - values[task.label == 0].mean()) / 2
    torch.testing.assert_close(check.told.mean(), halfway.detach(), atol=1e-9, rtol=0)


def test_the_order_of_the_examples_changes_nothing():
    """`take` keeps prompts in their own order: an example's prompt is not that of the same number."""
    model = tiny_model(d_vocab=VOCAB, d_model=D, dtype=torch.float64)
    task, metric = odd(model, 24, lengths=(3, 4)), hl.logit_diff(model, answer=1, wrong_answer=0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    straight, turned = (check_probe_use(model, along(ACTIVE), one, metric, draws=3) for one in (task, task.take(order)))
    assert torch.equal(turned.label, straight.label[order])
    torch.testing.assert_close(turned.told, straight.told[order], atol=1e-9, rtol=0)
    torch.testing.assert_close(turned.fall, straight.fall[:, order], atol=1e-9, rtol=0)
    torch.testing.assert_close(turned.random[:, 0], straight.random[:, 0], atol=1e-9, rtol=0)


def test_a_check_is_a_result(tmp_path):
    model = two_copies()
    check = check_probe_use(model, along(ACTIVE), odd(model), hl.logit_diff(model, answer=1, wrong_answer=0), draws=25)
    check.save(tmp_path / "check.safetensors")
    back = CausalCheck.load(tmp_path / "check.safetensors")
    assert str(back.table()) == str(check.table()) and len(check.table()) == 6 and len(check.table(2)) == 2
    assert check.table().columns[-2:] == ("p", "q") and bool((check.q >= check.p).all())
    fall = [row[3] for row in check.top_prompts(3).rows]
    assert fall == sorted(check.fall[0].tolist(), reverse=True)[:3]
    assert "used" in check.figure().layout.title.text


def test_errors_say_what_would_work():
    model = two_copies()
    metric = hl.logit_diff(model, answer=1, wrong_answer=0)
    task = odd(model)
    homeless = along(ACTIVE)
    homeless.point = None
    with pytest.raises(InputError, match="activations inside a layer"):
        check_probe_use(model, homeless, task, metric)
    three = read_task(model, task.tokens, [i % 3 for i in range(30)])
    with pytest.raises(InputError, match="needs two classes, got 3"):
        check_probe_use(model, along(ACTIVE), three, metric)
    twice = task.take(torch.tensor([0, 1, 2, 3, 0, 1]))
    with pytest.raises(InputError, match="one position"):
        check_probe_use(model, along(ACTIVE), twice, metric)


def test_long_rotary_turns_the_reused_beginning_of_a_prompt_as_its_whole_row():
    model = zoo_model("phi3", dtype=torch.float64)  # the original context ends after 3 of the 5 tokens
    tokens = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 9, 0, 10]])
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    (edits,) = moves_along(
        model,
        [Pairs((0, 1), tokens, tokens)],
        point="blocks.0.hook_resid_post",
        pos=torch.tensor([3, 3]),
        shift=torch.ones(1, 2, dtype=torch.float64),
        directions=torch.zeros(1, 8, dtype=torch.float64),
    )
    (outcome,) = run_edits(model, [(edits, tokens, metric)], title="moves")
    assert edits.start == 3 and outcome.how == "engine"
    assert torch.allclose(outcome.values[0], metric(model(tokens)), atol=1e-10)
    assert torch.allclose(outcome.values[0], outcome.base, atol=1e-10)

"""Parts of training against direct formulas: losses, schedules, clipping, accumulation, wrappers, autocast, dropout."""

import math

import numpy as np
import pytest
import torch

import hooklens as hl
from hooklens.data.markov_chains import markov_source
from hooklens.data.modular import modular_arithmetic
from hooklens.model.dropout import dropout_masks
from hooklens.testing import tiny_model
from hooklens.training.loop import train
from hooklens.training.losses import CrossEntropy, SquaredError, StableMax
from hooklens.training.optimizers import SGD, AdamW, Grokfast, OrthogonalGradient
from hooklens.training.schedules import Constant, Cosine, Steps
from hooklens.training.training_settings import Settings

DATA = modular_arithmetic(p=5, fraction=0.8)


def model(**changes):
    return tiny_model(d_vocab=DATA.d_vocab, **changes)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- losses and schedules


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    logits, targets = gaussian(3, 4, 7), torch.arange(12).view(3, 4) % 7
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    direct = -probs.gather(-1, targets[..., None])[..., 0].log()
    torch.testing.assert_close(CrossEntropy()(logits, targets), direct, atol=1e-12, rtol=0)
    assert CrossEntropy(double=True)(logits.float(), targets).dtype == torch.float64
    assert CrossEntropy()(logits.bfloat16(), targets).dtype == torch.float32


def test_stablemax_is_the_formula_and_its_gradient_is_finite_everywhere():
    values = [-1e30, -1e4, -1.0, -1e-9, -0.0, 0.0, 1e-9, 1.0, 1e4, 1e30]
    logits = torch.tensor([values], dtype=torch.float64).repeat(10, 1).requires_grad_()
    losses = StableMax()(logits, torch.arange(10))
    scores = np.array([x + 1 if x >= 0 else 1 / (1 - x) for x in values])
    np.testing.assert_allclose(losses.detach().numpy(), -np.log(scores / scores.sum()), rtol=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert bool(gradient.isfinite().all())
    x = gaussian(4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: StableMax()(x, torch.tensor([0, 1, 2, 4])), x)


def test_squared_error_is_half_the_squared_distance():
    assert SquaredError()(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])).tolist() == [12.5]


def test_schedules_are_their_formulas():
    cosine = [Cosine(warmup=4, floor=0.1).factor(step, 20) for step in range(20)]
    rise = [(step + 1) / 4 for step in range(4)]
    fall = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(16)]
    assert cosine == pytest.approx(rise + fall, abs=1e-15)
    assert [Constant(warmup=2).factor(step, n) for step, n in ((0, 5), (1, 5), (4, 5), (4, 50))] == [0.5, 1, 1, 1]
    steps = [Steps(at=(0.25, 0.5), gamma=0.5).factor(step, 8) for step in range(8)]
    assert steps == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


# -- wrappers


def test_the_orthogonal_gradient_is_the_direct_formula():
    w, g = gaussian(12), gaussian(12, seed=1)
    changed = g.clone()
    OrthogonalGradient().prepare(changed, w, {}, [slice(0, 12)])
    left = g - (w @ g) / (w @ w) * w
    torch.testing.assert_close(changed, left * g.norm() / left.norm(), atol=1e-14, rtol=0)


def test_grokfast_is_the_direct_formula():
    rule, slow, w = Grokfast(inner=SGD(lr=0.1), decay=0.9, amplify=3.0), gaussian(5) * 0, gaussian(5)
    slots, ours = {name: torch.zeros_like(w) for name in rule.kept}, w.clone()
    for t in range(1, 6):
        g = gaussian(5, seed=t)
        slow = 0.9 * slow + 0.1 * g
        w = w - 0.1 * (g + 3 * slow)
        rule.step(ours, g.clone(), slots, t=t, rate=0.1, spans=[slice(0, 5)])
    torch.testing.assert_close(ours, w, atol=1e-14, rtol=0)


# -- the step


def after_one_step(**settings):
    trained = model(dtype=torch.float64)
    train(trained, DATA, steps=1, settings=Settings(optimizer=SGD(lr=1.0), schedule="constant", **settings))
    return dict(trained.named_parameters())


def test_a_clipped_step_is_that_of_torchs_clip_grad_norm():
    before, after = dict(model(dtype=torch.float64).named_parameters()), after_one_step(batch=8, clip=0.1)
    peer = model(dtype=torch.float64)
    batch = DATA.batch(0, 8)
    CrossEntropy()(peer(batch.inputs)[batch.counts], batch.targets[batch.counts]).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), 0.1)
    assert norm > 0.1
    for name, parameter in peer.named_parameters():
        # torch divides by the norm + 1e-6, which its documentation does not say
        change = parameter.grad * (norm + 1e-6) / norm
        torch.testing.assert_close(after[name], before[name] - change, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulated_passes_are_the_whole_batch(dropout):
    runs = []
    for accumulate in (1, 4):
        trained = model(dtype=torch.float64, dropout=dropout)
        settings = Settings(batch=8, accumulate=accumulate, optimizer=SGD(lr=0.1))
        runs.append((train(trained, DATA, steps=3, settings=settings).loss, trained.state_dict()))
    (whole, weights), (parts, weights_of_parts) = runs
    assert np.abs(whole - parts).max() < 1e-6
    assert max(float((weights[name] - weights_of_parts[name]).abs().max()) for name in weights) < 1e-12


def test_gradients_that_the_caller_left_do_not_enter():
    fresh, used = model(), model()
    used.embed.weight.grad = torch.full_like(used.embed.weight, 100.0)
    first, second = (train(m, DATA, steps=2, settings=Settings(batch=4)) for m in (fresh, used))
    assert (first.steps()["gradient_norms"] == second.steps()["gradient_norms"]).all()


def test_bfloat16_lowers_the_loss_with_float32_weights_and_logits():
    trained, dtypes = model(), set()
    trained.add_hook("unembed.hook_out", lambda logits, hook: dtypes.add(("logits", logits.dtype)))
    trained.add_hook(("z", 0), lambda z, hook: dtypes.add(("z", z.dtype)))
    settings = Settings(batch=20, precision="bfloat16", optimizer=AdamW(lr=0.02), schedule="constant")
    run = train(trained, DATA, steps=60, settings=settings)
    assert dtypes == {("logits", torch.float32), ("z", torch.bfloat16)}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert run.loss[-5:].mean() < 0.5 * run.loss[:5].mean()


def test_patience_stops_after_evaluations_without_a_lower_loss(tmp_path):
    settings = Settings(batch=4, patience=3, evaluate=40, optimizer=SGD(lr=0.0))
    run = train(model(), DATA, steps=40, out=tmp_path / "run", settings=settings)
    assert run.steps_done == 3 and run.evaluations().steps.tolist() == [0, 1, 2, 3]
    assert train(model(), DATA, steps=40, out=tmp_path / "run", settings=settings).steps_done == 3


def test_solved_stops_after_steps_at_a_held_out_accuracy(tmp_path):
    source = markov_source(seed=1)
    settings = Settings(batch=8, solved=0.4, solved_for=6, evaluate=30, optimizer=AdamW(lr=0.01), schedule="constant")
    for _ in range(2):  # the second call changes nothing
        trained = tiny_model(d_vocab=source.d_vocab, n_ctx=64)
        run = train(trained, source, steps=60, out=tmp_path / "run", settings=settings)
        rows = run.evaluations()
        assert run.steps_done == rows.steps[-1] < 30
        assert (rows["accuracy"][-4:] > 0.4).all() and not rows["accuracy"][-5] > 0.4
    batches = list(source.held_out(64))
    hits = [trained(batch.inputs).argmax(-1) == batch.targets for batch in batches]
    assert abs(float(torch.cat(hits).double().mean()) - run.held_out_accuracy[-1]) < 1e-6


# -- dropout


def test_after_eval_every_method_is_that_of_the_model_without_dropout():
    plain, dropping = model(), model(dropout=0.5).eval()
    tokens, other = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    results = []
    for m in (plain, dropping):
        metric = hl.logit_diff(m, answer=1, wrong_answer=2)
        sweep = hl.patch(m, tokens, other, metric, site="z")
        lens = hl.lens.logit_lens(m, tokens)
        _, cache = m.run_with_cache(tokens)
        scores = hl.heads.score_heads(m).table().rows
        results.append([sweep.values, torch.as_tensor(lens.kl), cache["pattern", 1], scores])
    assert sweep.kernel is not None
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.parametrize("block", ["pre", "post", "sandwich", "parallel"])
def test_training_drops_embedding_pattern_and_both_outputs(block):
    dropping, tokens = model(dropout=0.5, block=block, seed=1).train(), torch.tensor([[1, 2, 3, 4]])
    with dropout_masks(torch.Generator().manual_seed(0)):
        _, cache = dropping.run_with_cache(tokens)
    for name in ("attn_out", "mlp_out", "resid_pre"):
        assert 0.2 < float((cache[name, 0] == 0).float().mean()) < 0.8
    assert torch.allclose(cache["pattern", 0].sum(-1), torch.ones(1))
    # The pattern is dropped behind its hook: the first query sees one key, and z is that value doubled, or 0.
    ratio = cache["z", 0][0, 0] / cache["v", 0][0, 0]
    assert all(float(head[0]) in (0.0, 2.0) or abs(float(head[0]) - 2) < 1e-5 for head in ratio)


def test_masks_depend_on_the_generator_and_not_on_how_a_batch_is_split():
    dropping, tokens = model(dropout=0.5), torch.arange(12).view(4, 3) % 6

    def passed(rows, **where):
        with dropout_masks(torch.Generator().manual_seed(3), **where):
            return dropping(tokens[rows])

    whole = passed(slice(0, 4))
    parts = [passed(slice(i, i + 2), first_row=i, n_rows=4) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(whole, dropping.eval()(tokens))


def test_masks_depend_on_the_seed_of_the_run():
    losses = [train(model(dropout=0.5), DATA, steps=2, settings=Settings(seed=seed)).loss for seed in (0, 0, 1)]
    assert (losses[0] == losses[1]).all() and not (losses[0] == losses[2]).any()


def test_a_checkpoint_keeps_dropout(tmp_path):
    hl.save(model(dropout=0.25), tmp_path / "m.safetensors")
    loaded = hl.load(tmp_path / "m.safetensors")
    assert loaded.cfg.dropout == 0.25 and loaded.blocks[0].dropout.p == 0.25


# -- the record


def test_norms_and_update_ratios_are_those_of_the_layers(tmp_path):
    trained = model(dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    run = train(trained, DATA, steps=1, settings=Settings(batch=4))
    layer = run.layers.index("blocks.1")
    names = [name for name in before if name.startswith("blocks.1.")]
    after = trained.state_dict()
    norm = math.sqrt(sum(float(before[name].square().sum()) for name in names))
    change = math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in names))
    assert run.steps()["parameter_norms"][0, layer] == pytest.approx(norm, rel=1e-6)
    assert run.update_ratios()[0, layer] == pytest.approx(change / norm, rel=1e-5)


def test_snapshots_are_the_models_activations_and_can_be_read_while_it_trains(tmp_path):
    prompts, seen, out = [[1, 2, 5], [3, 0, 5]], [], tmp_path / "run"
    chosen = [["pattern", 0, 1], "blocks.1.hook_resid_post"]
    settings = Settings(batch=4, evaluate=2, snapshots=chosen, snapshot_prompts=prompts)
    assert Settings.from_json(settings.to_json()) == settings

    def read(step, loss):
        seen.append(hl.open_run(out).snapshots().steps.tolist())

    trained = model()
    snapshots = train(trained, DATA, steps=4, out=out, settings=settings, after_step=read).snapshots()
    assert seen == [[0], [0, 2], [0, 2], [0, 2, 4]] and snapshots.prompts == prompts
    _, cache = trained.run_with_cache(torch.tensor(prompts))
    head = snapshots["blocks.0.attn.hook_pattern L0H1"]
    assert head.shape == (3, 2, 3, 3)
    np.testing.assert_allclose(head[-1], cache["pattern", 0][:, 1].numpy(), atol=1e-6)
    np.testing.assert_allclose(snapshots["blocks.1.hook_resid_post"][-1], cache["resid_post", 1].numpy(), atol=1e-5)
    assert snapshots.axes(snapshots.names[0]) == ("step", "batch", "query_pos", "key_pos")


def test_the_bar_shows_the_loss(monkeypatch, capsys):
    monkeypatch.setenv("HOOKLENS_PROGRESS", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run = train(
        model(), DATA, steps=3, settings=Settings(batch=4), after_step=lambda step, loss: __import__("time").sleep(0.2)
    )
    shown = capsys.readouterr().err
    assert "training" in shown and "loss" in shown and f"{run.loss[0]:.4g}" in shown and "steps/s" in shown

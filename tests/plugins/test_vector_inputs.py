"""Models that read vectors: every method gives the numbers of plain hooked passes, or says why not in one line."""

import re

import pytest
import torch
from close import close
from jaxtyping import TypeCheckError
from model.zoo import zoo_model
from sweeps.loop import has, looped
from sweeps.path_loop import edges
from torch import Tensor

import hooklens as hl
from hooklens.core.errors import ArgumentError, HooklensError, InputError, WrongType
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.jsonl import write_pairs_file
from hooklens.model.config import VectorEmbed
from hooklens.plugins import available, find
from hooklens.plugins.probing.task import ProbeTask
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result
from hooklens.studies.head_study import study_heads
from hooklens.studies.lens_study import study_lens
from hooklens.studies.pair_study import study_pair
from hooklens.testing import check_plugin

VECTORS = {"embed": VectorEmbed(d_in=3), "d_vocab": 1, "d_vocab_out": 1, "d_mlp": 4, "tie_word_embeddings": False}
BARE = {"attn_only": True, "d_mlp": None, "normalization_type": None, "positional_embedding_type": "none"}
#: Kinds of models, linear and softmax attention, with and without MLP and norm, of one to three layers.
MODELS = {
    "softmax": ("gpt2", {}, torch.float32),
    "three layers": ("gpt2", {"n_layers": 3}, torch.float64),
    "softmax without MLP and norm": ("gpt2", BARE, torch.float64),
    "linear attention": ("linear_attention", {}, torch.float32),
    "one layer of linear attention": ("linear_attention", {"n_layers": 1} | BARE, torch.float64),
    "biased embedding, two outputs": (
        "llama",
        {"embed": VectorEmbed(d_in=3, bias=True), "d_vocab_out": 2},
        torch.float64,
    ),
    "no causal mask": ("bidirectional", {}, torch.float32),
    "parallel": ("neox", {}, torch.float64),
    "post-norm": ("post", {}, torch.float32),
}
SITES = {
    "resid_pre": "layer x pos",
    "z": "layer x head",
    "mlp_out": "layer",
    "post": "layer x neuron",
    "k": "layer x head",
}
COSTLY = ("linear attention", "biased embedding, two outputs", "no causal mask", "parallel", "post-norm")
DEEP = [pytest.param(kind, marks=pytest.mark.slow) if kind in COSTLY else kind for kind in MODELS]


def vector_model(kind: str = "softmax") -> hl.HookedTransformer:
    name, changes, dtype = MODELS[kind]
    return zoo_model(name, dtype=dtype, **VECTORS | changes)


def vectors(seed: int, n: int = 3, n_pos: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, n_pos, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def runs(model: hl.HookedTransformer, n: int = 3) -> tuple[Tensor, Tensor]:
    """Clean prompts, and corrupted ones that differ in one vector."""
    clean = vectors(0, n, dtype=model.dtype)
    corrupted = clean.clone()
    corrupted[:, 2] = vectors(1, n, dtype=model.dtype)[:, 2]
    return clean, corrupted


def last(logits: Tensor) -> Tensor:
    """The prediction at the last position."""
    return logits[:, -1, 0]


@pytest.mark.parametrize("kind", DEEP)
def test_patching_and_ablation_give_the_numbers_of_the_plain_loop(kind):
    model = vector_model(kind)
    clean, corrupted = runs(model, 2)
    metric = hl.prediction(model)
    with hl.engine(verify=0):
        for site, by in list(SITES.items())[: None if kind in COSTLY else 2]:
            if has(model, site):
                expected = looped(model, corrupted, clean, last, site, by)
                assert close(hl.patch(model, clean, corrupted, metric, site=site, by=by).per_pair, expected, 400)
        sweep = hl.patch(model, clean, corrupted, last)  # a metric that does not say what it reads
        assert close(sweep.per_pair, looped(model, corrupted, clean, last, "resid_pre", "layer x pos"), 400)
        assert close(sweep.clean_per_pair, last(model(clean)).detach(), 400)
        noised = hl.patch(model, clean, corrupted, metric, site="z", value="corrupted")
        assert close(noised.per_pair, looped(model, clean, corrupted, last, "z", "layer x head"), 400)
        for value, write in (("zero", lambda act: act * 0), ("mean", lambda act: act.mean(0, keepdim=True))):
            swept = hl.ablate(model, clean, metric, value=value)
            assert close(swept.per_prompt, looped(model, clean, write, last, "z", "layer x head"), 400)
        drawn = hl.ablate(model, clean, metric, value="resample")  # of two prompts, the other one
        assert close(drawn.per_prompt, looped(model, clean, clean.flip(0), last, "z", "layer x head"), 400)


@pytest.mark.parametrize("kind", ["softmax", "linear attention", "parallel", "no causal mask"])
def test_paths_give_the_numbers_of_the_plain_loop(kind):
    model = vector_model(kind)
    clean, corrupted = runs(model)
    top = model.cfg.n_layers - 1
    with hl.engine(verify=0):
        sweep = hl.path_patch(model, clean, corrupted, hl.prediction(model), receivers=[("q", top, 0), ("v", top, 1)])
    senders = [("head", 0, 0), ("head", 0, 1)]
    for sender, name in zip(senders, ("L0H0", "L0H1"), strict=True):
        expected = edges(model, corrupted, clean, last, sender, [("q", top, 0), ("v", top, 1)])
        assert close(sweep.per_pair[:, sweep.senders.index(name)], expected, 400)


@pytest.mark.parametrize("kind", ["three layers", "one layer of linear attention"])
def test_attribution_patching_gives_the_numbers_of_autograd(kind):
    model = vector_model(kind)
    clean, corrupted = runs(model)
    found = hl.patching.attribution_patch(model, clean, corrupted, hl.prediction(model), site="z", exact=0)
    _, there = model.run_with_cache(clean, "z")
    logits, cache = model.run_with_cache(corrupted, "z", grads=True)
    grads = torch.autograd.grad(last(logits).sum(), [cache["z", i] for i in range(model.cfg.n_layers)])
    for layer, grad in enumerate(grads):
        expected = ((there["z", layer] - cache["z", layer].detach()) * grad).sum((1, 3))
        assert close(found.per_pair[:, layer], expected, 400)


@pytest.mark.parametrize("kind", ["biased embedding, two outputs"])
def test_attributions_to_vectors_are_gradients_of_the_input(kind):
    model = vector_model(kind)
    clean, corrupted = runs(model)
    inputs = clean.clone().requires_grad_()
    (grad,) = torch.autograd.grad(last(model(inputs)).sum(), inputs)
    by_hand = (grad * clean).sum(-1)
    assert close(hl.patching.gradient_x_input(model, clean, hl.prediction(model), stages=0).per_token, by_hand, 1e4)
    for baseline in ("zero", corrupted):
        found = hl.patching.integrated_gradients(
            model, clean, hl.prediction(model), baseline=baseline, steps=20, stages=0
        )
        begin = model(clean * 0 if isinstance(baseline, str) else baseline)
        assert close(found.gap, (last(model(clean)) - last(begin)).detach(), 400)
        assert found.incompleteness < 0.1
    assert found.per_token[:, [0, 1, 3, 4]].abs().max() == 0  # only one vector differs from the baseline


@pytest.mark.parametrize("kind", ["softmax", "three layers", "one layer of linear attention", "post-norm"])
def test_the_prediction_lens_unembeds_every_stream(kind):
    model, x = vector_model(kind), vectors(0, dtype=MODELS[kind][2])
    target = torch.tensor([0.3, -1.0, 2.0])
    lens = hl.lens.prediction_lens(model, x, target=target, pos=2)
    assert torch.equal(lens.predictions[-1], model(x))
    for layer in range(model.cfg.n_layers):
        assert torch.equal(lens.predictions[layer], model.read_out(model(x, stop_at_layer=layer)))
    at = lens.predictions[:, :, 2, 0].double()
    error = (at[:, :, None] - target.double()).square()  # layer prompt target
    assert torch.allclose(lens.error.double(), error.diagonal(dim1=1, dim2=2), atol=1e-5)
    others = (error.sum(2) - error.diagonal(dim1=1, dim2=2)) / 2
    assert torch.allclose(lens.control.double(), others, rtol=1e-5)
    expected = torch.stack([torch.corrcoef(torch.stack([row, target.double()]))[0, 1] for row in at])
    assert torch.allclose(lens.correlation.double(), expected, atol=1e-5, equal_nan=True)
    assert float(hl.lens.prediction_lens(model, x).error[-1].max()) == 0


@pytest.mark.parametrize("kind", ["three layers", "softmax without MLP and norm", "biased embedding, two outputs"])
def test_direct_attribution_sums_to_the_prediction(kind):
    model, x = vector_model(kind), vectors(0, dtype=torch.float64)
    answer = 0 if model.cfg.d_vocab_out > 1 else None
    found = hl.lens.direct_logit_attribution(model, x, answer=answer)
    whole = found.total + found.unembed_bias + found.norm_bias
    assert close(found.logit, last(model(x)), 400) and close(whole, found.logit, 1e4)
    assert bool(found.spread.isnan().all()) == (answer is None)  # no other outputs to be compared with
    assert found.answer[0] == "output 0" and found.str_tokens[0][1] == "vector 1"


@pytest.mark.parametrize("kind", ["softmax", "three layers", "no causal mask"])
def test_activations_of_prompts_of_several_lengths_are_gathered(kind):
    model = vector_model(kind)
    prompts = [vectors(0, 1, n, model.dtype)[0] for n in (4, 2, 5)]
    acts = hl.probing.gather(model, prompts, site="resid_post")
    for i, row in enumerate(prompts):
        _, cache = model.run_with_cache(row[None], ["resid_post", "embed"])
        for layer in range(model.cfg.n_layers):
            assert close(acts.x[layer, i], cache["resid_post", layer][0, -1], 400)
        assert close(acts.context[i], cache["hook_embed"][0].mean(0), 400)
    assert acts.token.unique().numel() == 3


def test_probes_of_classes_and_of_numbers_find_what_is_there():
    model, x = vector_model("softmax without MLP and norm"), vectors(3, 40, 4, torch.float64)
    task = hl.probing.read_task(model, x, (x[:, -1, 0] > 0).tolist())
    _, study = hl.train_probe(model, task, kind=hl.probing.MassMean(), null_draws=0)
    assert study.balanced_accuracy > 0.7 and study.control_by is None
    every = ProbeTask(  # a label at each of two positions of every prompt
        name="first number",
        tokens=list(x),
        prompt=torch.arange(40).repeat_interleave(2),
        pos=torch.tensor([1, 3]).repeat(40),
        label=(x[:, [1, 3], 0] > 0).long().flatten(),
        classes=["negative", "positive"],
        entities=[[]] * 80,
        texts=[""] * 40,
    )
    assert hl.train_probe(model, every, kind=hl.probing.MassMean(), null_draws=0)[1].balanced_accuracy > 0.7

    noise = torch.randn(40, 1, generator=torch.Generator().manual_seed(9)).double()
    both = torch.cat([x[:, -1, :2], noise], 1)
    probe, values = hl.probing.train_value_probe(model, x, both, draws=19)
    assert bool((values.by_target[:2] > 0.8).all()) and values.by_target[2] < 0.2
    assert values.p == 1 / 20 and values.null.mean() < 0
    acts = hl.probing.gather(model, x, site=probe.point).x[0]
    assert float((probe(acts)[:, :2] - x[:, -1, :2]).detach().square().mean()) < 0.05
    assert hl.probing.train_value_probe(model, x, noise[:, 0], draws=19)[1].p > 0.05


def test_ridge_and_leave_one_out_are_those_of_refitting():
    from hooklens.plugins.probing.ridge_folds import RIDGES, fit_ridge

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    y = x[:, :1] + torch.randn(12, 1, generator=generator, dtype=torch.float64)

    def solved(rows, ridge):
        ones = torch.cat([x[rows], torch.ones(len(x[rows]), 1)], 1).double()
        penalty = torch.diag(torch.tensor([12 * ridge] * 3 + [0.0], dtype=torch.float64))
        return torch.linalg.solve(ones.T @ ones + penalty, ones.T @ y[rows])

    errors = []
    for ridge in RIDGES:
        left = []
        for i in range(12):
            w = solved([j for j in range(12) if j != i], ridge)
            left.append((y[i] - x[i] @ w[:3] - w[3]).square())
        errors.append(float(torch.stack(left).mean()))
    fit, best = fit_ridge(x, y), min(range(len(RIDGES)), key=errors.__getitem__)
    assert torch.allclose(fit.left_out, torch.tensor(errors[best]).double(), rtol=1e-6)
    assert torch.allclose(fit.weight[0], solved(slice(None), RIDGES[best])[:3, 0], atol=1e-10)


def test_probe_edits_are_those_of_a_hook():
    model, x = vector_model("three layers"), vectors(3, 40, 4, torch.float64)
    task = hl.probing.read_task(model, x, (x[:, -1, 0] > 0).tolist())
    first, second = task.halves()
    probe, _ = hl.train_probe(model, first, site=("resid_post", 0), kind=hl.probing.MassMean(), null_draws=0)
    check = hl.probing.check_probe_use(model, probe, second, hl.prediction(model), draws=2)
    rows = torch.stack(second.tokens)

    def ablated(act: Tensor, hook) -> Tensor:
        act[:, -1] += (probe.middle - probe.coordinate(act[:, -1]))[:, None] * probe.direction
        return act

    fall = last(model(rows)) - last(model.run_with_hooks(rows, fwd_hooks=[(("resid_post", 0), ablated)]))
    sign, counts = 2.0 * second.label.double() - 1, second.label.bincount().double()
    assert close(check.fall[0], (sign * len(rows) / (2 * counts[second.label]) * fall).detach(), 1e4)


def test_heads_are_knocked_out_and_scored_as_by_hooks():
    model, x = vector_model("three layers"), vectors(0, dtype=torch.float64)
    found = hl.heads.knock_out_keys(model, x, hl.prediction(model), kind="first")
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[1:, 0] = True

    def block(scores: Tensor, hook) -> Tensor:
        scores[:, 1] = scores[:, 1].masked_fill(mask, -torch.inf)
        return scores

    expected = last(model(x)) - last(model.run_with_hooks(x, fwd_hooks=[(("attn_scores", 1), block)]))
    assert torch.allclose(found.fall[:, found.heads.index("L1H1")], expected.detach(), atol=1e-9)
    pattern = model.run_with_cache(x, "pattern")[1]["pattern", 2]
    scores = hl.heads.score_heads(model, x, draws=9).scores
    # keys from position 1 on count as previous; position 0 is the first
    assert torch.allclose(scores["previous"][:, 2], pattern.diagonal(-1, -2, -1)[..., 1:].mean(-1), atol=1e-9)
    assert bool(scores["induction"].isnan().all())  # vectors that never recur have no such keys


def test_circuits_go_from_the_corrupted_run_to_the_clean_one():
    model = vector_model("three layers")
    clean, corrupted = runs(model)
    pairs, graph = hl.PromptPairs(clean, corrupted, hl.prediction(model)), hl.circuits.circuit_graph(model)
    kept = torch.stack([torch.ones(graph.n_edges), torch.zeros(graph.n_edges)]).bool()
    values = hl.circuits.run_edges(model, kept, pairs).per_pair
    assert torch.allclose(values, torch.stack([last(model(clean)), last(model(corrupted))]).detach(), atol=1e-9)


def test_prompts_of_several_lengths_are_matched_at_their_ends():
    model = vector_model("three layers")
    long, short = vectors(0, 1, 6, torch.float64)[0], vectors(5, 1, 4, torch.float64)[0]
    short[0], short[-1] = long[0], long[-1]
    sweep = hl.patch(model, [long], [short], hl.prediction(model), site="resid_post", by="layer")
    cache = model.run_with_cache(long[None], "resid_post")[1]

    def write(act: Tensor, hook) -> Tensor:
        act[:, 0], act[:, -1] = cache[hook.name][:, 0], cache[hook.name][:, -1]
        return act

    for layer in range(3):
        patched = model.run_with_hooks(short[None], fwd_hooks=[(("resid_post", layer), write)])
        assert torch.allclose(sweep.per_pair[:, layer], last(patched).detach(), atol=1e-9)
    with pytest.raises(ArgumentError, match="same number of vectors to be patched by position, got 6 and 4"):
        hl.patch(model, [long], [short], hl.prediction(model))


def test_replacements_read_reference_vectors():
    model = vector_model("softmax without MLP and norm")
    clean, other = vectors(0, 2, dtype=torch.float64), vectors(7, 2, dtype=torch.float64)
    metric, by = hl.prediction(model), "layer x head"
    mean = hl.ablate(model, clean, metric, value=hl.Mean(reference=other))
    seen = {name: act.mean(0, keepdim=True) for name, act in model.run_with_cache(other, "z")[1].items()}
    for layer in range(2):
        for head in range(2):

            def write(z: Tensor, hook, head=head) -> Tensor:
                z[:, :, head] = seen[hook.name][:, :, head]
                return z

            expected = last(model.run_with_hooks(clean, fwd_hooks=[(("z", layer), write)]))
            assert close(mean.per_prompt[:, layer, head], expected.detach(), 400)
    run = hl.ablate(model, clean, metric, value=hl.patching.OtherRun(other))
    assert close(run.per_prompt, looped(model, clean, other, last, "z", by), 400)
    given = hl.patch(model, clean, other, metric, site="z", value=torch.full((), 0.5))
    assert close(given.per_pair, looped(model, clean, lambda act: act * 0 + 0.5, last, "z", by), 400)


def test_steering_adds_to_the_stream_of_vectors():
    model, x = vector_model("three layers"), vectors(0, dtype=torch.float64)
    direction = torch.linspace(-1, 1, 8, dtype=torch.float64)
    with hl.steer(model, direction, site=("resid_post", 1)):
        steered = model(x)
    by_hand = model.run_with_hooks(x, fwd_hooks=[(("resid_post", 1), lambda act, hook: act + direction)])
    assert torch.allclose(steered, by_hand) and not torch.allclose(steered, model(x))
    positive = x + torch.tensor([3.0, 0.0, 0.0])
    contrast = hl.steering.find_direction(model, positive, x, draws=19)
    gap = [model.run_with_cache(some, "resid_post")[1]["resid_post", 0][:, -1].mean(0) for some in (positive, x)]
    assert torch.allclose(contrast.direction[0], gap[0] - gap[1])


def test_pairs_of_vectors_are_indexed_saved_and_named(tmp_path):
    model = vector_model()
    clean, corrupted = runs(model, 4)
    metric = hl.squared_error(model, target=[0.0, 1.0, 2.0, 3.0])
    pairs = hl.PromptPairs(clean, corrupted, metric, group=["a", "a", "b", "c"])
    assert [len(half) for half in pairs.split()] == [2, 2] or [len(half) for half in pairs.split()] == [1, 3]
    assert pairs.table().rows[0][0] == "5 vectors of 3 numbers"
    pairs.save(tmp_path / "pairs")
    again = Result.load(tmp_path / "pairs")
    assert torch.equal(again.clean, clean) and torch.equal(again.metric.target, metric.target)
    whole, some = hl.patch(model, pairs), hl.patch(model, again[1:3])
    assert close(some.per_pair, whole.per_pair[1:3], 400)
    expected = looped(
        model, corrupted, clean, lambda out: -(last(out) - torch.arange(4.0)).square(), "resid_pre", "layer x pos"
    )
    assert close(whole.per_pair, expected, 4000)
    assert whole.name_of((1, 2)) == "L1 vector 2" and whole.table().rows[0][0].startswith("L")
    whole.save(tmp_path / "sweep")
    assert torch.equal(Result.load(tmp_path / "sweep").per_pair, whole.per_pair)
    assert len(set(pairs.digests(model))) == 4
    single = hl.PromptPairs(clean[0], corrupted[0], hl.prediction(model))
    assert len(single) == 1 and close(
        hl.patch(model, single).per_pair, hl.patch(model, clean[:1], corrupted[:1], last).per_pair, 400
    )
    with pytest.raises(InputError, match="a file of pairs holds texts"):
        write_pairs_file(hl.PromptPairs(clean, corrupted), tmp_path / "pairs.jsonl")


def test_a_sweep_goes_on_with_the_same_vectors_only(tmp_path):
    model = vector_model("three layers")
    clean, corrupted = runs(model)
    asked = {"metric": hl.prediction(model), "resume": tmp_path / "sweep"}
    sweep = hl.patch(model, clean, corrupted, **asked)
    again = hl.patch(model, clean, corrupted, **asked)
    assert torch.equal(sweep.per_pair, again.per_pair)
    moved = corrupted.clone()
    moved[0, 2, 0] += 1e-6
    with pytest.raises(HooklensError, match="belongs to another sweep"):
        hl.patch(model, clean, moved, **asked)


def test_regression_prompts_in_float32_are_read_by_a_float64_model():
    data = hl.data.in_context_regression(d=2, n_points=4)
    model = vector_model("three layers")
    clean, corrupted = (data.batch(step, 3).inputs for step in (0, 1))
    found = hl.patch(model, clean, corrupted, hl.prediction(model), site="resid_mid")
    assert torch.allclose(found.clean_per_pair, last(model(clean.double())).detach())
    assert found.per_pair.dtype == torch.float64


BAD = {
    "token ids": (torch.tensor([[1, 2, 3]]), InputError, r"vectors \[prompt pos 3\].*got torch.int64 \[1, 3\]"),
    "a row of ids": ([1, 2, 3], InputError, "got torch.int64"),
    "whole numbers": ([[[1, 2, 3]]], InputError, "got torch.int64"),
    "other width": (torch.zeros(2, 4, 5), InputError, r"vectors of 3 numbers.*got torch.float32 \[4, 5\]"),
    "text": ("a text", WrongType, "got 'a text'"),
    "texts": (["a", "b"], WrongType, "got"),
    "nothing": ([], InputError, "got torch.float32"),
    "no prompt": (torch.zeros(0, 4, 3), InputError, "got no prompt"),
    "no vector": (torch.zeros(2, 0, 3), InputError, r"got torch.float32 \[0, 3\]"),
    "ragged lists": ([[[0.1, 0.2, 0.3]], [[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]]], WrongType, "holds vectors"),
    "an object": (object(), WrongType, "holds vectors"),
}


@pytest.mark.parametrize("name", BAD)
def test_prompts_that_are_no_vectors_are_refused_in_one_line(name):
    prompts, error, words = BAD[name]
    model = vector_model()
    for method in (
        lambda: hl.patch(model, prompts, vectors(0), hl.prediction(model)),
        lambda: hl.ablate(model, prompts, hl.prediction(model)),
        lambda: hl.lens.prediction_lens(model, prompts),
        lambda: hl.probing.gather(model, prompts),
    ):
        with pytest.raises((error, TypeCheckError)) as caught:
            method()
        said = str(caught.value)
        assert isinstance(caught.value, TypeCheckError) or (re.search(words, said) and "\n" not in said), said


PROBE = hl.probing.Probe(torch.eye(2, 8), torch.zeros(2), torch.eye(2, 8))
#: What needs a vocabulary, with the words that say what works instead.
REFUSED = {
    "logit_lens": (lambda m, x: hl.logit_lens(m, x), "prediction_lens"),
    "tuned_lens": (lambda m, x: hl.lens.tuned_lens(m, x, hl.lens.TunedLens(2, 8)), "prediction_lens"),
    "train_tuned_lens": (lambda m, x: hl.lens.train_tuned_lens(m, x), "prediction_lens"),
    "fit_tuned_lens": (lambda m, x: hl.lens.fit_tuned_lens(m, x), "prediction_lens"),
    "trace_predictions": (lambda m, x: hl.lens.trace_predictions(m, x, answer=0), "prediction_lens"),
    "measure_calibration": (lambda m, x: hl.lens.measure_calibration(m, x), "prediction_lens"),
    "prob": (lambda m, x: hl.prob(m, answer=0), "hl.prediction"),
    "log_prob": (lambda m, x: hl.log_prob(m, answer=0), "hl.prediction"),
    "kl": (lambda m, x: hl.kl(m, x), "hl.prediction"),
    "loss": (lambda m, x: hl.loss(m, x), "hl.squared_error"),
    "no metric": (lambda m, x: hl.patch(m, x, x + 1), "hl.prediction"),
    "mean baseline": (
        lambda m, x: hl.patching.integrated_gradients(m, x, hl.prediction(m), baseline="mean"),
        "give 'zero'",
    ),
    "same prompts": (lambda m, x: hl.patch(m, x, x, hl.prediction(m)), "same vectors"),
    "project_tokens": (lambda m, x: hl.probing.project_tokens(m, PROBE, [0], [0]), "measure_geometry"),
    "named labels": (lambda m, x: hl.probing.sentiment(m), "vectors"),
    "continuous labels": (
        lambda m, x: hl.probing.read_task(m, vectors(0, 30), vectors(1, 30)[:, 0, 0]),
        "train_value_probe",
    ),
    "find_induction_heads": (lambda m, x: hl.heads.find_induction_heads(m), "score_heads"),
    "classify_heads": (lambda m, x: hl.heads.classify_heads(m), "score_heads"),
    "score_heads": (lambda m, x: hl.heads.score_heads(m), "give prompts"),
    "score_copying": (lambda m, x: hl.heads.score_copying(m), "measure_mediation"),
    "score_copy_suppression": (lambda m, x: hl.heads.score_copy_suppression(m, x), "measure_mediation"),
    "find_name_movers": (lambda m, x: hl.heads.find_name_movers(m, hl.PromptPairs(x, x)), "path_patch"),
    "no such keys": (lambda m, x: hl.heads.knock_out_keys(m, x, hl.prediction(m)), "another kind"),
    "sweep_coefficients": (
        lambda m, x: hl.steering.sweep_coefficients(m, x, torch.ones(8), [1.0], last, site=("resid_post", 0)),
        "hl.steer",
    ),
    "measure_direction_ablation": (
        lambda m, x: hl.steering.measure_direction_ablation(m, x, torch.ones(8), last),
        "ablate_direction",
    ),
    "study_pair": (lambda m, x: study_pair(m, hl.PromptPairs(x, x + 1)), "hl.patch"),
    "study_heads": (lambda m, x: study_heads(m, hl.PromptPairs(x, x + 1)), "hl.patch"),
    "study_lens": (lambda m, x: study_lens(m, x), "prediction_lens"),
    "ov_directions": (lambda m, x: hl.weights.ov_directions(m, 0, 0), "tokens"),
    "read_neurons": (lambda m, x: hl.weights.read_neurons(m, 0, [0]), "tokens"),
    "generate": (lambda m, x: m.generate(x, 2), "vectors|integers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_about_tokens_say_what_works_instead(name):
    call, words = REFUSED[name]
    with pytest.raises(HooklensError, match=words) as caught:
        call(vector_model(), vectors(0))
    assert "\n" not in str(caught.value)


def test_metrics_of_predictions_read_one_position():
    model = vector_model("biased embedding, two outputs")
    out = model(vectors(0, dtype=torch.float64)).detach()
    assert torch.equal(hl.prediction(model, pos=1, output=1)(out), out[:, 1, 1])
    assert hl.prediction(model, output=1).reads.tokens.tolist() == [[1]]
    target = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    error = (out[:, -1] - target).square().mean(1)
    assert torch.allclose(hl.squared_error(model, target=target)(out), -error)
    for bad, words in ((torch.zeros(3, 3), "d_out 2"), ([float("nan"), 1.0], "finite"), ("x", "one number")):
        with pytest.raises(HooklensError, match=words):
            hl.squared_error(model, target=bad)
    with pytest.raises(HooklensError, match="between 0 and 1"):
        hl.prediction(model, output=2)
    with pytest.raises(HooklensError, match="one per pair, got 3 and 2"):
        hl.squared_error(model, target=target, pos=[0, 1])
    at = hl.squared_error(model, target=target[0][None], pos=[0, 1, 2])(out)  # one target at three places
    assert torch.allclose(at, -(out[range(3), range(3)] - target[0]).square().mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patch", "ablate", "prediction_lens", "train_probe", "train_value_probe"])
def test_the_demos_of_methods_for_any_input_run_on_vectors(name):
    """Those of the others say what they need: `check_plugin` runs them all below."""
    result = find(name).demo()(vector_model("one layer of linear attention"))
    assert isinstance(result, Result) and not isinstance(result, Needs)


@pytest.mark.slow
def test_every_plugin_keeps_its_contract_on_vectors():
    kind = "one layer of linear attention"
    model = vector_model(kind)
    for info in available():
        if info.package == "hooklens":
            check_plugin(info.name, models={kind: model})


def test_the_demo_pairs_of_vectors_differ_in_the_middle():
    pairs = demo_pairs(vector_model(), 2, 5)
    assert (pairs.clean != pairs.corrupted).any(-1).tolist() == [[False, False, True, False, False]] * 2

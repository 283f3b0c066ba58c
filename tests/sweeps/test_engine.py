"""The engine gives the numbers of the plain loop: every kind of model, every site, every grid, every metric."""

from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, tiny, tiny_tokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loop import BYS, POINTS, has, looped
from model.zoo import ZOO, wrap_layers, zoo_model
from torch import Tensor

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.metrics import Reads
from hooklens.sweeps.execution import execute, make_bins
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.planning import Patch, plan
from hooklens.sweeps.site_patches import SitePatches
from hooklens.testing import tiny_model

CORRUPTED = torch.tensor([[1, 5, 2, 7, 3, 6], [4, 4, 9, 0, 10, 2], [8, 1, 1, 3, 2, 5]])
CLEAN = torch.tensor([[1, 5, 8, 7, 3, 6], [4, 4, 9, 0, 1, 2], [3, 1, 1, 3, 9, 5]])  # they part at 2, 4 and 0
SMALL = {"d_mlp": 6}  # fewer neurons, fewer passes of the plain loop


def own(logits: Tensor) -> Tensor:
    """A metric that says nothing about what it reads: all positions, all tokens."""
    weight = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view(logits[0].shape)
    return (logits.log_softmax(-1) * weight).sum((1, 2))


def agree(model, clean, corrupted, metric, site, by, *, value="clean", tolerance: float) -> hl.PatchSweep:
    """Run the engine, and hold it to the plain loop."""
    with hl.engine(verify=0, progress=False):
        sweep = hl.patch(model, clean, corrupted, metric, site=site, by=by, value=value)
    assert sweep.how == "engine"
    into, values = {
        "clean": (corrupted, clean),
        "corrupted": (clean, corrupted),
        "zero": (clean, torch.zeros_like),
        "mean": (clean, lambda act: act.mean(0, keepdim=True)),
    }[value]
    expected = looped(model, into, values, metric, site, by)
    torch.testing.assert_close(sweep.per_pair, expected, atol=tolerance, rtol=tolerance)
    return sweep


ZOO_SITES = [(name, site) for name in ZOO for model in [zoo_model(name)] for site in POINTS if has(model, site)]
# long rotary differs from other rotary models in what queries and keys become
ZOO_SITES = [(name, site) for name, site in ZOO_SITES if name != "phi3" or site in ("resid_pre", "q", "k")]


@pytest.mark.parametrize(("name", "site"), ZOO_SITES)
def test_every_site_of_every_kind_of_model(name, site):
    """Two of four questions each, so that every kind and every site meets all four."""
    model = zoo_model(name, dtype=torch.float64, **({} if ZOO[name].get("attn_only") else SMALL))
    one_read = hl.logit_diff(model, answer=[3, 1], wrong_answer=4)
    by_pos, whole = (next(by for by in BYS[site] if ("pos" in by) is wanted) for wanted in (True, False))
    if (list(ZOO).index(name) + list(POINTS).index(site)) % 2:
        agree(model, CLEAN[1:], CORRUPTED[1:], one_read, site, by_pos, tolerance=1e-9)
        agree(model, CLEAN, CORRUPTED, own, site, "layer", value="mean", tolerance=1e-9)
    else:
        agree(model, CLEAN[:2], CORRUPTED[:2], own, site, by_pos, value="corrupted", tolerance=1e-9)
        agree(model, CLEAN, CORRUPTED, own, site, whole, tolerance=1e-9)


NOWHERE = ("gpt_neox", "resid_mid")  # attention and MLP of its blocks run side by side
NUMBERED = [(i + j, name, site) for i, name in enumerate(FAMILIES) for j, site in enumerate(POINTS)]
FAMILY_SITES = [(name, site) for _, name, site in NUMBERED if (name, site) != NOWHERE]
A_QUARTER = [(name, site) for n, name, site in NUMBERED if n % 4 == 0 and (name, site) != NOWHERE]


def of_family(name: str, dtype: torch.dtype):
    """A model, clean and corrupted tokens, and a metric."""
    model = tiny(name, dtype)
    corrupted = tiny_tokens(2, 9)
    clean = corrupted.clone()
    clean[0, 3], clean[1, 6] = 40, 41
    return model, clean, corrupted, hl.logit_diff(model, answer=[7, 9], wrong_answer=[8, 10])


def in_family(name: str, site: str, by: str, dtype: torch.dtype, tolerance: float) -> None:
    agree(*of_family(name, dtype), site, by, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "site"), FAMILY_SITES)
def test_one_sweep_of_every_site_in_every_family(name, site):
    """.ci/run executes every shape annotation on these; with shapes the tests beside a plain loop take too long."""
    with hl.engine(verify=2, progress=False):
        sweep = hl.patch(*of_family(name, torch.float64), site=site)
    assert sweep.how == "engine" and sweep.largest_error < 1e-9 * float(sweep.per_pair.abs().max())


@pytest.mark.parametrize(("name", "site"), A_QUARTER)
def test_families_in_float32(name, site):
    in_family(name, site, BYS[site][0] if site != "post" else "layer x pos", torch.float32, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "site"), FAMILY_SITES)
def test_every_site_and_grid_of_every_family(name, site):
    for by in BYS[site]:
        if by != "layer x neuron x pos":
            in_family(name, site, by, torch.float32, 1e-4)
            in_family(name, site, by, torch.float64, 1e-9)


# -- metrics


@dataclass(frozen=True)
class Margin:
    """A user's own metric: it says what it reads, and nothing else."""

    reads: Reads

    def __call__(self, logits: Tensor) -> Tensor:
        at = self.reads.pos + logits.shape[1] * (self.reads.pos < 0)
        read = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[2]))
        if self.reads.tokens is not None:
            read = read.gather(2, self.reads.tokens[:, None].expand(-1, read.shape[1], -1))
        return self.on_read(read)

    def on_read(self, logits: Tensor) -> Tensor:
        return logits.amax((1, 2)) - logits.mean((1, 2))


ONE_READ = Margin(Reads(torch.tensor([[-1], [-2], [-1]]), torch.tensor([[1, 2], [3, 4], [5, 6]])))
TWO_READS = Margin(Reads(torch.tensor([[-1, 1], [0, 3], [-2, -4]]), None))


def scalar(logits: Tensor) -> Tensor:
    return logits[:, -1].softmax(-1).square().sum()


METRICS = {
    "logit_diff": lambda model: hl.logit_diff(model, answer=[1, 2, 3], wrong_answer=[4, 5, 6]),
    "logit_diff at another position": lambda model: hl.logit_diff(model, answer=1, wrong_answer=2, pos=-3),
    "logit_diff at a position a pair": lambda model: hl.logit_diff(model, answer=1, wrong_answer=2, pos=[2, -1, 4]),
    "prob": lambda model: hl.prob(model, answer=[1, 2, 3]),
    "log_prob": lambda model: hl.log_prob(model, answer=7, pos=3),
    "kl": lambda model: hl.kl(model, CLEAN),
    "kl at another position": lambda model: hl.kl(model, CLEAN, pos=2),
    "loss": lambda model: hl.loss(model, CLEAN),
    "own, reads and tokens": lambda model: ONE_READ,
    "own, two reads, all tokens": lambda model: TWO_READS,
    "function": lambda model: own,
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric(name):
    for kind, site in (("llama", "resid_pre"), ("llama", "k"), ("gemma2", "z"), ("bidirectional", "mlp_out")):
        model = zoo_model(kind, dtype=torch.float64, **SMALL | {"d_vocab_out": -1})
        agree(model, CLEAN, CORRUPTED, METRICS[name](model), site, "layer x pos", tolerance=1e-9)


def test_a_function_that_returns_one_number_is_asked_pair_by_pair():
    model = zoo_model("gpt2", dtype=torch.float64)
    each = lambda logits: torch.stack([scalar(one[None]) for one in logits])  # noqa: E731
    got = hl.patch(model, CLEAN, CORRUPTED, scalar, site="z").per_pair
    torch.testing.assert_close(got, looped(model, CORRUPTED, CLEAN, each, "z", "layer x head"), atol=1e-9, rtol=1e-9)
    single = hl.patch(model, CLEAN[:1], CORRUPTED[:1], lambda logits: float(scalar(logits)), site="z").per_pair
    torch.testing.assert_close(single, got[:1], atol=1e-9, rtol=1e-9)


def test_a_metric_may_write_into_the_logits_it_gets():
    def greedy(logits: Tensor) -> Tensor:
        return own(logits.mul_(2))

    model = zoo_model("gpt2", dtype=torch.float64)
    got = hl.patch(model, CLEAN, CORRUPTED, greedy, site="z").per_pair
    expected = looped(model, CORRUPTED, CLEAN, lambda logits: own(2 * logits), "z", "layer x head")
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


# -- values


@pytest.mark.parametrize("site", ["resid_pre", "z", "post", "pattern", "k"])
def test_every_value(site):
    model = zoo_model("qwen3", dtype=torch.float64, **SMALL)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    by, name = BYS[site][0], POINTS[site]
    agree(model, CLEAN, CORRUPTED, metric, site, by, value="zero", tolerance=1e-9)
    agree(model, CLEAN, CORRUPTED, metric, site, by, value="mean", tolerance=1e-9)
    cache = model.run_with_cache(CORRUPTED, names=[f"blocks.{i}.{name}" for i in range(2)])[1]
    reference = torch.cat((CORRUPTED, CLEAN))
    mean = lambda act: act.mean(0, keepdim=True)  # noqa: E731
    means = {p: mean(a) for p, a in model.run_with_cache(reference, names=list(cache))[1].items()}
    given_values = {
        "cache": (cache, CORRUPTED),
        "tensor": (torch.tensor(0.3, dtype=torch.float64), lambda act: torch.full_like(act, 0.3)),
        "whole tensor": (cache[f"blocks.1.{name}"], lambda act: cache[f"blocks.1.{name}"]),
        "function": (lambda act, name: act * 2, lambda act: act * 2),
    }
    for value, same in given_values.values():
        got = hl.patch(model, CLEAN, CORRUPTED, metric, site=site, by=by, value=value).per_pair
        torch.testing.assert_close(got, looped(model, CLEAN, same, metric, site, by), atol=1e-9, rtol=1e-9)
    got = hl.patch(model, CLEAN, CORRUPTED, metric, site=site, by=by, value=hl.Mean(reference)).per_pair
    again = hl.patch(model, CLEAN, CORRUPTED, metric, site=site, by=by, value=means).per_pair
    torch.testing.assert_close(got, again, atol=1e-12, rtol=1e-12)


def test_a_pattern_may_look_ahead():
    """A given pattern need not be causal: what it reads at later positions is this layer's values, which stand."""
    model = zoo_model("gpt2", dtype=torch.float64)
    flat = lambda act, name=None: torch.full_like(act, 1 / act.shape[-1])  # noqa: E731
    got = hl.patch(model, CLEAN, CORRUPTED, own, site="pattern", by="layer x head x pos", value=flat).per_pair
    expected = looped(model, CLEAN, flat, own, "pattern", "layer x head x pos")
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_prompts_of_different_length_match_at_their_ends():
    model = zoo_model("llama", dtype=torch.float64)
    clean, corrupted = torch.tensor([[1, 2, 3, 9, 4, 5]]), torch.tensor([[1, 2, 8, 4, 5]])
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    sweep = hl.patch(model, clean, corrupted, metric, site="z")
    names = [f"blocks.{i}.attn.hook_z" for i in range(2)]
    mine, theirs = (model.run_with_cache(tokens, names=names)[1] for tokens in (corrupted, clean))
    for layer, name in enumerate(names):
        written = mine[name].clone()
        written[:, :2], written[:, -2:] = theirs[name][:, :2], theirs[name][:, -2:]
        for head in range(model.cfg.n_heads):

            def write(act, hook, head=head, written=written):
                act[:, :, head] = written[:, :, head]
                return act

            expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, write)]))
            assert abs(float(sweep.values[layer, head] - expected.detach())) < 1e-9
    assert abs(sweep.clean - float(metric(model(clean)).detach())) < 1e-9


def test_groups_of_pairs_come_back_in_the_order_given():
    """Five pairs of three lengths: each value is what the pair gives alone."""
    model = zoo_model("llama", dtype=torch.float64)
    clean = [[1, 2, 3, 4], [5, 6, 7], [1, 3, 3, 4], [2, 2, 2, 2, 2], [5, 1, 7]]
    corrupted = [[1, 2, 8, 4], [5, 9, 7], [1, 8, 3, 4], [2, 2, 9, 2, 2], [5, 9, 9, 7]]
    right, wrong = [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]
    whole = hl.patch(
        model, clean, corrupted, hl.logit_diff(model, answer=right, wrong_answer=wrong), site="z", by="layer x head"
    )
    for i in range(5):
        metric = hl.logit_diff(model, answer=right[i], wrong_answer=wrong[i])
        one = hl.patch(model, clean[i], corrupted[i], metric, site="z")
        torch.testing.assert_close(whole.per_pair[i], one.per_pair[0], atol=1e-9, rtol=1e-9)
        assert abs(float(whole.clean_per_pair[i]) - one.clean) < 1e-9
        assert abs(float(whole.corrupted_per_pair[i]) - one.corrupted) < 1e-9


# -- patches, memory, what is left out


@pytest.mark.parametrize("site", ["resid_post", "z", "pattern", "post", "v"])
def test_patches_of_ones_own(site):
    """Whole layers, positions and heads mixed, twice the same, in any order."""
    model = zoo_model("gemma2", dtype=torch.float64, **SMALL)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    kind = {"z": "head", "pattern": "head", "v": "head", "post": "neuron"}.get(site)
    patches = [Patch(1, pos=5), Patch(0), Patch(1, pos=2), Patch(1), Patch(0, pos=5), Patch(1, pos=5)]
    patches += [] if kind is None else [Patch(0, **{kind: 1}), Patch(1, pos=3, **{kind: 0})]
    made = SitePatches(plan(model, CORRUPTED, site, CLEAN, patches=patches))
    got = execute(made, metric)
    with hl.engine(plain=True):
        expected = execute(made, metric)
    assert (got.how, expected.how) == ("engine", "plain loop: asked for")
    torch.testing.assert_close(got.values, expected.values, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("metric", [own, ONE_READ, "logit_diff"])
@pytest.mark.parametrize("site", ["resid_pre", "z", "post"])
def test_memory_changes_no_number(site, metric):
    """From one row at a time to everything at once; also where a single patch is larger than the budget."""
    model = zoo_model("llama", dtype=torch.float64, **SMALL)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4) if metric == "logit_diff" else metric
    by = BYS[site][-1]
    expected = looped(model, CORRUPTED, CLEAN, metric, site, by)
    for memory in (0, 20_000):  # the default is that of every other test
        with hl.engine(memory=memory, verify=0):
            got = hl.patch(model, CLEAN, CORRUPTED, metric, site=site, by=by).per_pair
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_bins_hold_whole_patches_and_respect_the_budget():
    model = tiny_model()
    made = SitePatches(plan(model, CORRUPTED, "resid_pre", CLEAN))
    items = made.live(Reader(model, own, made.stream))
    for rows in (1, 10, 30, 1000):
        bins = make_bins(made, items, rows)
        assert sorted((x.patch, x.pair) for one in bins for x in one) == [(x.patch, x.pair) for x in items]
        of = [{x.patch for x in one} for one in bins]
        assert sum(map(len, of)) == len(set().union(*of))
        for one in bins:
            weights = [sum(6 - x.start for x in one if x.patch == p) for p in {x.patch for x in one}]
            assert sum(weights) <= rows + max(weights)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_what_no_pair_differs_in_is_no_question_and_a_pair_that_does_not_differ_runs_nothing(name):
    model = zoo_model(name)
    with pytest.raises(InputError, match="the same tokens"):
        hl.patch(model, CLEAN, CLEAN, own)
    half = torch.cat((CLEAN[:1], CORRUPTED[1:2]))
    for site in POINTS if name == "gpt2" else ("resid_pre", "z", "k", "post"):
        if has(model, site):
            sweep = hl.patch(model, CLEAN[:2], half, own, site=site)
            assert torch.equal(sweep.clean_per_pair[0], sweep.corrupted_per_pair[0])
            assert bool((sweep.per_pair[0] == sweep.corrupted_per_pair[0]).all())  # to the last bit: nothing was run


@pytest.mark.parametrize("name", ZOO)
def test_patching_everything_gives_the_clean_run(name):
    """The whole stream entering layer 0, or every position of it at the last layer."""
    model = zoo_model(name, dtype=torch.float64)
    for site, layer in (("resid_pre", 0), ("resid_pre", -1), ("resid_post", -1)):
        sweep = hl.patch(model, CLEAN, CORRUPTED, own, site=site, by="layer")
        torch.testing.assert_close(sweep.per_pair[:, layer], sweep.clean_per_pair, atol=1e-9, rtol=1e-9)


@st.composite
def pairs(draw):
    n_pairs, n_pos = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    tokens = st.lists(st.lists(st.integers(0, 10), min_size=n_pos, max_size=n_pos), min_size=n_pairs, max_size=n_pairs)
    corrupted = torch.tensor(draw(tokens))
    other = torch.tensor(draw(tokens))
    kept = torch.rand(corrupted.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return torch.where(kept < draw(st.floats(0, 1)), other, corrupted), corrupted


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    both=pairs(),
    site=st.sampled_from(list(POINTS)),
    name=st.sampled_from(["gpt2", "gemma2", "bidirectional", "linear_gqa"]),
    at=st.integers(-5, -1),
    data=st.data(),
)
def test_what_is_left_out_could_not_matter(both, site, name, at, data):
    """Any prompts, site, grid and position read: the patches that were not run have the base run's value exactly."""
    clean, corrupted = both
    assume(not torch.equal(clean, corrupted))  # which is refused
    model = zoo_model(name, dtype=torch.float64, d_mlp=3)
    by = data.draw(st.sampled_from([*BYS[site], "layer", "layer x pos"]))
    metric = hl.logit_diff(model, answer=1, wrong_answer=2, pos=max(at, -clean.shape[1]))
    agree(model, clean, corrupted, metric, site, by, tolerance=1e-9)


def test_the_share_that_was_computed():
    model = tiny_model()
    metric = hl.logit_diff(model, answer=1, wrong_answer=2)
    sweep = hl.patch(model, CLEAN[:1], CORRUPTED[:1], metric)
    # Of 2 layers x 6 positions: entering layer 0 only position 2 differs, entering layer 1 those from 2 on.
    assert sweep.computed == pytest.approx((2 * 4 + 1 * (4 + 3 + 2 + 1)) / (12 * 2 * 6))


# -- other numbers, other layers


def test_bfloat16_runs():
    model = zoo_model("llama", dtype=torch.bfloat16)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
    with hl.engine(plain=True):
        plain = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
    assert sweep.per_pair.dtype == torch.float32  # means over pairs are not taken in bfloat16
    torch.testing.assert_close(sweep.per_pair, plain.per_pair, atol=0.1, rtol=0.05)
    sweep.interval(), sweep.table()


WRAPPED = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.in_", "mlp.out", "unembed"]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_linear_layers(wrapped):
    model = wrap_layers(zoo_model("gpt2", dtype=torch.float64, **SMALL), wrapped)
    metric = hl.logit_diff(model, answer=[3, 1, 2], wrong_answer=4)
    for site in list(POINTS)[WRAPPED.index(wrapped) % 2 :: 2]:
        agree(model, CLEAN, CORRUPTED, metric, site, BYS[site][0], tolerance=1e-9)


def test_a_weight_edited_between_sweeps_is_seen():
    model = zoo_model("llama", d_model=64, d_head=16)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    before = hl.patch(model, CLEAN, CORRUPTED, metric, site="z").per_pair
    with hl.packed_linears(enabled=True):
        hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
        with torch.no_grad():
            model.blocks[1].mlp.out.weight *= 3
        after = agree(model, CLEAN, CORRUPTED, metric, "z", "layer x head", tolerance=1e-4).per_pair
    assert float((before - after).abs().max()) > 1e-3
    model.blocks[1].mlp.out.weight.data *= 2  # past autograd's version counter
    agree(model, CLEAN, CORRUPTED, metric, "z", "layer x head", tolerance=1e-4)

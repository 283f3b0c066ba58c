"""Path patching by the engine gives the numbers of hooked forward passes, in every kind of model and semantics."""

import copy
import re

import pytest
import torch
from families import FAMILIES, tiny, tiny_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from model.zoo import ZOO, zoo_model
from path_loop import HELD, change_of, reference
from torch import nn

import hooklens as hl
from hooklens.core.component import Component
from hooklens.core.errors import InputError
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import run_edges
from hooklens.plugins.patching.path import Fixed, path_patch
from hooklens.sweeps.execution import execute
from hooklens.sweeps.nodes import At, read_heads, read_receivers, read_senders
from hooklens.sweeps.path_patches import PathPatches
from hooklens.sweeps.paths import EDGES, plan_paths, sent
from hooklens.testing import induction_model, or_gate, tiny_model

CORRUPTED = torch.tensor([[1, 5, 2, 7, 3, 6], [4, 4, 9, 0, 10, 2], [8, 1, 1, 3, 2, 5]])
CLEAN = torch.tensor([[1, 5, 8, 7, 3, 6], [4, 4, 9, 0, 1, 2], [3, 1, 1, 3, 9, 5]])  # they part at 2, 4 and 0
STREAMED = [name for name in ZOO if ZOO[name].get("block") != "post"]
QUICK = {"gpt2", "llama", "neox", "gemma2"}  # the others are as exact, and slow with shapes
KINDS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STREAMED]
ATTN_ONLY = [name for name in STREAMED if ZOO[name].get("attn_only")]


def own(logits):
    """A metric that says nothing about what it reads: all positions, all tokens."""
    weight = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view(logits[0].shape)
    return (logits.log_softmax(-1) * weight).sum((1, 2))


def by(semantics, *rows, receivers="final", **more):
    return path_patch(*rows, receivers=HELD[semantics](receivers), **more)


def senders_of(model):
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    found = [("head", layer, head) for layer in layers for head in heads]
    return found + ([] if model.cfg.attn_only else [("mlp", layer) for layer in layers]) + [("embed",)]


def receiver_sets(model, semantics):
    """One of each kind; several in one layer; several in several layers."""
    last, mlp = model.cfg.n_layers - 1, not model.cfg.attn_only
    sets = [[("final",)], [("q", last, 1)], [("k", last, 0), ("v", last, 0)]]
    if last:
        lower = [("q", 0, 0), ("mlp_in", 0)] if mlp else [("q", 0, 0), ("v", 0, 1)]
        sets += [[("q", last - 1, 0)], [*lower, ("q", last, 0), ("v", last, 1)]]
        sets += [[("mlp_in", last - 1), ("mlp_in", last)], [("mlp_in", 0), ("k", last, 1)]] if mlp else []
    if semantics == "edges":
        sets += [[*sets[-1], ("q", last, 0), ("final",)]]
    return sets


def agree(model, clean, corrupted, metric, semantics, receivers, *, value="clean", tolerance=1e-9):
    """Run the engine with all senders, and hold it to hooked forward passes."""
    asked = [one if len(one) > 1 else one[0] for one in receivers]
    with hl.engine(verify=1, progress=False):
        every = ["heads", *_mlps(model), "embed"]
        sweep = by(semantics, model, clean, corrupted, metric, receivers=asked, senders=every, value=value)
    assert sweep.how == "engine" and not sweep.largest_error > tolerance
    base, new = (corrupted, clean) if value == "clean" else (clean, corrupted)
    for i, sender in enumerate(senders_of(model)):
        expected = reference(model, base, new, metric, semantics, sender, receivers)
        torch.testing.assert_close(sweep.per_pair[:, i], expected, atol=tolerance, rtol=tolerance)
    return sweep


def _mlps(model):
    return [] if model.cfg.attn_only else ["mlps"]


@pytest.mark.parametrize("semantics", HELD)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model(name, semantics):
    """Every other set of receivers, so that kinds and semantics together meet all; the slow tests take every set."""
    model = zoo_model(name, dtype=torch.float64)
    read = hl.logit_diff(model, answer=[3, 1, 2], wrong_answer=4)
    first = (STREAMED.index(name) + list(HELD).index(semantics)) % 2
    for i, receivers in enumerate(receiver_sets(model, semantics)[first::2]):
        agree(model, CLEAN, CORRUPTED, own if i % 2 else read, semantics, receivers)


def test_queries_read_before_the_original_context_ends_turn_as_their_whole_row_does():
    model = zoo_model("phi3", dtype=torch.float64)  # rows of 6 tokens, an original context of 3
    early = hl.logit_diff(model, answer=[3, 1, 2], wrong_answer=4, pos=2)
    agree(model, CLEAN, CORRUPTED, early, "edges", [("q", 1, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("semantics", HELD)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_float32(name, semantics):
    model = tiny(name)
    corrupted = tiny_tokens(2, 9)
    clean = corrupted.clone()
    clean[0, 3], clean[1, 6] = 40, 41
    metric = hl.logit_diff(model, answer=[7, 9], wrong_answer=[8, 10])
    receivers = receiver_sets(model, semantics)[4]
    agree(model, clean, corrupted, metric, semantics, receivers, value="corrupted", tolerance=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("semantics", HELD)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_and_every_set_of_receivers(name, semantics):
    model = tiny(name, torch.float64)
    corrupted = tiny_tokens(2, 9)
    clean = corrupted.clone()
    clean[0, 3], clean[1, 6] = 40, 41
    metric = hl.logit_diff(model, answer=[7, 9], wrong_answer=[8, 10])
    for i, receivers in enumerate(receiver_sets(model, semantics)):
        agree(model, clean, corrupted, own if i % 2 else metric, semantics, receivers)


# -- positions

SEND, READ = [3, 4, 1], [5, 4, 2]  # one a pair; nothing is new there in the first two pairs


@pytest.mark.parametrize("semantics", HELD)
@pytest.mark.parametrize(
    "name", ["llama", "neox", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "gpt2"))]
)
@pytest.mark.parametrize(("send", "read"), [(SEND, torch.tensor(READ)), (-2, None)])
def test_senders_and_receivers_at_positions_are_the_loop(name, semantics, send, read):
    model = zoo_model(name, dtype=torch.float64)
    metric = hl.logit_diff(model, answer=[3, 1, 2], wrong_answer=4)
    senders = ["heads", *_mlps(model), "embed"]
    ends = [None if at is None else (torch.as_tensor(at) % 6).expand(3).tolist() for at in (send, read)]
    for i, receivers in enumerate(receiver_sets(model, semantics)[-2:]):
        asked = [one if len(one) > 1 else one[0] for one in receivers]
        with hl.engine(verify=2, progress=False):
            sweep = by(
                semantics,
                model,
                CLEAN,
                CORRUPTED,
                own if i % 2 else metric,
                receivers=asked if read is None else At(asked, read, "R"),
                senders=senders if send is None else At(senders, send, "S"),
            )
        assert sweep.how == "engine" and not sweep.largest_error > 1e-9
        for j, sender in enumerate(senders_of(model)):
            this = own if i % 2 else metric
            expected = reference(model, CORRUPTED, CLEAN, this, semantics, sender, receivers, *ends)
            torch.testing.assert_close(sweep.per_pair[:, j], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("semantics", HELD)
def test_a_receiver_at_several_positions_and_heads_at_different_ones(semantics):
    """Receivers of one kind that read at other positions are patched together, each at its own."""
    model = zoo_model("gpt2", dtype=torch.float64)
    metric = hl.logit_diff(model, answer=[3, 1, 2], wrong_answer=4)
    last = model.cfg.n_layers - 1

    def run(receivers):
        return by(semantics, model, CLEAN, CORRUPTED, metric, receivers=receivers, senders="heads")

    every = run([At(("v", last, 0), pos) for pos in range(6)])
    torch.testing.assert_close(every.per_pair, run(("v", last, 0)).per_pair, atol=1e-9, rtol=1e-9)
    both = run([At(("v", last, 0), 2), ("v", last, 1)])
    assert both.receivers == [f"L{last}H0.v@2", f"L{last}H1.v"]
    with hl.engine(plain=True):
        plain = run([At(("v", last, 0), 2), ("v", last, 1)])
    torch.testing.assert_close(both.per_pair, plain.per_pair, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(both.per_pair, run(("v", last, 1)).per_pair, atol=1e-6)


def test_positions_follow_their_pairs_through_prompts_of_two_lengths():
    model = zoo_model("gpt2", dtype=torch.float64)
    clean = [[1, 5, 8, 7, 3, 6], [4, 4, 9, 0, 1], [3, 1, 1, 3, 9, 5]]
    corrupted = [[1, 5, 2, 7, 3, 6], [4, 4, 9, 0, 10], [8, 1, 1, 3, 2, 5]]
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)

    def run(of, send, read):
        rows = ([side[i] for i in of] for side in (clean, corrupted))
        places = At("heads", send, "S2"), At("final", read, "END")
        return path_patch(model, *rows, metric, senders=places[0], receivers=places[1])

    together = run(range(3), [2, 4, -2], -1)
    for pair, send in enumerate((2, 4, 4)):
        torch.testing.assert_close(together.per_pair[pair], run([pair], send, -1).per_pair[0])
    assert together.senders[0] == "L0H0@S2" and together.receivers == ["final@END"]
    assert (together.moved.abs().amax(1) > 1e-6).tolist() == [False, True, False]  # only where S2 is END does it tell


def test_one_sender_at_two_positions_is_drawn_twice():
    model = zoo_model("gpt2")
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    both = path_patch(model, CLEAN, CORRUPTED, metric, senders=[At("heads", 4, "S2"), At("heads", -1, "END")])
    (drawn,) = both.figure().data
    labels = drawn.x if drawn.x is not None else both.figure().layout.xaxis.ticktext
    assert drawn.type == "bar" and {"L0H0@S2", "L0H0@END"} <= set(labels)
    assert path_patch(model, CLEAN, CORRUPTED, metric, senders=At("heads", 4)).figure().data[0].type == "heatmap"


def test_positions_that_do_not_exist_are_refused():
    model = zoo_model("gpt2")
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)

    def run(pos, **more):
        return path_patch(model, CLEAN, CORRUPTED, metric, receivers=At("final", pos), **more)

    for pos, said in (
        (6, "position 6 was asked for (6) in a prompt of 6 tokens"),
        ([1, 2], "2 positions (1..2) were given for 3 pairs"),
        (0.5, "a whole number or one a pair"),
        ("END", "a whole number or one a pair"),
        (None, "a whole number or one a pair"),
    ):
        with pytest.raises(hl.HooklensError, match=re.escape(said)):
            run(pos)
    with pytest.raises(hl.HooklensError, match="second position"):
        run(1, senders=At(At("heads", 1), 2))


# -- identities


@pytest.mark.parametrize("name", STREAMED)
def test_with_all_receivers_the_edges_are_activation_patching(name):
    model = zoo_model(name, dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    sweep = path_patch(model, CLEAN, CORRUPTED, metric, receivers="all", senders=["heads", *_mlps(model), "embed"])
    n_layers, n_heads = sweep.shape
    z = hl.patch(model, CLEAN, CORRUPTED, metric, site="z").per_pair.flatten(1)
    embed = hl.patch(model, CLEAN, CORRUPTED, metric, site="resid_pre", by="layer").per_pair[:, :1]
    parts = [z, embed]
    if not model.cfg.attn_only:
        parts.insert(1, hl.patch(model, CLEAN, CORRUPTED, metric, site="mlp_out", by="layer").per_pair)
    torch.testing.assert_close(sweep.per_pair, torch.cat(parts, 1), atol=1e-9, rtol=1e-9)
    assert n_layers * n_heads == z.shape[1]


def test_with_all_receivers_fixed_they_are_not():
    """A receiver holds what the sender alone changed, and does not see what other receivers made of it."""
    model = zoo_model("gpt2", dtype=torch.float64, n_layers=3)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    everything = [r for r in read_receivers(model, "all") if r.kind != "final"]
    whole = hl.patch(model, CLEAN, CORRUPTED, metric, site="z").per_pair.flatten(1)
    for held in (Fixed(everything), Fixed(everything, mlps="frozen")):
        found = path_patch(model, CLEAN, CORRUPTED, metric, receivers=held, senders="heads").per_pair
        assert float((found - whole).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["llama", "neox", "gemma2", "attn_only"])
def test_with_one_receiver_and_frozen_mlps_fixed_is_edges(name):
    model = zoo_model(name, dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    for receiver in ("final", ("q", 1, 1), ("v", 1, 0)):
        ways = receiver, Fixed(receiver, mlps="frozen")
        one, other = (path_patch(model, CLEAN, CORRUPTED, metric, receivers=way) for way in ways)
        torch.testing.assert_close(one.per_pair, other.per_pair, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ATTN_ONLY)
def test_without_mlps_there_is_nothing_to_recompute(name):
    model = zoo_model(name, dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    for receiver in ("final", ("q", 1, 1)):
        ways = Fixed(receiver), Fixed(receiver, mlps="frozen")
        one, other = (path_patch(model, CLEAN, CORRUPTED, metric, receivers=way) for way in ways)
        torch.testing.assert_close(one.per_pair, other.per_pair, atol=1e-12, rtol=1e-12)


def test_to_the_logits_of_a_model_without_norms_an_edge_is_a_product():
    model = zoo_model("no_norm", dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    sweep = path_patch(model, CLEAN, CORRUPTED, metric)
    direction = model.W_U[:, 3] - model.W_U[:, 4]
    for i, sender in enumerate(senders_of(model)[:-1]):
        expected = change_of(model, CORRUPTED, CLEAN, sender)[:, -1] @ direction
        torch.testing.assert_close(sweep.moved[:, i], expected.detach(), atol=1e-9, rtol=1e-9)
    whole = sweep.clean_per_pair - sweep.corrupted_per_pair
    embed = path_patch(model, CLEAN, CORRUPTED, metric, senders="embed").moved[:, 0]
    torch.testing.assert_close(sweep.moved.sum(1) + embed, whole, atol=1e-9, rtol=1e-9)  # a sum without a rest


def test_a_sender_that_is_all_of_the_stream_brings_the_other_runs_query():
    model = zoo_model("llama", dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    for head in range(4):
        path = path_patch(model, CLEAN, CORRUPTED, metric, senders="embed", receivers=("q", 0, head))
        whole = hl.patch(model, CLEAN, CORRUPTED, metric, site="q").per_pair[:, 0, head]
        torch.testing.assert_close(path.per_pair[:, 0], whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("semantics", HELD)
def test_the_same_prompt_twice_has_no_effect_and_is_no_question_alone(semantics):
    model = zoo_model("gemma3")
    half = torch.cat((CLEAN[:1], CORRUPTED[1:2]))
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    for receivers in ("final", [("q", 1, 0), ("v", 1, 0)]):
        with pytest.raises(InputError, match="the same tokens"):
            by(semantics, model, CLEAN, CLEAN, metric, receivers=receivers)
        sweep = by(semantics, model, CLEAN[:2], half, metric, receivers=receivers)
        assert bool((sweep.per_pair[0] == sweep.corrupted_per_pair[0]).all())


@pytest.mark.parametrize("semantics", HELD)
def test_a_sender_after_every_receiver_has_no_effect(semantics):
    model = zoo_model("gpt2", dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    sweep = by(semantics, model, CLEAN, CORRUPTED, metric, receivers=[("q", 1, 0), ("mlp", 0)])
    names = [name for name, reaches in zip(sweep.senders, sweep.reaches, strict=True) if reaches]
    assert names == ["L0H0", "L0H1", "MLP0"]  # the MLP reads the heads of its layer, the query only what is below
    assert bool((sweep.moved[:, ~sweep.reaches] == 0).all()) and bool((sweep.moved[:, sweep.reaches] != 0).all())
    assert {row[0] for row in sweep.table(None).rows} == set(names)
    assert int(sweep.grid(sweep.effect).isfinite().sum()) == 3


def test_in_a_parallel_block_the_mlp_does_not_read_its_own_heads():
    model = zoo_model("neox", dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    sweep = path_patch(model, CLEAN, CORRUPTED, metric, receivers="MLP1")
    assert sweep.reaches.tolist() == [True, True, False, False, True, False]


# -- known answers


def test_induction_goes_through_the_keys():
    """The first token differs: the previous-token head tells the induction head's keys, and nobody else anything."""
    model = induction_model(dtype=torch.float64)
    clean, corrupted = torch.tensor([[3, 1, 4, 9, 3]]), torch.tensor([[5, 1, 4, 9, 3]])
    metric = hl.logit_diff(model, answer=1, wrong_answer=4)
    for semantics in HELD:
        by_keys = by(semantics, model, clean, corrupted, metric, receivers=("k", 1, 1), senders="heads")
        torch.testing.assert_close(by_keys.share, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
        for part in ("L1H1.q", "L1H1.v", "L1H0.k"):
            other = by(semantics, model, clean, corrupted, metric, receivers=part, senders="heads")
            assert not bool(other.effect.any())
    direct = path_patch(model, clean, corrupted, metric, senders="heads")
    torch.testing.assert_close(direct.share, torch.tensor([0, 0, 0, 1.0], dtype=torch.float64))


def test_redundant_heads_hide_each_other_on_the_path_too():
    """Either head of the gate is enough, so that one alone changes nothing that the MLP says."""
    gate = or_gate(dtype=torch.float64)
    with torch.no_grad():
        gate.blocks[0].attn.b_V.zero_()
        gate.W_E[1, 1] = 0.0
        gate.blocks[0].attn.W_V[:, 0, 0] = 1.0
        gate.W_E[1, 0] = 1.0
        gate.blocks[0].mlp.W_in[0, 0] = -1.0
    logit = lambda logits: logits[:, -1, 1]  # noqa: E731
    on, off = torch.tensor([[1]]), torch.tensor([[0]])
    # into the run in which the stream says 0 each head alone turns the gate on: 1 - relu(1 - 1)
    sweep = path_patch(gate, on, off, logit, receivers="MLP0", senders="heads")
    assert sweep.corrupted == 0.0 and sweep.values.tolist() == [1.0, 1.0]
    back = path_patch(gate, on, off, logit, receivers="MLP0", senders="heads", value="corrupted")
    assert back.clean == 1.0 and back.values.tolist() == [1.0, 1.0]


# -- the engine


@given(
    n_pos=st.integers(2, 7),
    at=st.integers(0, 6),
    seed=st.integers(0, 5),
    picks=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
    memory=st.sampled_from([1, 20_000, 2**28]),
    pos=st.integers(0, 6),
)
@settings(max_examples=12, deadline=None)
def test_any_receivers_prompts_and_memory(n_pos, at, seed, picks, memory, pos):
    model = zoo_model("llama", dtype=torch.float64, n_layers=3)
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(11, (2, n_pos), generator=generator)
    corrupted = clean.clone()
    corrupted[0, at % n_pos] = (clean[0, at % n_pos] + 1) % 11
    corrupted[1, -1] = (clean[1, -1] + 1) % 11
    every = read_receivers(model, "all")
    receivers = list(dict.fromkeys(every[pick % len(every)] for pick in picks))
    metric = hl.logit_diff(model, answer=3, wrong_answer=4, pos=pos % n_pos)
    senders = read_senders(model, ["heads", "mlps", "embed"])
    patches = PathPatches(plan_paths(model, corrupted, clean, senders, receivers, EDGES))
    with hl.engine(memory=memory, progress=False, verify=0):
        found = execute(patches, metric).values
    with hl.engine(plain=True, progress=False):
        plain = execute(patches, metric).values
    torch.testing.assert_close(found, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("semantics", HELD)
def test_every_metric(semantics):
    model = zoo_model("llama", dtype=torch.float64)
    metrics = [
        hl.prob(model, answer=[1, 2, 3]),
        hl.logit_diff(model, answer=1, wrong_answer=2, pos=[2, -1, 4]),
        hl.kl(model, CLEAN, pos=2),
        hl.loss(model, CLEAN),
        lambda logits: logits[:, 3, 1],
    ]
    sets = [[("q", 1, 0)], [("q", 0, 1), ("v", 1, 0)]]
    for i, metric in enumerate(metrics):
        agree(model, CLEAN, CORRUPTED, metric, semantics, sets[(i + list(HELD).index(semantics)) % 2])


def test_a_metric_that_reads_before_the_change_has_no_effect():
    model = zoo_model("gpt2", dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4, pos=1)
    sweep = path_patch(model, CLEAN[:2], CORRUPTED[:2], metric, receivers="all")
    assert bool((sweep.moved == 0).all()) and sweep.computed == 0.0


@pytest.mark.parametrize("semantics", HELD)
def test_where_the_engine_must_not_be_used_the_loop_is(semantics):
    model = zoo_model("gpt2", dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    for receivers in ("final", [("q", 1, 0), ("mlp", 1)]):
        fast = by(semantics, model, CLEAN, CORRUPTED, metric, receivers=receivers)
        with hl.engine(plain=True):
            slow = by(semantics, model, CLEAN, CORRUPTED, metric, receivers=receivers)
        assert fast.how == "engine" and slow.how == "plain loop: asked for"
        torch.testing.assert_close(fast.per_pair, slow.per_pair, atol=1e-9, rtol=1e-9)
        with model.hooks([("mlp_out", lambda act, hook: act * 1.5)]):
            other = by(semantics, model, CLEAN, CORRUPTED, metric, receivers=receivers)
            names = [("head", 0, 1), ("mlp", 0)]
            asked = [("final",)] if receivers == "final" else [("q", 1, 0), ("mlp_in", 1)]
            expected = [reference(model, CORRUPTED, CLEAN, metric, semantics, s, asked) for s in names]
        assert other.how == "plain loop: other hooks are active on this model"
        if semantics != "frozen":  # what is frozen there is frozen after the other hook
            for name, value in zip(("L0H1", "MLP0"), expected, strict=True):
                torch.testing.assert_close(other.per_pair[:, other.senders.index(name)], value, atol=1e-9, rtol=1e-9)


class Doubled(nn.Module):
    """A wrapped linear layer, as adapters make them: twice the layer plus a little of another."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.weight = inner, inner.weight
        self.bias = None
        more = torch.randn(inner.weight.shape, generator=torch.Generator().manual_seed(3), dtype=inner.weight.dtype)
        self.more = nn.Parameter(0.3 * more)

    def forward(self, x):
        return 2 * self.inner(x) + x @ self.more.T


@pytest.mark.parametrize("semantics", HELD)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_layers_that_hold_an_adapter(name, semantics):
    model = copy.deepcopy(zoo_model(name, dtype=torch.float64))
    for block in model.blocks:
        for part in ("q", "k", "v", "o"):
            setattr(block.attn, part, Doubled(getattr(block.attn, part)))
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    agree(model, CLEAN, CORRUPTED, metric, semantics, [("q", 0, 1), ("q", 1, 0), ("v", 1, 1)])
    agree(model, CLEAN, CORRUPTED, metric, semantics, [("q", 1, 0)])


def test_pairs_of_several_lengths_come_back_in_order():
    model = zoo_model("llama", dtype=torch.float64)
    clean = [[1, 2, 3, 4], [5, 6, 7], [1, 3, 3, 4]]
    corrupted = [[1, 2, 8, 4], [5, 9, 7], [1, 8, 3, 4]]
    metric = hl.logit_diff(model, answer=[1, 2, 3], wrong_answer=[6, 7, 8])
    whole = path_patch(model, clean, corrupted, metric, receivers=("q", 1, 0))
    for i in range(3):
        alone = hl.logit_diff(model, answer=[i + 1], wrong_answer=[i + 6])
        one = path_patch(model, clean[i], corrupted[i], alone, receivers=("q", 1, 0))
        torch.testing.assert_close(whole.per_pair[i], one.per_pair[0], atol=1e-9, rtol=1e-9)


def test_a_turned_sender_sends_as_much_elsewhere():
    model = zoo_model("gpt2", dtype=torch.float64)
    senders = [Component("head", 0, 1, turned=turned) for turned in (None, 5, 5, 6)]
    plan = plan_paths(model, CORRUPTED, CLEAN, senders, read_receivers(model, "final"), EDGES)
    pair, pos = torch.arange(18) // 6, torch.arange(18) % 6
    plain, five, again, six = (sent(plan, sender, pair, pos) for sender in senders)
    assert torch.equal(five, again) and not torch.equal(five, six) and not torch.equal(plain, five)
    torch.testing.assert_close(five @ five.T, plain @ plain.T, atol=1e-12, rtol=1e-12)  # lengths and angles stay


# -- what is refused


def refused(match, **changes):
    model = changes.pop("model", None) or tiny_model()
    arguments = {"receivers": "final"} | changes
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    with pytest.raises(hl.HooklensError, match=match):
        path_patch(model, [[1, 2, 3]], arguments.pop("corrupted", [[1, 4, 3]]), metric, **arguments)


def test_what_cannot_be_exact_or_does_not_exist_is_refused():
    refused("post-norm blocks normalise the stream itself", model=tiny_model(block="post"))
    refused("nothing held below it could count", receivers=Fixed(["final", ("q", 1, 0)]))
    refused("no sender reaches L0H0.q: a path leads upwards", receivers=("q", 0, 0))
    refused("no sender is called 'L0H'", senders=["L0H"])
    refused("no receiver is called 'L0H0.z'", receivers=["L0H0.z"])
    refused("layer 7 was asked for as a receiver; there are layers 0 to 1", receivers=("q", 7, 0))
    refused("head 5 of layer 1 was asked for as a receiver; there are heads 0 to 1", receivers=("q", 1, 5))
    refused("head 5 of layer 1 was asked for as a sender; there are heads 0 to 1", senders=[(1, 5)])
    grouped = tiny_model(n_heads=4, n_key_value_heads=2)
    refused("there are key/value heads 0 to 1", model=grouped, receivers=("k", 1, 3))
    refused("the MLP of layer 0 was asked for as a receiver", model=tiny_model(attn_only=True), receivers="MLP0")
    refused("value='clean' or 'corrupted'; got 'zero'", value="zero")
    refused("senders= names none", senders=[])
    refused("receivers= names none", receivers=[])
    refused(r"must tokenise to the same length, got 3 and 4 tokens .*; re-word the prompts$", corrupted=[[1, 4, 3, 2]])


def test_edges_of_prompts_of_unequal_length_advised_an_option_that_they_do_not_have():
    model = tiny_model()
    kept, metric = torch.ones(circuit_graph(model).n_edges, dtype=torch.bool), lambda logits: logits[:, -1, 1]
    with pytest.raises(InputError, match=r"first difference at 3: \(end\) \| '2'\); re-word the prompts$"):
        run_edges(model, kept, [[1, 2, 3]], [[1, 2, 3, 2]], metric)


def test_a_head_asked_for_as_a_receiver_was_said_not_to_exist():
    refused(r'^L1H0 was asked for as a receiver; receivers read from the .* "L9H6.q"', receivers="L1H0")
    refused("^L1H0.q was asked for as a sender; senders write to", senders="L1H0.q")
    refused("no receiver is called 'l1h0.q'.*closest: L1H0.q", receivers="l1h0.q")


def test_the_position_of_a_head_was_dropped_where_heads_have_none():
    with pytest.raises(InputError, match="L1H0@-1 was asked for as a head, taken at all positions here"):
        read_heads(tiny_model(), ["L1H0@-1"])


def test_names_are_read_as_they_are_written():
    model = tiny_model(n_heads=4, n_key_value_heads=2)
    names = [r.name for r in read_receivers(model, "all")]
    assert [r.name for r in read_receivers(model, names)] == names
    senders = read_senders(model, ["heads", "mlps", "embed"])
    assert read_senders(model, [s.name for s in senders]) == senders
    assert read_receivers(model, [("q", -1)]) == read_receivers(model, [f"L1H{i}.q" for i in range(4)])
    assert read_receivers(model, hl.site("k", 1)) == read_receivers(model, ["L1G0.k", "L1G1.k"])
    assert read_senders(model, [(0, 1), ("mlp", 1)]) == read_senders(model, ["L0H1", "MLP1"])
    assert read_senders(model, (0, 1)) == read_senders(model, "L0H1")


@pytest.mark.parametrize("semantics", HELD)
def test_a_metric_that_is_not_finite_says_where_it_began(semantics):
    model = tiny_model()
    model.W_in[1] = float("nan")
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    with pytest.raises(hl.HooklensError, match=r"finite from blocks\.1\.mlp\.hook_pre on"):
        by(semantics, model, CLEAN, CORRUPTED, metric)
    with pytest.raises(hl.HooklensError, match="look at the metric"):
        by(semantics, tiny_model(), CLEAN, CORRUPTED, lambda logits: logits[:, -1, 0] * float("nan"))

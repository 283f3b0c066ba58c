"""A block kind and sites of somebody else's, each in one file: what holds for ours holds for them."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from loop import BYS, POINTS, looped
from model.zoo import GQA, zoo_model
from path_loop import reference
from refused import refused
from torch import Tensor

import hooklens as hl
from hooklens.core.errors import CheckFailed, InputError, NameNotFound, WrongType
from hooklens.core.names import AXES
from hooklens.model.block import BLOCKS, Block
from hooklens.model.config import BlockPart, HookedTransformerConfig, Rotary
from hooklens.model.kv_cache import KVCache
from hooklens.model.norms import Passage
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import run_edges
from hooklens.plugins.lens.layer_lens import logit_lens
from hooklens.plugins.lens.logit_attribution import direct_logit_attribution
from hooklens.plugins.patching.ablation import ablate
from hooklens.plugins.patching.attribution_patching import attribution_patch
from hooklens.plugins.patching.path import Fixed, path_patch
from hooklens.plugins.weights.overlap import measure_overlap
from hooklens.pretrained.checkpoint import save
from hooklens.pretrained.folding import fold_ln
from hooklens.pretrained.loading import load
from hooklens.pretrained.model_check import check
from hooklens.sweeps.planning import has_site
from hooklens.sweeps.sites import SITES, SweptSite, add_site
from hooklens.testing import tiny_model

sys.path.append(str(Path(__file__).parent.parent / "third_party_plugin"))
import hooklens_mlp_first  # noqa: F401
import hooklens_more_sites  # noqa: F401

CORRUPTED = torch.tensor([[1, 5, 2, 7, 3, 6], [4, 4, 9, 0, 10, 2]])
CLEAN = torch.tensor([[1, 5, 8, 7, 3, 6], [4, 4, 9, 0, 1, 2]])  # they part at 2 and 4
KINDS = {
    "learned": {},
    "rotary, grouped": GQA | {"positional_embedding_type": "rotary", "normalization_type": "RMS"},
    "bidirectional": {"mask": "none", "gated_mlp": True},
}


@dataclass(frozen=True)
class HalfSandwich(BlockPart):
    """A norm behind attention, of whose output a share is added; the MLP adds a share of what it wrote."""

    name = "half sandwich"
    share: float = 0.5


class HalfSandwichBlock(Block):
    """Attention and then the MLP, from the methods of `Block`: the engine may enter it in the middle."""

    part = HalfSandwich

    at = Block.order.index("hook_attn_out")
    order = (*Block.order[:at], "behind", *Block.order[at:])

    def build(self, cfg: HookedTransformerConfig, layer: int) -> None:
        super().build(cfg, layer)
        self.share = cfg.block.share

    def writes_through(self, part: str) -> Passage:
        return Passage(self.behind if part == "attn" else None, factor=self.share)


@dataclass(frozen=True)
class Misstated(BlockPart):
    name = "misstated"


class MisstatedBlock(Block):
    """Half of what attention writes reaches the stream, and `writes_through` says all of it."""

    part = Misstated

    def attn_adds(self, raw: Tensor) -> Tensor:
        return raw / 2


def outside(block="mlp_first", **changes):
    return zoo_model("gpt2", dtype=torch.float64, block=block, d_mlp=5, **changes)


def metric_of(model):
    return hl.logit_diff(model, answer=[3, 1], wrong_answer=4)


def own(logits: Tensor) -> Tensor:
    """A metric that reads all positions and tokens."""
    weight = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view(logits[0].shape)
    return (logits.log_softmax(-1) * weight).sum((1, 2))


# -- a block kind


@pytest.mark.parametrize("block", ["mlp_first", "half sandwich", HalfSandwich(share=0.25)])
def test_a_model_with_a_block_kind_from_outside_is_saved_and_rebuilt(block, tmp_path):
    model = outside(block)
    assert type(model.blocks[1]) is BLOCKS[type(model.cfg.block)]
    assert model.cfg.to_json()["block"]["part"] == model.cfg.block.name
    assert HookedTransformerConfig.from_json(model.cfg.to_json()) == model.cfg
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.cfg == model.cfg and torch.equal(again(CLEAN), model(CLEAN))
    with pytest.raises(NameNotFound, match=r"no block part named 'mlp_frist'; closest: mlp_first.*once that package"):
        tiny_model(block="mlp_frist")


@pytest.mark.parametrize("block", ["mlp_first", "half sandwich"])
def test_the_stream_of_a_block_kind_from_outside_is_taken_apart(block):
    model = outside(block)
    logits, cache = model.run_with_cache(CLEAN)
    last = cache["resid_post", -1]
    whole, labels = cache.decompose_resid()
    heads, _ = cache.stack_head_results(incl_remainder=True)
    neurons, _ = cache.stack_neuron_results(incl_remainder=True)
    for stack in (whole, heads, neurons):
        torch.testing.assert_close(stack.sum(0), last, atol=1e-10, rtol=1e-10)
    parts = cache.stack_head_results(1)[0].sum(0)
    attn, passage = model.blocks[0].attn, model.blocks[0].writes_through("attn")
    bias = passage.frozen(attn.b_O.expand_as(parts), cache.__getitem__) + passage.bias(parts)
    torch.testing.assert_close(parts + bias, cache["attn_out", 0], atol=1e-10, rtol=1e-10)
    normed, _ = cache.decompose_resid(apply_ln=True)
    read = model.ln_final(last) - model.ln_final.bias
    torch.testing.assert_close(normed.sum(0), read, atol=1e-10, rtol=1e-10)
    entering, _ = cache.decompose_resid(1, apply_ln=True)
    first = model.blocks[1].ln2 if block == "mlp_first" else model.blocks[1].ln1
    torch.testing.assert_close(entering.sum(0), first(cache["resid_pre", 1]) - first.bias, atol=1e-10, rtol=1e-10)
    tokens = [3, 1]
    of_logit = cache.logit_attrs(whole, tokens, pos=None)[..., -1].sum(0)
    expected = logits[range(2), -1, tokens] - (model.ln_final.bias @ model.W_U)[tokens]
    torch.testing.assert_close(of_logit, expected, atol=1e-10, rtol=1e-10)
    found = direct_logit_attribution(model, CLEAN, answer=tokens, wrong_answer=[4, 4])
    assert found.error < 1e-10 and found.labels == labels
    assert float(logit_lens(model, CLEAN).kl[-1].abs().max()) < 1e-9  # the last layer's lens is the model
    assert check(model).ok
    folded = fold_ln(model)(CLEAN)
    torch.testing.assert_close(folded.log_softmax(-1), logits.log_softmax(-1), atol=1e-9, rtol=1e-9)


def test_every_point_of_a_block_kind_from_outside_acts_and_fires_in_the_order_that_is_listed():
    model, fired = outside(), []
    model.run_with_hooks(CLEAN, fwd_hooks=[(lambda name: True, lambda act, hook: fired.append(hook.name))])
    assert fired == model.hook_names()
    plain = model(CLEAN)
    for name in model.hook_names():
        if name.startswith("blocks.0."):
            changed = model.run_with_hooks(CLEAN, fwd_hooks=[(name, lambda act, hook: act * 0.5)])
            assert not torch.allclose(changed, plain), name


def test_a_cache_and_one_chosen_position_give_the_logits_of_the_whole_prompt():
    model, past = outside(positional_embedding_type="rotary"), KVCache()
    whole = model(CLEAN)
    torch.testing.assert_close(model(CLEAN, logits_at=[-1, 2])[:, 0], whole[[0, 1], [-1, 2]], atol=1e-10, rtol=1e-10)
    model(CLEAN[:, :4], kv_cache=past)
    torch.testing.assert_close(model(CLEAN[:, 4:], kv_cache=past), whole[:, 4:], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("site", POINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_of_a_block_whose_mlp_runs_first_is_patched_as_by_the_plain_loop(kind, site):
    model = outside(**KINDS[kind])
    one, every = metric_of(model), own
    with hl.engine(verify=0, progress=False):
        for by, metric in zip(BYS[site][:2], (one, every), strict=True):
            sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site=site, by=by)
            assert sweep.how == "engine"
            expected = looped(model, CORRUPTED, CLEAN, metric, site, by)
            torch.testing.assert_close(sweep.per_pair, expected, atol=1e-9, rtol=1e-9)
        with hl.engine(plain=True):
            plain = hl.patch(model, CLEAN, CORRUPTED, every, site=site)
        torch.testing.assert_close(
            hl.patch(model, CLEAN, CORRUPTED, every, site=site).per_pair, plain.per_pair, atol=1e-9, rtol=1e-9
        )


@pytest.mark.parametrize("site", [*POINTS])
def test_a_block_made_of_the_methods_of_ours_is_entered_in_the_middle(site):
    model = outside("half sandwich")
    with hl.engine(verify=0, progress=False):
        sweep = hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site=site)
    expected = looped(model, CORRUPTED, CLEAN, metric_of(model), site, BYS[site][0])
    torch.testing.assert_close(sweep.per_pair, expected, atol=1e-9, rtol=1e-9)
    assert sweep.how == "engine" and model.blocks[0].in_steps and not outside().blocks[0].in_steps


RECEIVERS = [("q", 1, 0), ("v", 0, 1), ("mlp_in", 1)]
SENDERS = {"L0H0": ("head", 0, 0), "MLP0": ("mlp", 0), "MLP1": ("mlp", 1), "embed": ("embed",)}


@pytest.mark.parametrize("block", ["mlp_first", "half sandwich"])
def test_paths_into_and_out_of_a_block_kind_from_outside(block):
    model = outside(block, positional_embedding_type="rotary")
    metric = metric_of(model)
    kinds = {"edges": lambda to: to, "fixed": Fixed, "fixed, frozen": lambda to: Fixed(to, mlps="frozen")}
    for semantics, kind in kinds.items():
        for receivers in (RECEIVERS, [("final",)]):
            asked = ["final" if one == ("final",) else ("mlp", 1) if one[0] == "mlp_in" else one for one in receivers]
            sweep = path_patch(model, CLEAN, CORRUPTED, metric, receivers=kind(asked), senders=list(SENDERS))
            for name, values in zip(sweep.senders, sweep.per_pair.unbind(1), strict=True):
                arguments = (model, CORRUPTED, CLEAN, metric, semantics, SENDERS[name], receivers)
                torch.testing.assert_close(values, reference(*arguments), atol=1e-9, rtol=1e-9)
    reaches = path_patch(model, CLEAN, CORRUPTED, metric, receivers=[("q", 1), ("mlp", 1)], senders=["MLP1", "L1H0"])
    assert reaches.reaches.tolist() == ([True, False] if block == "mlp_first" else [False, True])
    assert sweep.how.startswith("plain loop: blocks of this kind" if block == "mlp_first" else "engine")


@pytest.mark.parametrize("receivers", [["final"], [("q", 1), ("mlp", 0)]])
def test_paths_out_of_a_block_that_misstates_what_it_writes_passed_the_check(receivers):
    """The plain runs asked `writes_through` as well, so that both ways were wrong alike."""
    model = outside("misstated")
    with pytest.raises(CheckFailed, match=r"patch of L0H\d differs by .*block kind 'misstated' \(its `writes_through`"):
        path_patch(model, CLEAN, CORRUPTED, metric_of(model), receivers=receivers, senders=["L0H0", "L0H1"])
    with hl.engine(plain=True):
        plain = path_patch(model, CLEAN, CORRUPTED, metric_of(model), receivers=receivers, senders=["L0H0", "MLP0"])
    ends = [("final",)] if receivers == ["final"] else [("q", 1, 0), ("q", 1, 1), ("mlp_in", 0)]
    for name, values in zip(plain.senders, plain.per_pair.unbind(1), strict=True):
        expected = reference(model, CORRUPTED, CLEAN, metric_of(model), "edges", SENDERS[name], ends)
        torch.testing.assert_close(values, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("layer", range(4))
def test_one_layer_of_four_that_misstates_what_it_writes_passed_the_check_of_two_senders(layer):
    model = outside("misstated", n_layers=4)
    for number, block in enumerate(model.blocks):
        if number != layer:
            block.attn_adds = lambda raw: raw
    for seed in range(3):
        with hl.engine(seed=seed), pytest.raises(CheckFailed, match=f"patch of L{layer}H"):
            path_patch(model, CLEAN, CORRUPTED, metric_of(model), senders="heads")


def test_edges_of_a_block_kind_from_outside_are_run_or_refused_with_the_one_error():
    half, first = outside("half sandwich"), outside()
    graph = circuit_graph(half)
    everything = torch.ones(graph.n_edges, dtype=torch.bool)
    found = run_edges(half, torch.stack([everything, ~everything]), CLEAN, CORRUPTED, metric_of(half))
    torch.testing.assert_close(found.per_pair[0], metric_of(half)(half(CLEAN)), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.per_pair[1], metric_of(half)(half(CORRUPTED)), atol=1e-9, rtol=1e-9)
    assert graph.shared_scale and eap(half, CLEAN, CORRUPTED, metric_of(half)).scores.isfinite().all()
    for method in (lambda *asked: run_edges(first, everything, *asked), lambda *asked: eap(first, *asked)):
        with pytest.raises(InputError, match="kind 'mlp_first' have a forward pass of their own"):
            method(CLEAN, CORRUPTED, metric_of(first))


def test_weights_compose_in_the_order_in_which_the_parts_of_a_block_write():
    found = measure_overlap(outside(), draws=2)
    at = {name: i for i, name in enumerate(found.writers)}, {name: i for i, name in enumerate(found.readers)}
    assert found.composition[at[0]["MLP0"], at[1]["L0H0.q"]] > 0
    assert found.composition[at[0]["L0H0"], at[1]["MLP0"]].isnan()


# -- a site


def loop_at(model, point: str, by: str, metric) -> Tensor:
    """The plain loop for a point that the library's own sites do not have."""
    POINTS["outside"] = point
    try:
        return looped(model, CORRUPTED, CLEAN, metric, "outside", by)
    finally:
        del POINTS["outside"]


SWEPT = [("mlp_in", "layer x pos"), ("mlp_in", "layer"), ("rot_q", "layer x head"), ("rot_q", "layer x head x pos")]


@pytest.mark.parametrize("block", ["pre", "parallel", "sandwich", "mlp_first"])
@pytest.mark.parametrize(("site", "by"), SWEPT)
def test_sites_from_outside_are_swept_as_by_the_plain_loop(block, site, by):
    model = outside(block, positional_embedding_type=Rotary())
    for metric in (metric_of(model), own):
        with hl.engine(verify=0, progress=False):
            sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site=site, by=by)
        assert sweep.how == "engine" and (sweep.computed < 1 or metric is own)
        expected = loop_at(model, SITES[site].point, by, metric)
        torch.testing.assert_close(sweep.per_pair, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "point",
    ["attn.hook_rot_k", "attn.hook_attn_scores", "hook_q_input", "hook_attn_in", "ln1.hook_scale", "mlp.hook_pre"],
)
def test_any_point_of_a_block_can_become_a_site(point):
    model = outside(positional_embedding_type="rotary", block="pre")
    add_site(SweptSite("a point", point))
    try:
        for by in ("layer x pos", "layer"):
            with hl.engine(verify=0, progress=False):
                sweep = hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site="a point", by=by)
            if "rot_k" not in point:
                expected = loop_at(model, point, by, metric_of(model))
            else:
                with hl.engine(plain=True, progress=False):
                    expected = hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site="a point", by=by).per_pair
            torch.testing.assert_close(sweep.per_pair, expected, atol=1e-9, rtol=1e-9)
    finally:
        del SITES["a point"]


def test_a_site_from_outside_is_ablated_estimated_and_named_in_errors():
    model = outside(positional_embedding_type="rotary")
    zero = ablate(model, CLEAN, metric_of(model), site="rot_q", value="zero").per_prompt
    write = [(("rot_q", 1), lambda act, hook: torch.cat((act[:, :, :1] * 0, act[:, :, 1:]), 2))]
    expected = metric_of(model)(model.run_with_hooks(CLEAN, fwd_hooks=write))
    torch.testing.assert_close(zero[:, 1, 0], expected, atol=1e-9, rtol=1e-9)
    found = attribution_patch(model, CLEAN, CORRUPTED, metric_of(model), site="mlp_in")
    exact = hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site="mlp_in")
    assert found.per_pair.shape == exact.per_pair.shape
    with pytest.raises(InputError, match=r"this model has no rot_q .*which is not in every kind of block"):
        has_site(outside(), "rot_q")


def test_a_site_that_is_known_otherwise_or_has_unknown_axes_is_refused():
    with pytest.raises(InputError, match=r"'z' at attn.hook_q: it is known already, as attn.hook_z"):
        add_site(SweptSite("z", "attn.hook_q"))
    with pytest.raises(InputError, match="the axes of the point hook_gate_out are unknown"):
        add_site(SweptSite("gate", "hook_gate_out"))
    with pytest.raises(InputError, match="known already, as batch pos head d_head"):
        add_site(SweptSite("another z", "attn.hook_z", axes=("batch", "pos", "d_model")))
    assert "gate" not in SITES and "gate_out" not in AXES


@pytest.mark.parametrize(
    ("site", "error", "said"),
    [
        (
            lambda: SweptSite("a site", "attn.hook_z", "layer x head"),
            InputError,
            "default_by of the site 'a site' is a",
        ),
        (lambda: SweptSite("a site", "attn.hook_z", ("head",)), InputError, "layer first"),
        (lambda: SweptSite("", "attn.hook_z"), WrongType, "a site has a name"),
        (lambda: SweptSite("a site", None), WrongType, "a site has a point"),
    ],
)
def test_a_site_that_is_described_wrongly_ended_in_a_raw_error(site, error, said):
    with refused(error, said):
        site()


@pytest.fixture
def wrong_site(request):
    add_site(SweptSite("a site", "attn.hook_z", ("layer", "head"), enter=request.param))
    yield "a site"
    del SITES["a site"]


@pytest.mark.parametrize("wrong_site", [lambda entry: None, lambda entry: entry.stream[:, :0]], indirect=True)
def test_an_enter_that_returns_no_stream_ended_in_a_raw_error(wrong_site):
    model = outside(block="pre")
    with pytest.raises(WrongType, match=r"`enter` of the site 'a site' returns the stream .*\[row pos d_model\]"):
        hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site=wrong_site)


@pytest.mark.parametrize("wrong_site", [lambda entry: entry.stream], indirect=True)
def test_a_wrong_enter_was_blamed_on_the_metric_or_the_engine(wrong_site):
    model = outside(block="pre")
    with pytest.raises(CheckFailed, match=r"or the site 'a site' \(its `enter`\) does not match the forward pass"):
        hl.patch(model, CLEAN, CORRUPTED, metric_of(model), site=wrong_site)


@dataclass(frozen=True)
class Unstated(HalfSandwich):
    name = "unstated"


class UnstatedBlock(HalfSandwichBlock):
    part = Unstated

    def writes_through(self, part: str) -> Passage:
        return Passage()

    def attn_adds(self, raw: Tensor) -> Tensor:
        return self.share * self.behind(raw)


def test_a_passage_that_is_not_stated_was_blamed_on_the_metric_or_the_engine():
    model = outside("unstated")
    with pytest.raises(CheckFailed, match=r"the block kind 'unstated' \(its `writes_through`"):
        path_patch(model, CLEAN, CORRUPTED, metric_of(model), senders="heads", receivers=Fixed("final"))

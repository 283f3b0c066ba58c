"""Circuits carried to other models: to the model itself, to one with its heads moved about, to larger ones, to none."""

import copy
from functools import cache

import pytest
import torch
from plugins.heads.trained import trained_on_repeats

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.circuit import circuit_of
from hooklens.plugins.circuits.circuit_transfer import transfer_circuit
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.integrated_edges import eap_ig
from hooklens.plugins.circuits.roles import _by_edges, _by_patches, roles_of
from hooklens.plugins.circuits.run import Bench
from hooklens.plugins.heads.taxonomy import classify_heads
from hooklens.results.result import Result
from hooklens.studies import transfer_report
from hooklens.testing import induction_model, tiny_model

GROUPED = {"n_key_value_heads": 2, "positional_embedding_type": "rotary", "normalization_type": "RMS"}
INDUCTION = ["embed->L0H0.q", "embed->L0H0.k", "embed->L0H0.v", "embed->L1H1.q", "embed->L1H1.v", "L0H0->L1H1.k"]
INDUCTION = [*INDUCTION, "L1H1->logits"]


def quick(model):
    return classify_heads(model, n=6, draws=50, ioi=0)


@cache
def hand_set_labels():
    return classify_heads(induction_model())


def own_task(model, n: int = 8) -> PromptPairs:
    pairs = demo_pairs(model, n)
    return PromptPairs(pairs.clean, pairs.corrupted, lambda logits: logits[:, -1, 3] - logits[:, -1, 4])


def repeats(model, n: int = 16, d_vocab: int | None = None) -> PromptPairs:
    """After "x a b c d a b" comes c; in the corrupted prompt the first b is another token, so that nothing says so."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.rand(n, d_vocab or model.cfg.d_vocab, generator=draw).argsort(1)
    clean = torch.cat([drawn[:, :5], drawn[:, 1:3]], 1)
    corrupted = clean.clone()
    corrupted[:, 2] = drawn[:, 5]
    return PromptPairs(clean, corrupted, hl.logit_diff(model, answer=drawn[:, 3], wrong_answer=drawn[:, 4]))


def moved(model, seed: int = 0):
    """The same function with the heads of every layer in another order, groups of shared keys moved whole."""
    twin, draw, names = copy.deepcopy(model), torch.Generator().manual_seed(seed), {}
    keyed = model.cfg.n_key_value_heads
    share = model.cfg.n_heads // keyed
    with torch.no_grad():
        for layer, (old, new) in enumerate(zip(model.blocks, twin.blocks, strict=True)):
            groups = torch.randperm(keyed, generator=draw)
            within = torch.rand(keyed, share, generator=draw).argsort(1)
            heads = (within + share * groups[:, None]).flatten()
            orders = {"W_Q": heads, "b_Q": heads, "W_K": groups, "b_K": groups, "W_V": groups, "b_V": groups}
            for name, order in (orders | {"W_O": heads}).items():
                if getattr(old.attn, name) is not None:
                    getattr(new.attn, name).copy_(getattr(old.attn, name)[order])
            names |= {f"L{layer}H{h}": f"L{layer}H{i}" for i, h in enumerate(heads.tolist())}
    return twin, names


def larger(places: dict[str, str], **sizes):
    """The hand-set induction model with its two heads in other places, among heads that write nothing."""
    small = induction_model()
    sizes = {"n_key_value_heads": sizes["n_heads"]} | sizes
    big = HookedTransformer(small.cfg.replace(model_name="larger", **sizes))
    share = big.cfg.n_heads // big.cfg.n_key_value_heads
    with torch.no_grad():
        for p in big.parameters():
            p.zero_()
        for name in ("W_E", "W_pos", "W_U"):
            getattr(big, name).copy_(getattr(small, name))
        for old, new in places.items():
            (layer, head), (to, at) = (map(int, name[1:].split("H")) for name in (old, new))
            for weight in ("W_Q", "W_K", "W_V", "W_O"):
                where = at // share if weight in ("W_K", "W_V") else at
                getattr(big.blocks[to].attn, weight)[where] = getattr(small.blocks[layer].attn, weight)[head]
    return big


@pytest.mark.parametrize(
    ("changes", "ablation"),
    [
        ({}, "corrupted"),
        ({"attn_only": True}, "mean"),
        (GROUPED, "zero"),
        (GROUPED, "mean"),
        ({"block": "parallel"}, "zero"),
        ({"block": "sandwich"}, "corrupted"),
        ({"block": "sandwich"}, "zero"),
    ],
)
def test_what_a_node_is_worth_is_the_same_by_edges_and_by_patches(changes, ablation):
    model = tiny_model(n_heads=4, dtype=torch.float64, **changes)
    task = own_task(model, 4)
    bench = Bench(model, task, ablation)
    every = torch.ones(bench.graph.n_sources, dtype=torch.bool)
    every[0] = False
    slow = _by_edges(bench, every)
    found = roles_of(model, task, quick(model), value=ablation)
    gap = bench.base_per_pair - bench.run(torch.zeros(bench.graph.n_edges, dtype=torch.bool)).empty_per_pair
    unit = gap.abs().mean() * gap.mean().sign()
    torch.testing.assert_close(found.effect[1:], slow / unit, atol=1e-9, rtol=1e-9)
    assert float(slow.abs().max()) > 1e-3 and found.effect[0].isnan()
    if not bench.graph.shared_scale:
        torch.testing.assert_close(_by_patches(bench, every), slow, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "ablation"), [({}, "mean"), (GROUPED, "corrupted"), ({"block": "sandwich"}, "zero")]
)
def test_in_the_same_model_the_circuit_is_itself(changes, ablation):
    model = tiny_model(n_heads=4, dtype=torch.float64, **changes)
    task = own_task(model)
    chosen = task.split()[0]
    circuit = eap(model, chosen, value=ablation).greedy_edges(25)
    found = transfer_circuit(model, circuit, task, model, task, taxonomies=(quick(model),) * 2)
    assert found.matching.source == found.matching.target and found.matching.lost == []
    assert float(found.matching.distance.max()) == 0 and str(found.replacement) == ablation
    assert torch.equal(found.mapped.circuit.kept, circuit.kept) and found.mapped.circuit.edges == circuit.edges
    torch.testing.assert_close(found.mapped.circuit.scores, circuit.scores)
    torch.testing.assert_close(found.mapped.per_pair, found.home.per_pair, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.by_index.per_pair, found.home.per_pair, atol=1e-9, rtol=0)
    assert found.home.n_seen == found.mapped.n_seen == 0 and (found.n_matched_on, len(found.mapped.per_pair)) == (4, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "seed"), [({"n_layers": 3}, 0), (GROUPED, 1)])
def test_heads_that_moved_within_their_layer_are_found(changes, seed):
    model = tiny_model(n_heads=4, dtype=torch.float64, **changes)
    twin, names = moved(model, seed)
    task = own_task(model)
    with torch.no_grad():
        torch.testing.assert_close(twin(task.clean), model(task.clean))
    circuit = eap(model, task).greedy_edges(30)
    found = transfer_circuit(model, circuit, task, twin, task, taxonomies=(quick(model), quick(twin)))
    there = dict(zip(found.matching.source, found.matching.target, strict=True))
    heads = [name for name in there if "H" in name]
    assert len(heads) > 4 and any(names[name] != name for name in heads)
    assert {name: there[name] for name in heads} == {name: names[name] for name in heads}
    torch.testing.assert_close(found.mapped.per_pair, found.home.per_pair, atol=1e-9, rtol=0)
    assert float((found.by_index.per_pair - found.home.per_pair).abs().max()) > 1e-3
    assert found.home.n_seen == found.mapped.n_seen == 4  # the circuit was found on the very pairs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "ablation"), [({"n_heads": 6}, "mean"), ({"n_heads": 6, "n_key_value_heads": 3}, "corrupted")]
)
def test_an_induction_circuit_is_found_in_a_larger_model(sizes, ablation):
    small, big = induction_model(), larger({"L0H0": "L1H3", "L1H1": "L2H5"}, n_layers=3, **sizes)
    task, there = repeats(small), repeats(big)
    circuit = circuit_of(small, INDUCTION, value=ablation)
    labels = hand_set_labels(), classify_heads(big, draws=500)  # few heads in it have any pattern to make a null of
    found = transfer_circuit(small, circuit, task, big, there, taxonomies=labels)
    places = {"L0H0": "L1H3", "L1H1": "L2H5"}
    assert dict(zip(found.matching.source, found.matching.target, strict=True)) == places
    assert found.matching.target_label == found.matching.source_label == ["previous token", "induction"]
    assert (found.matching.same_label, found.matching.labelled) == (2, 2) and found.matching.lost == []
    assert found.home.value == pytest.approx(1, abs=1e-5) and found.mapped.value == pytest.approx(1, abs=1e-5)
    assert found.p < 0.05 and found.in_layers.p < 0.15 and float(found.mapped.random.median()) == pytest.approx(0)
    assert found.by_index is None and min(found.n_different.values()) > 20
    edge = "L1H3->L2G2.k" if "n_key_value_heads" in sizes else "L1H3->L2H5.k"
    assert edge in found.mapped.circuit.edges


def test_a_shallower_model_loses_the_edge_that_it_cannot_have():
    small, flat = induction_model(), tiny_model(n_layers=1, n_heads=4, attn_only=True)
    labels = quick(small), quick(flat)
    circuit = circuit_of(small, INDUCTION)
    found = transfer_circuit(small, circuit, repeats(small), flat, repeats(flat), taxonomies=labels)
    assert found.matching.lost == ["L0H0->L1H1.k"] and found.mapped.circuit.n_edges == 6
    assert found.mapped.circuit.model_name == "tiny" and found.home.circuit.n_edges == 7
    assert "1 of 7 edges lost" in str(found.table())


@pytest.mark.parametrize("seed", range(2))
def test_a_random_model_has_no_induction_circuit(seed):
    """Undefined or not small: `p` is no finding either way."""
    small, target = induction_model(), tiny_model(n_layers=3, n_heads=4, attn_only=True, seed=seed)
    circuit = circuit_of(small, INDUCTION)
    labels = hand_set_labels(), quick(target)
    found = transfer_circuit(small, circuit, repeats(small, 32), target, repeats(target, 32), taxonomies=labels)
    assert not found.p <= 0.05 and len(found.mapped.random) == 100
    assert found.matching.same_label == 0 and found.matching.labelled == 2


@pytest.mark.slow
def test_the_result_draws_reports_and_loads_back(tmp_path):
    small, big = induction_model(), larger({"L0H0": "L0H1", "L1H1": "L1H2"}, n_heads=3)
    labels = quick(small), quick(big)
    circuit = circuit_of(small, INDUCTION, value="zero")
    found = transfer_circuit(small, circuit, repeats(small, 8), big, repeats(big, 8), taxonomies=labels)
    assert len(found.table()) == 5 and len(found.figure().data) > 0
    assert {row[0]: row[3] for row in found.matching.top(2).rows} == {"L0H0": "L0H1", "L1H1": "L1H2"}
    found.save(tmp_path / "found.safetensors")
    back = Result.load(tmp_path / "found.safetensors")
    assert back.matching.target == found.matching.target and back.p == found.p
    transfer_report(found).save(tmp_path / "page.html")
    assert "Matched nodes" in (tmp_path / "page.html").read_text()


def test_pairs_are_cut_with_their_metric():
    model = tiny_model()
    metric = hl.logit_diff(model, answer=[1, 2, 3], wrong_answer=[4, 5, 6])
    task = PromptPairs(torch.tensor([[1, 2], [3, 4], [5, 6]]), None, metric, group=[7, 8, 9])
    part = task[[2, 0]]
    assert part.metric.answer.tolist() == [3, 1] and part.group.tolist() == [9, 7] and part.corrupted is None
    assert [row.tolist() for row in part.clean] == [[5, 6], [1, 2]] and len(part) == 2
    assert len(PromptPairs("one text", "another", metric)) == len(PromptPairs([1, 2, 3], [1, 2, 4], metric)) == 1
    assert len(PromptPairs(["a", "b"], None, metric)) == len(PromptPairs([[1], [2]], None, metric)) == 2


def test_what_cannot_be_asked_is_said():
    model = tiny_model()
    task, labels = own_task(model), quick(model)
    circuit = circuit_of(model, ["embed->L0H0.v", "L0H0->MLP1", "L0H1->L1H1.q", "L1H1->logits", "MLP1->logits"])

    def run(circuit=circuit, task=task, target=model, there=task, taxonomies=(labels, labels), **options):
        return transfer_circuit(model, circuit, task, target, there, taxonomies=taxonomies, **options)

    with pytest.raises(InputError, match="no head in them"):
        run(circuit_of(model, ["embed->MLP0", "MLP0->logits"]))
    with pytest.raises(InputError, match="0 edges and no head"):
        run(circuit_of(model, []))
    with pytest.raises(InputError, match="has 3 heads, and the target has 2"):
        run(target=tiny_model(n_layers=1))
    with pytest.raises(InputError, match="got 8 pairs for 'tiny' and 4"):
        run(there=own_task(model, 4))
    two = hl.logit_diff(model, answer=[1, 2], wrong_answer=[3, 4])
    with pytest.raises(InputError, match="the metric was made for 2 pairs, the prompts are 8"):
        run(task=PromptPairs(task.clean, task.corrupted, two))
    with pytest.raises(InputError, match="8 clean and 2 corrupted prompts"):
        run(task=PromptPairs(task.clean, task.corrupted[:2], task.metric))
    with pytest.raises(InputError, match="group their pairs differently"):
        run(there=PromptPairs(task.clean, task.corrupted, task.metric, group=torch.arange(8) // 2))
    with pytest.raises(InputError, match=r"taxonomy has 1 layers of 2 heads, and 'tiny' has 2"):
        run(taxonomies=(labels, quick(tiny_model(n_layers=1))))
    with pytest.raises(InputError, match="this circuit was found on"):
        run(circuit_of(tiny_model(n_heads=4), ["embed->L0H3.v", "L0H3->logits"]))
    with pytest.raises(InputError, match="at least two independent groups"):
        run(task=task[0], there=task[0])
    with pytest.raises(InputError, match="at least 100 random circuits"):
        run(draws=99)


@cache
def trained(seed: int):
    return trained_on_repeats(seed)[0]


@pytest.mark.slow
def test_a_circuit_goes_from_one_trained_model_to_another():
    """To a second seed, and to the hand-set model: heads of the same roles, in other places."""
    one, two = trained(0), trained(1)
    task, there = repeats(one, 32), repeats(two, 32)
    chosen = task.split()[0]
    circuit = eap_ig(one, chosen).greedy_edges(7)
    found = transfer_circuit(one, circuit, task, two, there)
    assert found.matching.same_label == found.matching.labelled == len(found.matching.source) == 3
    assert found.home.value > 0.9 and found.mapped.value > 0.9 and found.home.n_seen == 0
    assert found.by_index.value < 0.2  # in the other seed another head of layer 0 looks at the previous token
    hand = induction_model()
    small, other = (repeats(model, 32, hand.cfg.d_vocab) for model in (one, hand))
    chosen = small.split()[0]
    circuit = eap_ig(one, chosen).greedy_edges(7)
    found = transfer_circuit(one, circuit, small, hand, other)
    places = dict(zip(found.matching.source, found.matching.target, strict=True))
    assert {"L0H0", "L1H1"} <= set(places.values()) and found.mapped.value == pytest.approx(1, abs=1e-3)
    assert found.by_index.value == pytest.approx(0, abs=1e-3)

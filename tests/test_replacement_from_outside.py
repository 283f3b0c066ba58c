"""A replacement of somebody else's, in one file: patches, ablations and circuits write it, and say its name."""

import zlib
from dataclasses import dataclass

import pytest
import torch
from close import close
from model.zoo import TOKENS, zoo_model
from refused import refused
from third_party_plugin.hooklens_median import MedianOver

import hooklens as hl
from hooklens.core.errors import FileRefused, InputError, WrongType
from hooklens.plugins.circuits.circuit import Circuit, circuit_of
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import run_edges
from hooklens.plugins.heads.mediation import measure_mediation
from hooklens.plugins.patching import AblationSweep
from hooklens.sweeps.replacement import Replacement
from hooklens.testing import or_gate, tiny_model

CORRUPTED = TOKENS.roll(1, 1)
REFERENCE = [[9, 8, 1, 0, 3], [3, 0, 10, 7, 2], [6, 6, 2, 9, 5]]
METRIC = {"answer": [3, 4], "wrong_answer": [5, 6]}


@dataclass(frozen=True, eq=False)
class Noise(Replacement):
    """Gaussian noise of the activation's own standard deviation."""

    seed: int = 0

    def write(self, target):
        def noise(act, name):
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
            return torch.randn(act.shape, generator=generator, dtype=act.dtype) * act.std()

        return noise


def metric_of(model):
    return hl.logit_diff(model, **METRIC)


def heads_loop(model, tokens, metric, written):
    """prompt layer head: one hooked forward pass for each head, `written` by point."""
    out = torch.zeros(len(tokens), model.cfg.n_layers, model.cfg.n_heads, dtype=model.dtype)
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.attn.hook_z"
        for head in range(model.cfg.n_heads):

            def write(z, hook, head=head, value=written[name]):
                z[:, :, head] = value[..., head, :]
                return z

            out[:, layer, head] = metric(model.run_with_hooks(tokens, fwd_hooks=[(name, write)]))
    return out.detach()


def z_of(model, tokens):
    return dict(model.run_with_cache(torch.as_tensor(tokens), names="z")[1])


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_patches_and_ablations_write_it_as_a_plain_loop_does(name):
    model = zoo_model(name, dtype=torch.float64)
    medians = {point: act.median(0).values for point, act in z_of(model, REFERENCE).items()}
    expected = heads_loop(model, TOKENS, metric_of(model), medians)
    value = MedianOver(REFERENCE)
    patched = hl.patch(model, TOKENS, CORRUPTED, metric_of(model), site="z", value=value)
    ablated = hl.ablate(model, TOKENS, metric_of(model), value=value)
    assert close(patched.per_pair, expected, 1000) and close(ablated.per_prompt, expected, 1000)
    assert patched.into == "clean" and patched.replacement == ablated.replacement == "median over"


def test_a_function_of_the_activation_is_given_each_points_own():
    model, noise = zoo_model("gpt2", dtype=torch.float64), Noise(seed=3)
    own = z_of(model, TOKENS)
    expected = heads_loop(model, TOKENS, metric_of(model), {name: noise.write(None)(own[name], name) for name in own})
    found = hl.patch(model, TOKENS, CORRUPTED, metric_of(model), site="z", value=noise)
    assert close(found.per_pair, expected, 1000)


def test_prompts_of_several_lengths_are_written_to():
    model, metric = tiny_model(dtype=torch.float64), hl.logit_diff(tiny_model(), answer=3, wrong_answer=4)
    mixed = [[1, 5, 2], [4, 4, 9, 0], [8, 1, 1]]
    acts = {name: torch.cat([z_of(model, [row])[name][0] for row in mixed]) for name in z_of(model, [mixed[0]])}
    medians = {name: act.median(0).values for name, act in acts.items()}
    found = hl.ablate(model, mixed, metric, value=MedianOver(mixed))
    patched = hl.patch(model, mixed, [row[::-1] for row in mixed], metric, site="z", value=MedianOver(mixed))
    for i, row in enumerate(mixed):
        expected = heads_loop(model, torch.tensor([row]), metric, medians)[0]
        assert close(found.per_prompt[i], expected, 1000) and close(patched.per_pair[i], expected, 1000)


@pytest.mark.parametrize("make", [lambda k: Noise(k), lambda k: MedianOver([[k, 1, 2, 3, 4]])])
def test_a_sweep_goes_on_only_with_the_same_one(make, tmp_path):
    model, asked = zoo_model("gpt2"), {"site": "z", "resume": tmp_path / "sweep"}
    first = hl.patch(model, TOKENS, CORRUPTED, metric_of(model), value=make(1), **asked)
    again = hl.patch(model, TOKENS, CORRUPTED, metric_of(model), value=make(1), **asked)
    assert torch.equal(again.per_pair, first.per_pair)
    with pytest.raises(FileRefused, match="another sweep"):
        hl.patch(model, TOKENS, CORRUPTED, metric_of(model), value=make(2), **asked)


def test_results_that_were_saved_say_what_was_written(tmp_path):
    model, value = zoo_model("gpt2"), MedianOver(REFERENCE)
    patched = hl.patch(model, TOKENS, CORRUPTED, metric_of(model), site="z", value=value)
    ablated = hl.ablate(model, TOKENS, metric_of(model), value=value)
    patched.save(tmp_path / "patched")
    ablated.save(tmp_path / "ablated")
    read = hl.PatchSweep.load(tmp_path / "patched")
    assert read.replacement == "median over" and "median over into clean" in str(read.figure().layout.title.text)
    assert "effect (median over)" in AblationSweep.load(tmp_path / "ablated").table().columns


# -- circuits


def test_what_every_node_writes_is_replaced_in_a_circuit():
    """The heads of the gate write 1 on every prompt: the median of a cut one opens it, zeros do not."""
    gate, logit = or_gate(), lambda logits: logits[:, -1, 1]
    kept = circuit_graph(gate).mask(["MLP0->logits"])
    zeroed = run_edges(gate, kept, [[0]], None, logit, value="zero")
    found = run_edges(gate, kept, [[0]], None, logit, value=MedianOver([[0], [1], [1]]))
    assert zeroed.per_pair.item() == 0.0 and found.per_pair.item() == 1.0 and found.replacement == "median over"


@dataclass(frozen=True, eq=False)
class CorruptedByPoint(Replacement):
    """The corrupted run's values as activations, where "corrupted" names the run."""

    def write(self, target):
        return target.read(target.pair["corrupted"])


@pytest.mark.parametrize("block", ["pre", "parallel", "sandwich"])
def test_a_run_written_node_by_node_is_that_run(block):
    """Streams are then sums of what nodes were given and of what no node writes: those of the run itself."""
    model = tiny_model(block=block, n_heads=4, n_key_value_heads=2, dtype=torch.float64)
    kept = torch.rand(4, circuit_graph(model).n_edges, generator=torch.Generator().manual_seed(0)) < 0.5
    by_run, by_point = (
        run_edges(model, kept, TOKENS, CORRUPTED, metric_of(model), value=value)
        for value in ("corrupted", CorruptedByPoint())
    )
    assert close(by_point.per_pair, by_run.per_pair, 10_000)
    assert close(by_point.empty_per_pair, by_run.empty_per_pair, 10_000)


def test_a_circuit_runs_with_it_and_its_file_names_it(tmp_path):
    gate, logit, value = or_gate(), lambda logits: logits[:, -1, 1], MedianOver([[0], [1]])
    circuit = circuit_of(gate, ["MLP0->logits"], value=value)
    assert circuit.run(gate, [[0]], None, logit).per_pair.item() == 1.0
    assert "(by hand, median over ablation)" in circuit.figure().layout.title.text
    circuit.save_json(tmp_path / "circuit.json")
    with pytest.raises(FileRefused, match=r"'median over', and it has only that name: give value="):
        Circuit.load_json(tmp_path / "circuit.json")
    read = Circuit.load_json(tmp_path / "circuit.json", value=value)
    assert read.run(gate, [[0]], None, logit).per_pair.item() == 1.0
    with pytest.raises(InputError, match="not part of a registered plugin"):  # nothing could load the class
        circuit.save(tmp_path / "circuit.safetensors")


def test_other_methods_take_it_too():
    gate, logit = or_gate(), lambda logits: logits[:, -1, 1]
    found = measure_mediation(gate, torch.zeros(1, 1, dtype=torch.long), logit, [(0, 0)], value=MedianOver([[0]]))
    assert found.total.tolist() == [[0.0]]  # the median of a constant is that constant


# -- what is refused


@pytest.mark.parametrize("value", [3, 0.5, None, [1.0], MedianOver])
def test_what_says_nothing_to_write_is_refused(value):
    with refused(WrongType, "value= is a word such as"):
        hl.ablate(zoo_model("gpt2"), TOKENS, metric_of(zoo_model("gpt2")), value=value)


def test_a_replacement_that_writes_something_else_is_refused():
    @dataclass(frozen=True, eq=False)
    class Wrong(Replacement):
        def write(self, target):
            return torch.zeros(3)

    with pytest.raises(WrongType, match="token ids of the shape of the prompts, activations by point, or a function"):
        hl.ablate(zoo_model("gpt2"), TOKENS, metric_of(zoo_model("gpt2")), value=Wrong())

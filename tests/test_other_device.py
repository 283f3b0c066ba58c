"""Everything runs on a model of another device than the CPU, whichever device its arguments are on.

`other_device` stands in for a GPU here; tests/test_gpu.py compares numbers on a real one.
"""

import copy

import pytest
import torch
from close import close
from model.zoo import TOKENS, ZOO, zoo_model
from other_device import OTHER, other_device

import hooklens as hl
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.metrics import kl, logit_diff, loss
from hooklens.plugins import available, find
from hooklens.plugins.circuits.completeness import completeness_of
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.faithfulness import Faithfulness
from hooklens.plugins.circuits.minimality import minimality_of
from hooklens.plugins.circuits.random_draws import random_circuits
from hooklens.plugins.circuits.run import Bench, run_edges
from hooklens.plugins.heads import knock_out_keys, measure_mediation, measure_redundancy
from hooklens.plugins.lens import direct_logit_attribution, logit_lens, measure_calibration, trace_predictions
from hooklens.plugins.patching import Mean, Resample, ablate, path_patch
from hooklens.plugins.steering import ablate_direction, measure_direction_ablation, steer
from hooklens.results import statistics
from hooklens.testing import induction_model, tiny_model

CORRUPTED = TOKENS.roll(1, 1)
MASK = torch.ones_like(TOKENS)
MASK[0, :2] = 0
DIRECTION = torch.linspace(-1, 1, 8)


@pytest.fixture(autouse=True)
def device():
    with other_device() as device:
        yield device


def there(model):
    return copy.deepcopy(model).to(OTHER)


def _difference(model, put):
    return logit_diff(
        model,
        answer=put(torch.tensor([3, 4])),
        wrong_answer=put(torch.tensor([5, 6])),
        pos=put(torch.tensor([-1, -2])),
    )


# -- the device itself refuses what a GPU refuses, and allows what a GPU allows


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, cpu: x + cpu,
        lambda x, cpu: cpu + x[0],
        lambda x, cpu: cpu.add_(x),
        lambda x, cpu: torch.cat((x, cpu)),
        lambda x, cpu: torch.stack((x[0], cpu[0])),
        lambda x, cpu: torch.where(cpu > 0, x, 0.0),
        lambda x, cpu: torch.quantile(x, cpu.clamp(0, 1)),
        lambda x, cpu: x.index_select(0, cpu.long() - 1),
        lambda x, cpu: cpu[x.long() - 1],
        lambda x, cpu: x.index_put_((cpu.long() - 1,), cpu),
        lambda x, cpu: torch.rand(2, generator=torch.Generator(), device=x.device),
        lambda x, cpu: x.numpy(),
    ],
)
def test_what_a_gpu_refuses_raises(device, mix):
    with pytest.raises(RuntimeError):
        mix(torch.tensor([1.0, 2.0], device=device), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, cpu: x * cpu[1],
        lambda x, cpu: x.copy_(cpu) * 2,
        lambda x, cpu: x + cpu.to(x),
        lambda x, cpu: x[cpu.long() - 1] * 2,
        lambda x, cpu: x.index_put((cpu.long() - 1,), cpu[0] * 0) + x * 2,
        lambda x, cpu: torch.where(x > 0, x, cpu[0]) * 2,
    ],
)
def test_what_a_gpu_allows_gives_its_numbers(device, mix):
    out = mix(torch.tensor([1.0, 2.0], device=device), torch.tensor([1.0, 2.0]))
    assert out.device == device and out.tolist() == [2.0, 4.0]


def test_shapes_changed_in_place_are_those_of_the_cpu(device):
    x = torch.arange(6.0, device=device).view(2, 3)
    assert x.t_().shape == x.cpu().shape == (3, 2) and x.unsqueeze_(0).shape == x.cpu().shape == (1, 3, 2)
    assert torch.quantile(x[0], x.new_tensor([0.5]), dim=0).shape == (1, 2)


def test_devices_share_no_memory(device):
    cpu = torch.zeros(2)
    for inference in (False, True):
        with torch.inference_mode(inference):
            moved = cpu.to(device)
            back = moved.cpu()
            moved += 1
            assert cpu.tolist() == back.tolist() == [0.0, 0.0]


# -- the model


@pytest.mark.parametrize("name", ZOO)
def test_logits_and_every_activation_equal_those_of_the_cpu(device, name):
    model = zoo_model(name)
    logits, cache = model.run_with_cache(TOKENS)
    on_device, their_cache = there(model).run_with_cache(TOKENS)
    assert on_device.device == device and close(on_device.cpu(), logits, 1000)
    assert [point for point in cache if not close(their_cache[point].cpu(), cache[point], 1000)] == []


def test_tokens_on_the_cpu_are_moved_to_the_model(device):
    model = there(tiny_model())
    given = (TOKENS, TOKENS[0], TOKENS.to(torch.uint8), [TOKENS[0], TOKENS[1]], TOKENS.tolist(), TOKENS.to(device))
    assert all(model(tokens).device == device for tokens in given)


def test_tokens_of_another_device_are_moved_to_a_model_on_the_cpu(device):
    assert tiny_model()(TOKENS.to(device)).device.type == "cpu"


VERBS = {
    "mask": lambda model, put: model(put(TOKENS), attention_mask=put(MASK))[:, -1],
    "index of padded rows": lambda model, put: model(put(TOKENS), attention_mask=put(MASK))[:, put(torch.tensor([-1]))],
    "logits_at": lambda model, put: model(put(TOKENS), logits_at=put(torch.tensor([0, -1]))),
    "cache": lambda model, put: model.run_with_cache(put(TOKENS))[1].slice(
        batch=put(torch.tensor([1])), pos=put(torch.tensor([0, 2])), layers=put(torch.tensor([1]))
    ),
    "cache of the CPU": lambda model, put: model.run_with_cache(put(TOKENS), device="cpu")[1].to(model.device),
    "generate": lambda model, put: model.generate(put(TOKENS), 3),
    "sample rows of two lengths": lambda model, put: model.generate(
        [put(TOKENS[0]), put(TOKENS[1, :2])], 10, temperature=1.0, top_k=5, top_p=0.9, seed=0
    ),
    "loss": lambda model, put: loss(model, put(TOKENS), attention_mask=put(MASK)),
    "patch": lambda model, put: hl.patch(model, put(TOKENS), put(CORRUPTED), _difference(model, put)).table(),
    "patch by a metric of full logits": lambda model, put: hl.patch(
        model, put(TOKENS), put(CORRUPTED), kl(model, put(TOKENS)), site="z"
    ).table(),
    "patch in a tensor": lambda model, put: hl.patch(
        model, put(TOKENS), put(CORRUPTED), _difference(model, put), value=put(DIRECTION)
    ).table(),
    "paths": lambda model, put: path_patch(model, put(TOKENS), put(CORRUPTED), _difference(model, put)).table(),
    "ablate": lambda model, put: ablate(model, put(TOKENS), _difference(model, put), value=Resample()).table(),
    "logit_lens": lambda model, put: logit_lens(model, put(TOKENS)).table(),
    "trajectory": lambda model, put: trace_predictions(model, put(TOKENS), answer=put(torch.tensor([3, 4]))).table(),
    "attribution": lambda model, put: direct_logit_attribution(model, put(TOKENS), answer=put(torch.tensor([3, 4]))),
    "calibration": lambda model, put: measure_calibration(model, put(TOKENS)).table(),
    "knockout": lambda model, put: knock_out_keys(
        model, put(TOKENS), loss(model, put(TOKENS)), mask=put(torch.ones(2, 5, 5).tril(-1).bool())
    ).table(),
    "redundancy": lambda model, put: measure_redundancy(
        model, put(TOKENS), loss(model, put(TOKENS)), [(0, 0), (1, 1)], value=Mean(put(CORRUPTED))
    ).table(),
    "mediation": lambda model, put: measure_mediation(
        model, put(TOKENS), loss(model, put(TOKENS)), [(0, 0), (1, 1)], value=Mean(put(CORRUPTED))
    ).table(),
    "direction_ablation": lambda model, put: measure_direction_ablation(
        model,
        PromptPairs(put(TOKENS), None, _difference(model, put), group=put(torch.tensor([0, 1]))),
        put(DIRECTION),
        controls=5,
    ).table(),
    "edges": lambda model, put: run_edges(
        model,
        put(eap(model, put(TOKENS), put(CORRUPTED), _difference(model, put)).top_edges(9).kept),
        put(TOKENS),
        put(CORRUPTED),
        _difference(model, put),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_a_model_elsewhere_takes_arguments_of_the_cpu_and_of_its_own_device(device, name):
    model = there(tiny_model())
    VERBS[name](model, lambda x: x)
    VERBS[name](model, lambda x: x.to(device))


@pytest.mark.parametrize("positions", ["all", [-1], slice(-2, None)])
def test_edits_of_the_stream_take_directions_of_the_cpu(device, positions):
    model = there(tiny_model())
    for edit in (
        steer(model, DIRECTION, 2.0, site=("resid_pre", 1), positions=positions),
        ablate_direction(model, DIRECTION, positions=positions),
    ):
        with edit:
            assert model(TOKENS).device == model(TOKENS, attention_mask=MASK).device == device
            model.generate(TOKENS, 2)


def test_intervals_and_quantiles_stay_with_their_values(device):
    values = torch.linspace(0, 1, 9, device=device)
    assert statistics.quantiles(values, (0.0, 0.5)).tolist() == [0.0, 0.5]
    low, high = statistics.mean_interval(values, group=torch.arange(9))
    assert low.device == high.device == device and 0 < float(low) < 0.5 < float(high) < 1


# -- the methods


def test_completeness_and_minimality_of_a_circuit_run_elsewhere(device):
    """What the demo of `circuits` does, with fewer draws."""
    model = there(tiny_model())
    metric = _difference(model, lambda x: x)
    circuit = eap(model, TOKENS, CORRUPTED, metric).top_edges(6)
    with torch.no_grad():
        pairs = PromptPairs(TOKENS, CORRUPTED, metric, group=[0, 0])  # of one group, the shares are defined
        bench = Bench(model, pairs, circuit.replacement, keep=True)
        faithful, draw = Faithfulness.of(bench, circuit, 3, 0), torch.Generator().manual_seed(0)
        null = random_circuits(bench.graph, circuit.kept, 3, seed=0)
        results = [of(bench, faithful, null, draw) for of in (completeness_of, minimality_of)]
    for result in (faithful, circuit, *results):
        result.table()
        result.figure()
    assert 0 < results[0].p <= 1 and 0 < results[0].complement_p <= 1


OURS = [info.name for info in available() if info.package == "hooklens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_every_method_runs_elsewhere(name, tmp_path):
    result = find(name).demo()(there(induction_model()))
    result.table()
    result.figure()
    result.save(tmp_path / "result.safetensors")

"""On a GPU everything gives what it gives on the CPU, and nothing quietly goes back to the CPU. Skipped without one."""

import copy
import importlib

import pytest
import torch
from close import close
from model.zoo import TOKENS, ZOO, zoo_model

import hooklens as hl
from hooklens.metrics import kl, logit_diff
from hooklens.plugins import available
from hooklens.plugins.lens.layer_lens import logit_lens
from hooklens.plugins.patching.ablation import ablate
from hooklens.plugins.patching.path import path_patch
from hooklens.pretrained.checkpoint import save
from hooklens.testing import _tensors as tensors_of
from hooklens.testing import induction_model, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
CORRUPTED = TOKENS.roll(1, 1)


@pytest.fixture(autouse=True)
def full_float32():
    """TF32 products keep ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def both(name: str, dtype: torch.dtype = torch.float32):
    model = zoo_model(name, dtype=dtype)
    return model, copy.deepcopy(model).to("cuda")


def same_up_to_kernels(got: torch.Tensor, expected: torch.Tensor, ulps: float = 1000) -> bool:
    return got.is_cuda and close(got.cpu(), expected, ulps, equal_nan=True)


@pytest.mark.parametrize("name", ZOO)
def test_logits_and_every_activation_equal_those_of_the_cpu(name):
    model, there = both(name)
    logits, cache = model.run_with_cache(TOKENS)
    on_gpu, their_cache = there.run_with_cache(TOKENS.cuda())
    assert same_up_to_kernels(on_gpu, logits)
    assert list(cache) == list(their_cache)
    wrong = [point for point in cache if not same_up_to_kernels(their_cache[point], cache[point])]
    assert wrong == []


def test_tokens_on_the_cpu_are_moved_to_the_model():
    model = tiny_model().to("cuda")
    assert model(TOKENS).is_cuda
    assert model([[1, 2, 3]]).is_cuda


def test_padding_gives_the_same_answer_as_no_padding():
    model = zoo_model("qwen3").to("cuda")
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    padded = model(TOKENS.cuda(), attention_mask=mask.cuda())
    alone = model(TOKENS[:1, 2:].cuda())
    assert close(padded[:1, 2:].as_subclass(torch.Tensor), alone, 1000)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "neox", "sandwich_ln"])
def test_generation_takes_the_tokens_that_the_cpu_takes(name):
    model, there = both(name)
    out = there.generate(TOKENS.cuda(), 8, stop=())
    assert all(row.is_cuda for row in out.tokens)
    expected = model.generate(TOKENS, 8, stop=())
    assert [row.tolist() for row in out.tokens] == [row.tolist() for row in expected.tokens]


@pytest.mark.parametrize("site", ["resid_pre", "z", "q", "pattern", "mlp_out", "post"])
def test_a_sweep_equals_the_plain_loop_and_the_cpu(site):
    model, there = both("qwen3")
    metric = logit_diff(model, answer=[3, 4], wrong_answer=[5, 6])
    with hl.engine(verify=1000):
        here = hl.patch(model, TOKENS, CORRUPTED, metric, site=site)
        sweep = hl.patch(there, TOKENS.cuda(), CORRUPTED.cuda(), metric, site=site)
    assert close(sweep.values.cpu(), here.values, 1000)
    assert sweep.largest_error <= 1000 * torch.finfo(torch.float32).eps * float(here.values.abs().max())


def test_a_metric_of_full_logits_runs_on_the_device():
    model, there = both("qwen3")
    sweep = hl.patch(there, TOKENS.cuda(), CORRUPTED.cuda(), kl(there, TOKENS.cuda()))
    here = hl.patch(model, TOKENS, CORRUPTED, kl(model, TOKENS))
    assert close(sweep.values.cpu(), here.values, 10000)


def test_paths_and_ablations_equal_those_of_the_cpu():
    model, there = both("qwen3")
    metric = logit_diff(model, answer=[3, 4], wrong_answer=[5, 6])
    here = path_patch(model, TOKENS, CORRUPTED, metric)
    paths = path_patch(there, TOKENS.cuda(), CORRUPTED.cuda(), metric)
    assert close(paths.values.cpu(), here.values, 1000)
    here = ablate(model, TOKENS, metric, value="zero")
    without = ablate(there, TOKENS.cuda(), metric, value="zero")
    assert close(without.values.cpu(), here.values, 1000)


def test_a_lens_equals_that_of_the_cpu():
    model, there = both("qwen3")
    here, lens = logit_lens(model, TOKENS), logit_lens(there, TOKENS.cuda())
    assert lens.rank.tolist() == here.rank.tolist()
    assert close(lens.kl.cpu(), here.kl, 10000) and close(lens.entropy.cpu(), here.entropy, 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_watching_moves_half_precision_no_further_than_its_rounding(dtype):
    model = zoo_model("qwen3", dtype=dtype).to("cuda")
    plain = model(TOKENS.cuda())
    watched, _ = model.run_with_cache(TOKENS.cuda(), "pattern")
    assert close(watched.float(), plain.float(), 20 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)


def test_weights_round_trip_from_the_gpu(tmp_path):
    model = zoo_model("qwen3").to("cuda")
    path = tmp_path / "model.safetensors"
    save(model, path)
    back = hl.load(str(path), device="cuda")
    assert all(p.is_cuda for p in back.parameters())
    assert torch.equal(back(TOKENS.cuda()), model(TOKENS.cuda()))


PLUGINS = [info.name for info in available() if info.package == "hooklens"]


@pytest.mark.parametrize("name", PLUGINS)
def test_every_method_runs_on_the_gpu(name, tmp_path):
    module = importlib.import_module({info.name: info.module for info in available()}[name])
    model = induction_model()
    expected = module.demo(model)
    result = module.demo(copy.deepcopy(model).to("cuda"))
    assert len(result.table()) == len(expected.table())
    result.save(tmp_path / "result.safetensors")
    ours, theirs = dict(tensors_of(result)), dict(tensors_of(expected))
    assert ours.keys() == theirs.keys()
    assert all(one.shape == theirs[key].shape and one.dtype == theirs[key].dtype for key, one in ours.items())

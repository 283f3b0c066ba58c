"""Training on a GPU: the losses of the CPU, and processes that add their gradients over nccl. Skipped without one."""

import numpy as np
import pytest
import torch
from test_processes import RUN, torchrun

import hooklens as hl
from hooklens.model.shared_tokens import last_logits, shares_tokens
from hooklens.testing import tiny_model
from hooklens.training import AdamW, Settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.mark.parametrize("precision", ["model", "bfloat16"])
def test_a_run_on_the_gpu_has_the_losses_of_the_cpu(precision):
    data = hl.data.modular_arithmetic(p=7, fraction=0.7)
    dtype, most = (torch.float64, 1e-6) if precision == "model" else (torch.float32, 0.05)
    settings = Settings(batch=8, optimizer=AdamW(lr=0.01), clip=1.0, precision=precision)
    runs = []
    for device in ("cpu", "cuda"):
        model = tiny_model(d_vocab=data.d_vocab, dtype=dtype).to(device)
        runs.append(hl.train(model, data, steps=10, settings=settings))
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype)}
    on_cpu, on_gpu = runs
    assert np.abs(on_cpu.loss - on_gpu.loss).max() < most
    assert on_gpu.loss[-1] < on_gpu.loss[0]


def test_two_runs_that_share_equal_tokens_on_the_gpu_have_the_same_bits_and_the_logits_of_the_model():
    data = hl.data.modular_arithmetic(p=23, fraction=0.8)
    settings = Settings(batch=500, optimizer=AdamW(lr=0.01), schedule="constant")
    trained = []
    for _ in range(2):
        model = tiny_model(n_layers=1, d_vocab=data.d_vocab).to("cuda")
        hl.train(model, data, steps=30, settings=settings)
        trained.append(model)
    tokens = data.batch(0, 500).inputs.cuda()
    assert shares_tokens(trained[0], tokens)
    for first, second in zip(*(model.parameters() for model in trained), strict=True):
        assert torch.equal(first, second)
    logits = trained[0](tokens, logits_at=-1)
    assert (last_logits(trained[0], tokens) - logits).abs().max() < 1e-5 * logits.abs().max()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl gives each process a GPU of its own")
def test_two_processes_over_nccl_have_the_losses_of_one(tmp_path):
    text = RUN.replace("dropout=0.1)", 'dropout=0.1).to("cuda")')
    assert text != RUN
    for count in (1, 2):
        output, error = torchrun(tmp_path / str(count), text, count, 20)
        assert output.count("ended") == count, error
    one, two = (hl.open_run(tmp_path / str(count) / "run") for count in (1, 2))
    assert len(one.loss) == 20 and np.abs(one.loss - two.loss).max() < 1e-6

"""Training on a GPU: the losses of the CPU, and processes that add their gradients over nccl. Skipped without one."""

import numpy as np
import pytest
import torch
from test_processes import RUN, torchrun

import hooklens as hl
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl gives each process a GPU of its own")
def test_two_processes_over_nccl_have_the_losses_of_one(tmp_path):
    text = RUN.replace("dropout=0.1)", 'dropout=0.1).to("cuda")')
    assert text != RUN
    for count in (1, 2):
        output, error = torchrun(tmp_path / str(count), text, count, 20)
        assert output.count("ended") == count, error
    one, two = (hl.open_run(tmp_path / str(count) / "run") for count in (1, 2))
    assert len(one.loss) == 20 and np.abs(one.loss - two.loss).max() < 1e-6

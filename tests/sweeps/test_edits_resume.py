"""Methods that run many edits of one prompt go on from a file with the same bits, or refuse it."""

import threading
from dataclasses import fields, replace

import pytest
import torch
from test_path_resume import stopping
from torch import Tensor

import hooklens as hl
from hooklens.core.errors import CheckFailed, FileRefused, InputError
from hooklens.plugins.heads import measure_mediation, measure_redundancy
from hooklens.plugins.probing.probe_use import check_probe_use
from hooklens.plugins.probing.probes import Probe
from hooklens.plugins.probing.task import read_task
from hooklens.plugins.steering import SweepSettings, measure_direction_ablation, sweep_coefficients
from hooklens.testing import tiny_model

TOKENS, LENGTHS = [[i, 2, 3, 10 - i] for i in range(6)], [[1, 2, 3], [4, 5], [6, 7, 8]]
OTHER_TOKENS = [*TOKENS[:5], [5, 2, 3, 4]]
V = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FEW = SweepSettings(controls=3, written=1, new_tokens=2)
NEUTRAL = [[1, 2, 3], [4, 5]]


def third(logits):
    return logits[:, -1].log_softmax(-1)[:, 3]


def mediated(model, tokens=TOKENS, metric=third, heads=("L0H0", "L1H1"), **more):
    return measure_mediation(model, tokens, metric, heads, **more)


def paired(model, tokens=TOKENS, metric=third, heads=("L0H0", "L0H1", "L1H1"), **more):
    return measure_redundancy(model, tokens, metric, heads, **more)


def ablated(model, tokens=LENGTHS, metric=None, direction=V, **more):
    metric = hl.logit_diff(model, answer=3, wrong_answer=4) if metric is None else metric
    return measure_direction_ablation(model, tokens, direction, metric, controls=2, **more)


def swept(model, tokens=LENGTHS, metric=None, coefficients=(0.0, 1.0, 4.0), resume=None, **more):
    metric = hl.logit_diff(model, answer=3, wrong_answer=4) if metric is None else metric
    settings = replace(FEW, resume=resume)
    return sweep_coefficients(model, tokens, V, coefficients, metric, site=("resid_post", 0), settings=settings, **more)


def probed(model, tokens=TOKENS, metric=third, bias=0.0, **more):
    task, weight = read_task(model, tokens, [0, 1, 0, 1, 0, 1], pos=[1, 2, 1, 2, 2, 1]), torch.stack([-V, V]).float()
    probe = Probe(weight, torch.tensor([0.0, bias]), weight, point="blocks.0.hook_resid_post")
    return check_probe_use(model, probe, task, metric, draws=4, **more)


METHODS = {
    "mediation": mediated,
    "redundancy": paired,
    "direction ablation": ablated,
    "coefficients": swept,
    "probe": probed,
}
#: What makes it another question: prompts, the metric, and the edits.
OTHERS = {
    "mediation": ({"tokens": OTHER_TOKENS}, {"heads": ("L0H0", "L1H0")}, {"value": "zero"}),
    "probe": ({"tokens": OTHER_TOKENS}, {"bias": 1e-6}, {"strength": 1.5}, {"seed": 1}),
    "redundancy": ({"tokens": OTHER_TOKENS}, {"heads": ("L0H0", "L0H1", "L1H0")}, {"value": "zero"}),
    "direction ablation": (
        *({"tokens": [[1, 2, 3], [4, 5], [6, 7, 9]]}, {"direction": V + 1e-9}, {"sites": ("resid_post", 0)}),
        {"neutral": NEUTRAL},
    ),
    "coefficients": (
        {"tokens": [[1, 2, 3], [4, 5], [6, 7, 9]]},
        {"coefficients": (0.0, 1.0, 5.0)},
        {"neutral": NEUTRAL},
    ),
}


def same(a, b) -> None:
    for field in fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_method_resumed_gives_the_bits_of_an_uninterrupted_one(name, tmp_path, monkeypatch):
    model, method, file = tiny_model(), METHODS[name], tmp_path / "edits"
    bins = stopping(monkeypatch, 2)
    with hl.engine(memory=4_000, verify=0):
        with pytest.raises(KeyboardInterrupt):
            method(model, resume=file)
        assert file.exists()
        resumed, whole = method(model, resume=file), method(model)
    n = len(bins) // 2
    assert n > 2 and bins[:n] == bins[n:]
    same(resumed, whole)
    same(method(model, resume=file), whole)  # nothing is left to run
    assert len(bins) == 2 * n


@pytest.mark.parametrize("name", METHODS)
def test_other_prompts_edits_or_metrics_under_one_file_are_refused(name, tmp_path):
    model, method, file = tiny_model(), METHODS[name], tmp_path / "edits"
    method(model, resume=file)
    for changed in (*OTHERS[name], {"metric": hl.log_prob(model, answer=4)}):
        with pytest.raises(FileRefused, match="another sweep"):
            method(model, resume=file, **changed)
    with pytest.raises(FileRefused, match="another sweep"):
        method(tiny_model(seed=1), resume=file)


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_hashed_needs_a_name_and_a_wrong_name_is_seen(name, tmp_path):
    model, method, lock = tiny_model(), METHODS[name], threading.Lock()
    base = third(model(TOKENS)).detach()

    def moved(logits, by=1):
        with lock:
            return by * (third(logits) - base)

    with pytest.raises(InputError, match=r"only with the same sweep, and the metric.*lock.*give resume=hl\.Resume\("):
        method(model, TOKENS, moved, resume=tmp_path / "edits")
    named = hl.Resume(tmp_path / "edits", key="moved")
    same(method(model, TOKENS, moved, resume=named), method(model, TOKENS, moved, resume=named))
    with pytest.raises(CheckFailed, match=r"edit \d+, kept in .*edits, differs .* made by another sweep"):
        method(model, TOKENS, lambda logits: moved(logits, by=10), resume=named)


def test_an_interrupt_says_that_there_is_resume(monkeypatch):
    stopping(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        mediated(tiny_model())
    assert "measure_mediation(..., resume=path) keeps what is finished" in interrupt.value.__notes__[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_metric_that_is_nan_without_an_edit_was_laid_to_the_edit(name):
    """Steering said: NaN under an edit, though it is finite without."""
    with pytest.raises(InputError, match="the metric is NaN on the unedited prompts"):
        METHODS[name](tiny_model(), TOKENS, lambda logits: third(logits) * float("nan"))

"""An interrupted sweep of paths goes on with the same bits, or is refused; each thing is worked out once."""

import functools

import pytest
import torch
from model.zoo import zoo_model
from path_loop import HELD
from test_resume import CLEAN, CORRUPTED, Rounding, margin

import hooklens as hl
from hooklens.core.errors import CheckFailed, FileRefused
from hooklens.plugins.patching.path import Fixed, path_patch
from hooklens.sweeps import execution as engine
from hooklens.testing import tiny_model


@pytest.fixture
def model():
    found = zoo_model("llama", n_layers=3)
    for block in found.blocks:
        block.mlp.out = Rounding(block.mlp.out)
    return found


def stopping(monkeypatch, after: int):
    """Interrupt the engine once after so many bins; what it runs is noted."""
    right, bins, stops = engine._run_bin, [], [after]

    def run_bin(patches, reader, items, *rest):
        if len(bins) in stops:
            stops.clear()
            raise KeyboardInterrupt
        bins.append([(item.patch, item.pair) for item in items])
        right(patches, reader, items, *rest)

    monkeypatch.setattr(engine, "_run_bin", run_bin)
    return bins


@pytest.mark.parametrize("semantics", HELD)
def test_an_interrupted_path_sweep_resumed_gives_the_bits_of_an_uninterrupted_one(
    model, tmp_path, monkeypatch, semantics
):
    receivers = HELD[semantics]([("q", 2, 0), ("v", 1, 1), "MLP1"])
    patch = functools.partial(path_patch, model, CLEAN, CORRUPTED, margin, receivers=receivers)
    bins = stopping(monkeypatch, 2)
    with hl.engine(memory=12_000, verify=0):
        with pytest.raises(KeyboardInterrupt):
            patch(resume=tmp_path / "paths")
        resumed, whole = patch(resume=tmp_path / "paths"), patch()
    n = len(bins) // 2
    assert n > 2 and bins[:n] == bins[n:]
    assert torch.equal(resumed.per_pair, whole.per_pair)


def test_other_senders_receivers_semantics_or_metric_under_one_file_are_refused(model, tmp_path):
    patch = functools.partial(path_patch, model, CLEAN, CORRUPTED, resume=tmp_path / "paths")
    first = patch(margin, receivers=("q", 2, 0))
    assert torch.equal(patch(margin, receivers=("q", 2, 0)).per_pair, first.per_pair)
    for metric, changes in (
        (lambda logits: 2 * margin(logits), {}),
        (margin, {"receivers": ("q", 2, 1)}),
        (margin, {"receivers": Fixed(("q", 2, 0))}),
        (margin, {"senders": "heads"}),
        (margin, {"value": "corrupted"}),
    ):
        with pytest.raises(FileRefused, match="another sweep"):
            patch(metric, **({"receivers": ("q", 2, 0)} | changes))


def test_what_a_wrong_key_brings_back_is_checked_and_raises(model, tmp_path):
    named = hl.Resume(tmp_path / "paths", key="margin")
    base = margin(model(CORRUPTED)).detach()
    path_patch(model, CLEAN, CORRUPTED, lambda x: margin(x) - base, resume=named)
    with pytest.raises(CheckFailed, match=r"the patch of (L\dH\d|MLP\d), kept in .*paths.* another sweep"):
        path_patch(model, CLEAN, CORRUPTED, lambda x: 10 * (margin(x) - base), resume=named)


def test_paths_of_several_lengths_have_no_file(model, tmp_path):
    metric = hl.logit_diff(model, answer=[1, 2], wrong_answer=[3, 4])
    with pytest.raises(hl.HooklensError, match="prompts of one length"):
        path_patch(model, [[1, 2], [1, 2, 3]], [[1, 3], [1, 4, 3]], metric, resume=tmp_path / "paths")


def counting(monkeypatch, module, name):
    right, calls = getattr(module, name), []

    def counted(*rest, **named):
        calls.append(name)
        return right(*rest, **named)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("site", ["z", hl.site("z", 1)])
def test_a_sweep_makes_its_grid_and_asks_why_plain_once(monkeypatch, site):
    from hooklens.sweeps import measure
    from hooklens.sweeps import planning as plan

    grids = counting(monkeypatch, plan, "grid")
    reasons = counting(monkeypatch, engine, "why_plain"), counting(monkeypatch, measure, "why_plain")
    hl.patch(zoo_model("llama"), CLEAN, CORRUPTED, margin, site=site)
    assert len(grids) == 1 and [len(calls) for calls in reasons] == [1, 0]


def test_a_path_sweep_asks_why_plain_once(monkeypatch):
    from hooklens.sweeps import measure

    reasons = counting(monkeypatch, engine, "why_plain"), counting(monkeypatch, measure, "why_plain")
    path_patch(zoo_model("llama"), CLEAN, CORRUPTED, margin)
    assert [len(calls) for calls in reasons] == [1, 0]


def test_a_damaged_file_of_path_patching_was_to_be_written_again_by_activation_patching(tmp_path):
    model, file = tiny_model(), tmp_path / "paths"
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    hl.path_patch(model, [[1, 2, 3]], [[1, 4, 3]], metric, resume=file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(FileRefused, match=r"write it again with path_patch\(\.\.\., resume=path\)"):
        hl.path_patch(model, [[1, 2, 3]], [[1, 4, 3]], metric, resume=file)

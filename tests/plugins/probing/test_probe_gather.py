"""Activations gathered in batches are those of one prompt at a time, in memory and on disk."""

import importlib
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.core.errors import FileRefused, InputError
from hooklens.plugins.probing.gathering import gather
from hooklens.plugins.probing.task import read_task
from hooklens.testing import tiny_model

gathering = import_module("hooklens.plugins.probing.gathering")  # the package has a function of that name

gathering = importlib.import_module("hooklens.plugins.probing.gathering")  # the package has a function of that name
ROWS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [1], [3, 3]]
MODELS = {
    "plain": {},
    "rotary, grouped": {
        "n_heads": 4,
        "n_key_value_heads": 2,
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "normalization_type": "RMS",
    },
    "one layer": {"n_layers": 1},
}
SITES = ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "post", "result", "scale", "embed"]


def alone(model, row, point, pos):
    """The plain way: one prompt, one position."""
    _, cache = model.run_with_cache([row], names=[point])
    return cache[point][0, pos].flatten()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_single_prompts(name, site):
    model = tiny_model(**MODELS[name])
    acts = gather(model, ROWS, site=(site, 0, "ln1") if site == "scale" else site)
    for point, x in zip(acts.points, acts.x, strict=True):
        for row, found in zip(ROWS, x, strict=True):
            torch.testing.assert_close(found, alone(model, row, point, len(row) - 1), atol=2e-6, rtol=1e-5)
    assert acts.token.tolist() == [row[-1] for row in ROWS] and acts.pos.tolist() == [len(row) - 1 for row in ROWS]


def test_the_points_after_the_last_layer():
    model = tiny_model()
    for point in ("ln_final.hook_normalized", "unembed.hook_out", "hook_pos_embed"):
        acts = gather(model, ROWS, site=point)
        torch.testing.assert_close(acts.x[0, 2], alone(model, ROWS[2], point, 4), atol=2e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=9), min_size=1, max_size=7), st.integers(1, 40))
def test_how_prompts_are_batched_changes_nothing(rows, at_once):
    model = tiny_model(dtype=torch.float64)
    whole = gather(model, rows, pos=None)
    before = gathering._MOST_TOKENS
    try:
        gathering._MOST_TOKENS = at_once
        parts = gather(model, rows, pos=None)
    finally:
        gathering._MOST_TOKENS = before
    torch.testing.assert_close(parts.x, whole.x, atol=1e-12, rtol=1e-12)
    assert parts.prompt.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert parts.token.tolist() == [token for row in rows for token in row]


def test_the_context_is_the_mean_embedding_so_far():
    model = tiny_model(dtype=torch.float64)
    acts = gather(model, [[3, 5, 7]], pos=None)
    torch.testing.assert_close(acts.embed, model.W_E[[3, 5, 7]].detach())
    torch.testing.assert_close(acts.context[2], model.W_E[[3, 5, 7]].mean(0).detach())
    torch.testing.assert_close(acts.context[0], model.W_E[3].detach())


def test_a_task_is_read_at_its_own_positions():
    model = tiny_model()
    task = read_task(model, ROWS, [0, 1, 0, 1, 1], group=["a", "a", "b", "c", "b"], pos=[0, 1, -2, 0, -1])
    acts = gather(model, task, site=("resid_post", 1))
    assert acts.pos.tolist() == [0, 1, 3, 0, 1] and acts.group.tolist() == [0, 0, 1, 2, 1]
    torch.testing.assert_close(acts.at(1)[2], alone(model, ROWS[2], acts.points[0], 3), atol=2e-6, rtol=1e-5)


def test_disk_holds_what_memory_holds(tmp_path):
    model = tiny_model()
    memory, disk = gather(model, ROWS, pos=None), gather(model, ROWS, pos=None, folder=tmp_path / "acts")
    for name in ("x", "embed", "context", "token", "prompt", "pos", "group"):
        assert torch.equal(getattr(memory, name), getattr(disk, name))
    assert sorted(p.name for p in (tmp_path / "acts").iterdir()) == [
        "activations.json",
        "context.npy",
        "embed.npy",
        "x.npy",
    ]
    disk.x.zero_()
    assert torch.equal(gather(model, ROWS, pos=None, folder=tmp_path / "acts").x, memory.x)


class Stop(Exception):
    pass


def counted(monkeypatch, runs, stop_after=None):
    real = gathering._run

    def run(*args):
        runs.append(args)
        if stop_after is not None and len(runs) > stop_after:
            raise Stop
        return real(*args)

    monkeypatch.setattr(gathering, "_run", run)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "_MOST_TOKENS", 5)
    model, runs, again, done = tiny_model(), [], [], []
    with monkeypatch.context() as patch, pytest.raises(Stop):  # one run for the width, then two batches of four
        counted(patch, runs, stop_after=3)
        gather(model, ROWS, folder=tmp_path)
    assert (tmp_path / "x.npy.part").exists() and not (tmp_path / "x.npy").exists()
    with monkeypatch.context() as patch:
        counted(patch, again)
        acts = gather(model, ROWS, folder=tmp_path)
    assert len(again) == 1 + 2
    assert torch.equal(acts.x, gather(model, ROWS).x)
    with monkeypatch.context() as patch:
        counted(patch, done)
        gather(model, ROWS, folder=tmp_path)
    assert len(done) == 1


def test_a_folder_gives_no_unsteered_activations_to_somebody_who_steers(tmp_path):
    model = tiny_model()
    before = gather(model, ROWS, folder=tmp_path)
    push = lambda act, hook: act + 1  # noqa: E731
    with model.hooks(fwd_hooks=[(("resid_pre", 0), push)]):
        with pytest.raises(InputError, match="gather without folder"):
            gather(model, ROWS, folder=tmp_path)
        assert not torch.equal(gather(model, ROWS).x, before.x)
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, given, out: out * 0)
    with pytest.raises(InputError, match="hooks are active"):
        gather(model, ROWS, folder=tmp_path)
    handle.remove()
    assert torch.equal(gather(model, ROWS, folder=tmp_path).x, before.x)


def test_another_gathering_is_refused(tmp_path):
    model = tiny_model()
    gather(model, ROWS, folder=tmp_path)
    for other in (tiny_model(seed=1), model):
        with pytest.raises(FileRefused, match="other activations"):
            gather(other, ROWS[:3] if other is model else ROWS, folder=tmp_path)
    with pytest.raises(FileRefused, match="other activations"):
        gather(model, ROWS, site="resid_pre", folder=tmp_path)


def test_damage_is_refused(tmp_path):
    model = tiny_model()
    gather(model, ROWS, folder=tmp_path)
    stored = np.load(tmp_path / "x.npy", mmap_mode="r+")
    stored[1, 2, 3] += 1e-6
    stored.flush()
    with pytest.raises(FileRefused, match="damaged"):
        gather(model, ROWS, folder=tmp_path)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:200])
    with pytest.raises(FileRefused, match="damaged"):
        gather(model, ROWS, folder=tmp_path)
    (tmp_path / "x.npy").unlink()
    with pytest.raises(FileRefused, match=r"lacks x\.npy"):
        gather(model, ROWS, folder=tmp_path)
    (tmp_path / "activations.json").write_text("{")
    with pytest.raises(FileRefused, match="is not JSON"):
        gather(model, ROWS, folder=tmp_path)


def test_a_strangers_file_is_not_overwritten(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"mine")
    with pytest.raises(FileRefused, match="already exists"):
        gather(tiny_model(), ROWS, folder=tmp_path)
    assert (tmp_path / "x.npy").read_bytes() == b"mine"


def test_more_than_fits_goes_to_files_that_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    acts = gather(tiny_model(), ROWS, memory=100)
    assert torch.equal(acts.x, gather(tiny_model(), ROWS).x)
    assert not list(tmp_path.iterdir())


def test_errors_say_what_would_work():
    model = tiny_model()
    with pytest.raises(InputError, match="not one vector per position"):
        gather(model, ROWS, site="pattern")
    with pytest.raises(InputError, match="vectors of one size,"):
        gather(model, ROWS, site=["resid_post", "post"])
    with pytest.raises(InputError, match="position 4 is out of range for prompt 1"):
        gather(model, ROWS, pos=[0, 4, 0, 0, 0])
    with pytest.raises(InputError, match="got 2 for 5 prompts"):
        gather(model, ROWS, pos=[0, 1])
    acts = gather(model, ROWS, site=["embed", "resid_post"])
    with pytest.raises(InputError, match="names 0 of the points"):
        acts.at(7)


def test_activations_are_a_result(tmp_path):
    acts = gather(tiny_model(), ROWS)
    acts.save(tmp_path / "acts.safetensors")
    assert torch.equal(type(acts).load(tmp_path / "acts.safetensors").x, acts.x)
    assert len(acts.table(1)) == 1 and acts.figure().data

"""Bars: they move while work is done, show in notebooks too, and can be switched off."""

import sys
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import hooklens as hl
from hooklens.core import progress_bar as bars
from hooklens.data.demo_prompts import demo_pairs
from hooklens.plugins.circuits.integrated_edges import eap_ig, eap_ig_activations
from hooklens.plugins.patching.path import path_patch
from hooklens.plugins.probing import probe_texts
from hooklens.sweeps import execution as execute
from hooklens.testing import tiny_model

CLEAN, CORRUPTED = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 5, 3, 4]])


@contextmanager
def recording(module, monkeypatch):
    """What each bar of a module was told: total and amounts."""
    told = []

    @contextmanager
    def record(title, total, **kwargs):
        amounts = []
        told.append((total, amounts))
        yield lambda amount=1: amounts.append(amount)

    monkeypatch.setattr(module, "progress", record)
    yield told


def diff(model):
    return hl.logit_diff(model, answer=1, wrong_answer=2)


@pytest.mark.parametrize("site", ["resid_pre", "z", "mlp_out"])
def test_the_bar_of_a_sweep_that_fits_one_bin_stood_at_0_and_jumped_to_full(site, monkeypatch):
    model = tiny_model(n_layers=5)
    with recording(execute, monkeypatch) as told:
        hl.patch(model, CLEAN, CORRUPTED, diff(model), site=site)
    ((total, amounts),) = told
    assert len(amounts) >= 4 and max(amounts) < 0.5 * total  # a layer at a time
    assert sum(amounts) == pytest.approx(total, rel=1e-12) and min(amounts) > 0


def test_the_bar_of_a_path_sweep_moves_with_the_layers(monkeypatch):
    model = tiny_model(n_layers=5)
    with recording(execute, monkeypatch) as told:
        path_patch(model, CLEAN, CORRUPTED, diff(model), receivers=[("v", 2, 0)])
    for total, amounts in told:
        assert len(amounts) > 1 and sum(amounts) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("method", [eap_ig, eap_ig_activations])
def test_the_bar_of_integrated_gradients_moves_with_its_steps(method, monkeypatch):
    model = tiny_model()
    with recording(import_module("hooklens.plugins.circuits.edge_attribution"), monkeypatch) as told:
        method(model, demo_pairs(model, 2), steps=4)
    ((total, amounts),) = told
    assert len(amounts) >= 4 and sum(amounts) == pytest.approx(total, rel=1e-12)


def on_a_terminal(monkeypatch):
    """To be called in the test itself: what a fixture sets on the captured stream is lost."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stream for a terminal
    monkeypatch.setenv("TERM", "xterm")


def count():
    with bars.progress("counting", 3) as advance:
        advance()


def test_bars_are_switched_off_by_a_block_and_by_the_environment(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    count()
    assert "counting" in capsys.readouterr().err
    with hl.engine(progress=False):
        count()
    assert not capsys.readouterr().err
    monkeypatch.setenv("HOOKLENS_PROGRESS", "0")
    count()
    assert not capsys.readouterr().err
    with hl.engine(progress=True):  # the nearest says it
        count()
    assert "counting" in capsys.readouterr().err
    with pytest.raises(hl.HooklensError, match="True, False or None"):
        hl.engine(progress="no")


def test_engine_switched_off_the_bars_of_sweeps_only(monkeypatch, capsys):
    """Probing, lenses and steering drew theirs all the same."""
    on_a_terminal(monkeypatch)
    texts = [[i, j] for i in range(6) for j in (1, 2)]
    with hl.engine(progress=False):
        probe_texts(tiny_model(n_layers=1), texts, [row[1] for row in texts], site="resid_pre")
    assert not capsys.readouterr().err


def test_a_bar_within_a_bar_shares_its_display(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    with bars.progress("outer", 2) as advance, bars.progress("inner", 2):
        display = bars._display.get()
        assert [task.description for task in display.tasks] == ["outer", "inner"]
        advance()
    assert bars._display.get() is None and "inner" in capsys.readouterr().err


def test_a_notebook_showed_no_bar(monkeypatch):
    """Rich draws them there with ipywidgets only."""
    shown = []
    cell = SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    display = SimpleNamespace(display=lambda data, raw, display_id: cell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(bars, "_REDRAW", 0)
    count()
    assert any("counting" in text and "1/3" in text for text in shown)
    assert shown[-1] == ""  # nothing is left behind
    with hl.engine(progress=False):
        shown.clear()
        count()
    assert not shown

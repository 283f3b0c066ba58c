"""The page of a run: layers are judged by its stated criteria, words are text, and a watched page ends with its run."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import open_page

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.data.markov_chains import markov_source
from hooklens.studies.layer_health import CRITERIA, judge_layers
from hooklens.studies.run_page import _snapshots, run_report, run_state, watch_run
from hooklens.testing import tiny_model
from hooklens.training.divergence import Diverged
from hooklens.training.loop import train
from hooklens.training.run_drawing import Thinned
from hooklens.training.run_folder import RunFolder
from hooklens.viz.report import Report

N = 200
STEADY = np.ones(N)
LAYERS = ["embed", "blocks.0", "blocks.1"]


def verdicts(gradient=STEADY, parameter=STEADY):
    """Those of three layers, of which the last has these norms."""
    gradients, parameters = np.stack([STEADY, STEADY, gradient], 1), np.stack([STEADY, STEADY, parameter], 1)
    judged = judge_layers(LAYERS, gradients, parameters)
    assert [layer.verdict for layer in judged[:2]] == ["healthy", "healthy"]
    return judged[2]


def spike(at, height):
    norms = STEADY.copy()
    norms[at] = height
    return norms


STEPS = np.arange(1, N + 1)


@pytest.mark.parametrize(
    ("gradient", "parameter", "verdict"),
    [
        (STEADY, STEADY, "healthy"),
        (np.full(N, 0.9e-3), STEADY, "vanishing"),
        (np.full(N, 1.1e-3), STEADY, "healthy"),
        (np.zeros(N), STEADY, "vanishing"),
        (1.0 / STEPS**2, STEADY, "vanishing"),
        (spike(150, 101.0), STEADY, "exploding"),
        (spike(150, 99.0), STEADY, "healthy"),
        (spike(3, 1e6), STEADY, "healthy"),  # the first tenth: a start is not steady
        (10.0 ** (STEPS / 20), STEADY, "exploding"),
        (STEADY, STEPS.astype(float), "growing"),
        (STEADY, STEPS**0.5, "growing"),
        (STEADY, STEPS**0.1, "healthy"),  # 7 % per doubling
        (STEADY, 10 + np.minimum(STEPS, 60), "healthy"),  # has stopped
        (STEADY, 1.0 / STEPS, "healthy"),
        (spike(190, 1e4), STEPS.astype(float), "exploding, growing"),
    ],
)
def test_layers_are_judged_by_the_stated_criteria(gradient, parameter, verdict):
    judged = verdicts(gradient, parameter)
    assert judged.verdict == verdict
    assert bool(judged.sentence) == (verdict != "healthy")
    assert judged.sentence.count("blocks.1:") == (0 if verdict == "healthy" else verdict.count(",") + 1)


def test_layers_without_any_gradient_were_healthy_where_they_were_the_majority():
    norms = np.stack([STEADY, *[0 * STEADY] * 6, STEADY], 1)  # as of a model whose six blocks are dead
    judged = judge_layers([f"layer {i}" for i in range(8)], norms, np.ones_like(norms))
    assert [layer.verdict for layer in judged] == ["healthy", *["vanishing"] * 6, "healthy"]


def test_one_jump_of_the_parameters_was_growth_without_bound():
    jump = np.where(STEPS > 120, 70.0, 1.0)
    assert verdicts(parameter=jump).verdict == "healthy"
    late = np.where(STEPS > 100, STEPS / 100, 1.0)  # as after a warm-up: one doubling is not yet a trend
    assert verdicts(parameter=late).verdict == "healthy"


def test_an_explosion_is_told_with_its_step():
    assert "200 in step 151, where 1 was usual" in verdicts(spike(150, 200.0)).sentence


def test_a_run_of_few_steps_is_not_judged():
    assert {layer.verdict for layer in judge_layers(LAYERS, np.ones((19, 3)), np.ones((19, 3)))} == {"too early"}


def test_long_series_are_thinned_and_no_spike_is_lost():
    values = np.random.default_rng(0).random(10_000)
    values[7_777] = 50.0
    thin = Thinned(np.arange(10_000), most=100)
    assert len(thin.at) <= 100 and thin.at[0] == 1 and thin.at[-1] == 10_000
    sizes = torch.diff(thin.at, prepend=torch.zeros(1, dtype=torch.float64))
    assert float((thin.means(values) * sizes).sum()) == pytest.approx(values.sum())
    assert float(thin.largest(values).max()) == 50.0 and thin.largest(np.ones((10_000, 3))).shape == (len(thin.at), 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = hl.training.Settings(batch=4, evaluate=4, checkpoints=3)
    out = tmp_path_factory.mktemp("runs") / "<b>first"
    return train(tiny_model(d_vocab=5), markov_source(5, window=8), steps=24, out=out, settings=settings)


def test_a_run_draws_its_losses_and_its_rate(run):
    figure = run.figure()
    training, held_out, rate = figure.data
    np.testing.assert_allclose(training.y, run.loss)
    np.testing.assert_allclose(held_out.y, run.held_out_loss[1:])
    assert list(held_out.x) == [6, 12, 18, 24] and rate.y[0] == pytest.approx(1e-3)
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type, figure.layout.yaxis2.type) == ("log", "log", None)
    assert figure.layout.shapes[0].y0 == pytest.approx(run.held_out_loss[0])


def test_a_run_without_a_step_has_no_figure_and_a_page_that_says_so(tmp_path):
    class Stop(Exception):
        pass

    def stop(size):
        raise Stop

    data = markov_source(5, window=8)
    object.__setattr__(data, "held_out", stop)  # called before the first step
    with pytest.raises(Stop):
        train(tiny_model(d_vocab=5), data, steps=3, out=tmp_path / "run")
    begun = hl.open_run(tmp_path / "run")
    with pytest.raises(InputError, match="no recorded step to draw yet"):
        begun.figure()
    page = run_report(begun).to_html()
    assert "No step is recorded yet." in page and "stopped" in page and "0 of 3" in page


def test_the_page_shows_everything_and_works_in_a_browser(run, tmp_path):
    page = run_report(run).save(tmp_path / "a.html")
    seen = open_page(page)
    assert (seen.console, seen.requests, seen.figures) == ([], [], 7)
    text = page.read_text()
    for words in ("24 of 24", "finished", CRITERIA[:40], "Update ratios by layer", "cosine", "Loss by position"):
        assert words in text
    assert "&lt;b&gt;first" in text and "<b>first" not in text
    assert "step_000000024.safetensors" in text and "checkpoints()[-1].load()" in text
    assert "transition probabilities" in text  # what there is to learn
    assert "Attention on fixed prompts" not in text


def test_a_diverged_run_was_only_stopped(tmp_path):
    settings = hl.training.Settings(optimizer={"part": "sgd", "lr": 1e9}, schedule="constant")
    with pytest.raises(Diverged):
        train(tiny_model(d_vocab=5), markov_source(5, window=8), steps=24, out=tmp_path / "run", settings=settings)
    run = hl.open_run(tmp_path / "run")
    page = run_report(run).to_html()
    assert run_state(run) == "diverged" and "<dd>diverged</dd>" in page
    assert "training diverged: the " in page and "The last checkpoint before it: " in page


def test_the_unit_of_the_loss_was_not_on_its_axis(run):
    titles = [figure.layout.yaxis.title.text for figure in (run.figure(),)]
    assert titles == ["loss per target (nats)"]
    page = run_report(run).to_html()
    assert "loss of a held-out target (nats)" in page and "mean loss (nats)" in page


def test_the_token_losses_have_a_place_on_the_slider_for_each_evaluation(run):
    page = run_report(run).to_html()
    assert page.count('"method":"animate"') == 5
    assert int(run.evaluations()["histogram"].sum(1)[0]) > 0


class Fake:
    """Snapshots of four steps on two prompts: all heads of one layer, and one head of another."""

    steps = np.array([0, 1, 10, 100])
    prompts = [[1, 2, 3], [4, 5, 6]]
    names = ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern L1H7", "blocks.0.hook_resid_pre"]

    def __getitem__(self, name):
        shape = {self.names[0]: (4, 2, 8, 3, 3), self.names[1]: (4, 2, 3, 3)}[name]
        return np.random.default_rng(0).random(shape)


def test_snapshots_show_the_heads_that_changed_most_over_a_slider():
    report = Report("x")
    _snapshots(report, Fake(), SimpleNamespace(to_string=lambda ids: "<i>" * ids[0]))
    page = report.to_html()
    assert page.count('class="plot"') == 2 and page.count('"method":"animate"') == 8
    assert "L1H7" in page and "Of the 9 heads in the snapshots, the 6 whose patterns changed most" in page
    assert "<i><i>" not in page
    empty = Report("x")
    _snapshots(empty, SimpleNamespace(steps=np.array([]), names=[]))
    assert empty.to_html() == Report("x").to_html()


def test_snapshots_of_long_prompts_made_a_page_too_large_to_open():
    class Long(SimpleNamespace):
        def __getitem__(self, name):
            return np.random.default_rng(0).random((2, 5, 100, 100)).astype(np.float32)

    long = Long(steps=np.arange(2), prompts=[list(range(100))] * 5, names=[Fake.names[1]])
    report = Report("x")
    _snapshots(report, long)
    page = report.to_html()
    assert page.count('class="plot"') == 4 and page.count("Of 100 tokens, the first 64 are shown.") == 4
    assert "whose patterns changed most" not in page  # the only head is shown
    assert len(page) - len(Report("x").figure(hl.viz.lines({"a": torch.ones(2)})).to_html()) < 2**21


@pytest.mark.slow
def test_a_watched_page_reloads_itself_until_the_run_ends(tmp_path):
    out, pages = tmp_path / "page.html", []
    go_on, begun = threading.Event(), threading.Event()

    def pause(step, _):
        if step == 12:
            begun.set()
            assert go_on.wait(60)

    data, folder = markov_source(5, window=8), tmp_path / "run"
    training = threading.Thread(
        target=train, args=(tiny_model(d_vocab=5), data), kwargs={"steps": 24, "out": folder, "after_step": pause}
    )
    training.start()
    assert begun.wait(60)

    def wait(seconds):
        pages.append(out.read_text())
        go_on.set()
        training.join(60)

    run = hl.open_run(folder)
    assert run_state(run) == "running"
    assert watch_run(run, out, wait=wait) == "finished"
    assert len(pages) == 1 and "location.reload()" in pages[0] and "running" in pages[0]
    assert "location.reload()" not in out.read_text() and "24 of 24" in out.read_text()


@pytest.mark.slow
def test_a_watch_that_is_interrupted_leaves_a_page_that_stays(run, tmp_path):
    def interrupt(seconds):
        assert "location.reload()" in (tmp_path / "a.html").read_text()
        raise KeyboardInterrupt

    with RunFolder(run.path).writing():
        assert run_state(run) == "running"
        with pytest.raises(KeyboardInterrupt):
            watch_run(run, tmp_path / "a.html", wait=interrupt)
    assert "location.reload()" not in (tmp_path / "a.html").read_text()


def test_a_run_that_stopped_early_is_finished_and_one_that_was_killed_is_not(run, tmp_path):
    class Interrupted(Exception):
        pass

    def stop(step, _):
        if step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tiny_model(d_vocab=5), markov_source(5, window=8), steps=24, out=tmp_path / "a", after_step=stop)
    assert run_state(hl.open_run(tmp_path / "a")) == "stopped"
    assert run_state(run) == "finished"
    settings = hl.training.Settings(optimizer={"part": "sgd", "lr": 1e-12}, patience=1, evaluate=12)
    early = train(tiny_model(d_vocab=5), markov_source(5, window=8), steps=24, out=tmp_path / "b", settings=settings)
    assert early.steps_done < 24 and run_state(early) == "finished"

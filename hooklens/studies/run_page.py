"""The page of a run: what it learns, whether its layers are healthy, and what its heads look at while it trains."""

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hooklens.core.arguments import real
from hooklens.results.table import Table
from hooklens.studies.layer_health import CRITERIA, TERMS, judge_layers, layer_table
from hooklens.training.recorder import LOSS_EDGES, ends_early
from hooklens.training.row_file import Rows
from hooklens.training.run_drawing import Thinned, loss_figure, loss_unit, rate_figure, rows_so_far
from hooklens.training.run_folder import RunFolder
from hooklens.training.training_run import Checkpoint, Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from hooklens.viz.report import Report

RUNNING, FINISHED, STOPPED, DIVERGED = "running", "finished", "stopped", "diverged"
_FRAMES = 30  # positions of a slider
_HEADS, _PROMPTS, _TOKENS = 6, 4, 64  # of the snapshots are shown, as a page of all of them may not open
_RECENT = 100  # steps of the training loss in large type
_HEALTHY = "No layer's gradient vanishes or explodes, and no layer's parameters grow without bound."
_EVERY = 3.0  # seconds between two pages of a run under way
_REST = 3.0  # seconds between two pages, for each second of work on one


def run_state(run: Run) -> str:
    """Is a run running, finished, stopped before its end, or did it diverge?"""
    steps, evaluations = rows_so_far(run.path)
    complete = steps is not None and int(steps.steps[-1]) + 1 >= run.identity["steps"]
    complete |= evaluations is not None and ends_early(evaluations, run.identity["settings"])
    written = RunFolder(run.path).is_being_written()
    if written or (written is None and not complete):
        return RUNNING
    if RunFolder(run.path).noted_divergence() is not None:
        return DIVERGED
    return FINISHED if complete else STOPPED


def run_report(run: Run) -> "Report":
    """The page of a run, finished or under way.

    >>> from hooklens.data.markov_chains import markov_source
    >>> from hooklens.testing import tiny_model
    >>> from hooklens.training.loop import train
    >>> run = train(tiny_model(d_vocab=5), markov_source(5, window=8), steps=2)
    >>> "Token losses" in run_report(run).to_html()
    True
    """
    from hooklens.viz.report import Report

    state = run_state(run)
    steps, evaluations = rows_so_far(run.path)
    report = Report(f"Training run {run.path.resolve().name}")
    if learnt := run.identity.get("to_learn"):
        report.text(f"To learn: {learnt.rstrip('.')}.")
    report.numbers(_headline(run, state, steps, evaluations))
    if state == STOPPED:
        report.text("The run was stopped before its end. What started it goes on from its last saved state.")
    if state == DIVERGED:
        report.text(f"The run stopped itself: {RunFolder(run.path).noted_divergence()}.")
    if steps is None:
        report.text("No step is recorded yet.")
    else:
        _losses(report, loss_figure(steps, evaluations, loss_unit(run.identity)))
        _layers(report, run.layers, steps)
        _rate(report, run, steps)
    if evaluations is not None:
        _token_losses(report, evaluations, loss_unit(run.identity))
    if evaluations is not None and run.identity["settings"].get("snapshots") and run.checkpoints():
        snapshots = run.snapshots()
        _snapshots(report, snapshots, _tokenizer_of(run.checkpoints()[0]))
    _settings(report, run)
    return _checkpoints(report, run)


def watch_run(
    run: Run, out: str | os.PathLike, *, every: float = _EVERY, wait: Callable[[float], Any] = time.sleep
) -> str:
    """Write the page every few seconds until the run ends; the page reloads itself. Returns how the run ended.

    A page that takes long to draw is written less often, so that most of the machine is left to the run. The last page
    does not reload itself, also if this is interrupted.
    """
    real("every", every, 0.1)
    pause = every
    try:
        while (state := run_state(run)) == RUNNING:
            began = time.process_time()
            run_report(run).save(out, reload=pause)
            pause = max(every, _REST * (time.process_time() - began))
            wait(pause)
    except KeyboardInterrupt:
        run_report(run).save(out)
        raise
    run_report(run).save(out)
    return state


def _headline(run: Run, state: str, steps: Rows | None, evaluations: Rows | None) -> dict[str, Any]:
    """What is shown in large type."""
    done, planned = 0 if steps is None else len(steps.steps), run.identity["steps"]
    shown: dict[str, Any] = {"state": state, "steps": f"{done:,} of {planned:,}"}
    if evaluations is not None:
        losses = evaluations["loss"]
        best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
        shown["held-out loss"] = float(losses[-1])
        shown["lowest held-out loss"] = float(losses[best])
        shown["lowest after step"] = f"{int(evaluations.steps[best]):,}"
    if steps is not None:
        shown[f"training loss, last {min(_RECENT, done)} steps"] = float(steps["loss"][-_RECENT:].mean())
        shown["time in training steps"] = _duration(float(steps["seconds"].sum()))
        if state == RUNNING:
            shown["time left"] = _duration(float(np.median(steps["seconds"][-_RECENT:])) * (planned - done))
    return shown


def _duration(seconds: float) -> str:
    """Seconds in words.

    >>> _duration(42.0), _duration(90.0), _duration(7300.0)
    ('42 s', '1 min 30 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _losses(report: "Report", figure: "Figure") -> None:
    report.figure(
        figure,
        "The loss is the mean over all predicted targets; for tokens it is the cross-entropy in nats: minus the "
        "natural logarithm of the probability that the model gave to the token. Training: the batch of each step. Held "
        "out: data that no step trains on. Both axes are logarithmic: a power law is a straight line. Of long runs, "
        "each point is the mean of the steps since the point before.",
    )


def _layers(report: "Report", layers: Sequence[str], steps: Rows) -> None:
    """Verdicts in words, the numbers behind them, and norms against steps."""
    from hooklens.viz.curves import lines

    gradients, parameters, changes = (steps[f"{kind}_norms"] for kind in ("gradient", "parameter", "change"))
    report.heading("Layers")
    judged = judge_layers(layers, gradients, parameters)
    sentences = [layer.sentence for layer in judged if layer.sentence]
    if all(layer.verdict == "too early" for layer in judged):
        sentences = ["It is too early to judge the layers."]
    for sentence in sentences or [_HEALTHY]:
        report.text(sentence)
    report.text(CRITERIA)
    report.table(layer_table(layers, gradients, parameters, changes), "The layers from input to output.", TERMS)
    thin = Thinned(steps.steps)
    ratios = changes / np.maximum(parameters, np.finfo(np.float32).tiny)
    kinds = {
        "Gradient norms by layer": (
            thin.largest(gradients),
            "The length of the gradient of the loss in each layer's parameters, before clipping. Of long runs, each "
            "point is the largest of the steps since the point before, so that no spike is lost.",
        ),
        "Parameter norms by layer": (
            thin.means(parameters),
            "The length of each layer's parameters as one vector. It settles where weight decay balances the steps, or "
            "where the learning rate comes near 0.",
        ),
        "Update ratios by layer": (
            thin.means(ratios),
            "How far each step moves a layer, as a share of its parameters' length. Values about 0.001 are common.",
        ),
    }
    for title, (values, caption) in kinds.items():
        series, what = {layer: values[:, i] for i, layer in enumerate(layers)}, title.partition(" by ")[0].lower()
        report.figure(lines(series, thin.at, title=title, x_title="step", y_title=what, log="xy"), caption)


def _rate(report: "Report", run: Run, steps: Rows) -> None:
    settings = run.identity["settings"]
    schedule, optimizer = settings.get("schedule", {}), settings.get("optimizer", {})
    report.heading("Learning rate").figure(
        rate_figure(steps),
        f"The schedule {_fields(schedule)} gives the factor of each step; the optimiser's own rate is that of "
        f"{_fields(optimizer)}. Warm-up: the first steps, over which the rate rises linearly to its full value.",
    )


def _fields(part: Any) -> str:
    """A part of the settings in one line.

    >>> _fields({"part": "cosine", "warmup": 10})
    'cosine (warmup 10)'
    """
    if not isinstance(part, dict):
        return str(part)
    values = ", ".join(f"{name} {_fields(value)}" for name, value in part.items() if name != "part")
    return f"{part.get('part', '')} ({values})" if values else str(part.get("part", ""))


def _token_losses(report: "Report", evaluations: Rows, unit: str) -> None:
    """The histogram of the losses of all held-out targets, and the mean loss at each position."""
    from hooklens.viz.curves import lines
    from hooklens.viz.histograms import histogram
    from hooklens.viz.sliders import slider

    ratio = LOSS_EDGES[1] / LOSS_EDGES[0]
    edges = torch.from_numpy(np.concatenate([[LOSS_EDGES[0] / ratio], LOSS_EDGES, [LOSS_EDGES[-1] * ratio]]))
    titles = {"title": "Token losses", "x_title": f"loss of a held-out target{unit}", "y_title": "targets"}
    frames = {
        f"{int(evaluations.steps[i]):,}": histogram(
            torch.from_numpy(evaluations["histogram"][i].astype(np.float64)), edges, **titles, log="x"
        )
        for i in _spread(len(evaluations.steps))
    }
    report.heading("Held-out data").figure(
        slider(frames, title="after step"),
        "How many held-out targets have which loss, which the mean hides: targets that the model predicts are on the "
        "left, those that surprise it on the right. The first and last bin also hold everything below and above. The "
        "slider chooses the evaluation.",
    )
    by_position = torch.from_numpy(evaluations["by_position"].astype(np.float64))
    chosen = {f"after step {int(evaluations.steps[i]):,}": by_position[i] for i in _spread(len(by_position), 4)}
    report.figure(
        lines(chosen, title="Loss by position", x_title="position in the row", y_title=f"mean loss{unit}"),
        "The mean held-out loss at each position. Where rows begin anywhere in a text, no position is easier by "
        "itself: a loss that falls from left to right then means that the model uses the context.",
    )


def _spread(n: int, most: int = _FRAMES) -> list[int]:
    """At most so many of `n` places at equal distances, the first and the last among them.

    >>> _spread(3), _spread(100, 4)
    ([0, 1, 2], [0, 33, 66, 99])
    """
    return sorted({round(float(i)) for i in np.linspace(0, n - 1, min(n, most))})


def _snapshots(report: "Report", snapshots: Any, tokenizer: Any = None) -> None:
    """What the heads attend to on fixed prompts, over the run; nothing if no pattern was kept."""
    from hooklens.viz.sliders import slider

    patterns = {} if snapshots is None or not len(snapshots.steps) else _patterns(snapshots)
    if not patterns:
        return
    heads = _most_changed(patterns)
    caption = (
        "Where each head attends: query down, key across; a row is how the query's attention is shared out. L1H0 is "
        "head 0 of layer 1. "
    )
    if len(heads) < len(patterns):
        caption += f"Of the {len(patterns)} heads in the snapshots, the {len(heads)} whose patterns changed most from "
        caption += "the first to the last are shown. "
    report.heading("Attention on fixed prompts")
    for number, prompt in enumerate(snapshots.prompts[:_PROMPTS]):
        cut = f"Of {len(prompt)} tokens, the first {_TOKENS} are shown. " if len(prompt) > _TOKENS else ""
        str_tokens = [_shown_token(token, tokenizer) for token in prompt[:_TOKENS]]
        of_prompt = {head: pattern[:, number, :_TOKENS, :_TOKENS] for head, pattern in heads.items()}
        frames = _attention_frames(snapshots.steps, of_prompt, str_tokens, title=f"Prompt {number + 1}")
        report.figure(slider(frames, title="after step"), f"{caption}{cut}The slider chooses the step.")


def _attention_frames(
    steps: np.ndarray, patterns: dict[str, np.ndarray], str_tokens: list[str], *, title: str
) -> dict[str, "Figure"]:
    """A figure of all heads for each of at most 30 steps; those before the last hold nothing but their numbers."""
    from plotly.graph_objects import Figure, Heatmap

    from hooklens.viz.head_drawing import attention_heads

    shown = _spread(len(steps))
    frames = {}
    for i in shown[:-1]:
        maps = [pattern[i] for pattern in patterns.values()]
        colours = {"cmin": min(0.0, *(float(z.min()) for z in maps)), "cmax": max(float(z.max()) for z in maps)}
        frames[f"{int(steps[i]):,}"] = Figure([Heatmap(z=z) for z in maps], layout={"coloraxis": colours})
    last = torch.from_numpy(np.stack([pattern[shown[-1]] for pattern in patterns.values()]))
    frames[f"{int(steps[shown[-1]]):,}"] = attention_heads(last, str_tokens, list(patterns), title=title)
    return frames


def _shown_token(token: Any, tokenizer: Any) -> str:
    """A token as text if there is a tokenizer; an input that is a vector has no name."""
    if not isinstance(token, int):
        return "·"
    return str(token) if tokenizer is None else tokenizer.to_string([token])


def _patterns(snapshots: Any) -> dict[str, np.ndarray]:
    """The patterns `step prompt query_pos key_pos` of all heads in the snapshots, in the model's order."""
    patterns: dict[str, np.ndarray] = {}
    for name in snapshots.names:
        point, _, head = name.partition(" ")  # a name is that of a point, or ends with the head that was kept
        if not point.endswith("hook_pattern"):
            continue
        values, layer = np.asarray(snapshots[name], dtype=np.float32), point.split(".")[1]
        if head:
            patterns[head] = values
        else:
            patterns |= {f"L{layer}H{i}": values[:, :, i] for i in range(values.shape[2])}
    return patterns


def _most_changed(patterns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The heads that changed most, in the same order."""
    moved = {head: float(np.abs(pattern[-1] - pattern[0]).sum()) for head, pattern in patterns.items()}
    furthest = set(sorted(moved, key=lambda head: -moved[head])[:_HEADS])
    return {head: pattern for head, pattern in patterns.items() if head in furthest}


@functools.lru_cache(maxsize=4)
def _tokenizer_of(checkpoint: Checkpoint) -> Any:
    return checkpoint.load().tokenizer


def _settings(report: "Report", run: Run) -> None:
    """Everything that the run can be repeated from."""
    report.heading("Settings")
    identity = run.identity
    parts = {
        "How it trains.": identity["settings"],
        "The model's configuration. Names are those of `hl.HookedTransformerConfig`.": identity["config"],
        "The data. tokens and similar long words are checksums of the data.": identity["data"],
    }
    for caption, values in parts.items():
        report.table(Table(("setting", "value"), [(name, _plain(value)) for name, value in values.items()]), caption)


def _plain(value: Any) -> str:
    if isinstance(value, dict) and "part" in value:
        return _fields(value)
    return value if isinstance(value, str) else json.dumps(value)


def _checkpoints(report: "Report", run: Run) -> "Report":
    """Which models were kept, and how to load one."""
    kept = run.checkpoints()
    report.heading("Checkpoints")
    if not kept:
        return report.text("No checkpoint was kept yet.")
    report.text("A checkpoint is the model as it was after so many steps, ready for every method. In Python:")
    report.code(
        f"run = hl.open_run({str(run.path)!r})\n"
        "model = run.checkpoints()[-1].load()    # the last; [0] is the untrained model\n"
        f"model = hl.load({str(kept[-1].path)!r})"
    )
    rows = [(f"{checkpoint.step:,}", checkpoint.path.name) for checkpoint in kept]
    return report.table(Table(("after step", "file"), rows), "In the run's folder, in checkpoints/.")


def page_path(run: Run, out: Path | None) -> Path:
    """Where the page goes: `out`, else page.html in the folder of the run."""
    return run.path / "page.html" if out is None else out

"""`hooklens demo`: indirect objects in a real model."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.cli.base import command, say
from hooklens.cli.options import Out, ReportOptions
from hooklens.cli.output import show


@command
def demo(
    n: Annotated[int, typer.Option("--pairs", help="Prompt pairs, a multiple of 4.")] = 64,
    out: Out = Path("hooklens-demo.html"),
    *,
    settings: ReportOptions,
) -> None:
    """Who gets the drink? The indirect-object experiment on a small model, with a report.

    Example: `hooklens demo --out ioi.html`
    """
    from hooklens.data.indirect_object import check_n_pairs, ioi

    settings.judge({"n": lambda: check_n_pairs(n)})
    model, seed = settings.load_reader(), settings.seed
    from hooklens.cli import estimates
    from hooklens.studies.ioi_study import study_ioi

    say(*estimates.how_long(model, estimates.of_demo(model, n, int(ioi(model, n, seed=seed)["end"][0]) + 1)))
    study = study_ioi(model, n, seed=seed)
    halves = "labelled on one half of the pairs, measured on the other" if study.held_out else "all on the same pairs"
    caption = f"Heads, {halves}. patched, direct: the share of the clean-corrupted difference restored."
    more = {"finding": study.finding(), **settings.write(study.report(), study)}
    show(study.table(), settings.as_json, caption=caption, more=more)

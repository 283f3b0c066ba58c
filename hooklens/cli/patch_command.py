"""`hooklens demo` and `patch`: activation patching of indirect objects, and of your own pair of prompts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hooklens.cli.base import command, say
from hooklens.cli.options import CLEAN, CORRUPTED, Out, PairOptions, ReportOptions
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


@command
def patch(
    clean: Annotated[str, CLEAN],
    corrupted: Annotated[str, CORRUPTED],
    answer: Annotated[str, typer.Option(help="The clean prompt's next token, often with a leading space.")],
    wrong_answer: Annotated[str, typer.Option(help="The corrupted prompt's next token.")],
    sites: Annotated[list[str] | None, typer.Option("--site", help="The site to patch; may be repeated.")] = None,
    by: Annotated[
        str | None, typer.Option(help="The grid, such as 'layer x head x pos', for the sites with these axes.")
    ] = None,
    out: Out = Path("patch.html"),
    *,
    settings: ReportOptions,
) -> None:
    """Which activations carry the difference between two prompts? Patch them one at a time; write a report.

    Example: `hooklens patch --clean "When Mary and John went to the store, John gave a drink to" --corrupted "When Mary
    and John went to the store, Mary gave a drink to" --answer " Mary" --wrong-answer " John" --site z --out ioi.html`

    If a run is interrupted, the same command continues it. The seed chooses the patches that are checked against plain
    hooked passes.
    """
    sites = sites or ["resid_pre", "z"]
    from hooklens.cli import estimates
    from hooklens.studies.pair_study import check_pair, grids, study_pair
    from hooklens.sweeps.settings import engine

    given = PairOptions(clean, corrupted, answer, wrong_answer)
    swept = settings.judge({"sites": lambda: grids(sites, by), **given.checks()})["sites"]
    asked = (settings.model, clean, corrupted, answer, wrong_answer, by, settings.dtype, settings.device)
    parts = {site: _part(out, site, "\0".join(map(str, asked))) for site in swept}
    model, pair = settings.load_reader(), given.read()
    n_pos, axes = check_pair(model, pair, sites=sites, by=by)
    say(*estimates.how_long(model, estimates.of_patch(model, n_pos, axes)))

    say(*(f"continuing from {path}" for path in parts.values() if path.exists()))
    try:
        with engine(seed=settings.seed):
            study = study_pair(model, pair, sites=sites, by=by, resume=parts)
    except KeyboardInterrupt:
        if kept := ", ".join(str(path) for path in parts.values() if path.exists()):
            say(f"finished work is kept in {kept}; the same command continues from there")
        raise
    written = settings.write(study.report(), study)
    for path in parts.values():
        path.unlink(missing_ok=True)
    sweep = study.any_sweep
    scale = "0 as in the corrupted run, 1 as in the clean one"
    scale = scale if sweep.defined else "nan: the two runs do not differ significantly"
    runs: dict[str, Any] = {"clean": round(sweep.clean, 4), "corrupted": round(sweep.corrupted, 4), "recovered": scale}
    caption = "The patches that changed the logit difference most; recovered: the share of clean minus corrupted."
    show(study.table(), settings.as_json, caption=caption, more=runs | written)


def _part(out: Path, site: str, question: str) -> Path:
    """The file of a site's unfinished sweep; another question has another file."""
    from hooklens.core.envelope import digest  # imports torch, which --help does not need

    return out.with_name(f"{out.stem}.{site}.{digest([question])[:8]}.part")

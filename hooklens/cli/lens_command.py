"""`hooklens lens`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooklens.cli.base import command, say
from hooklens.cli.options import ANSWER, PAIRS_FILE, WRONG_ANSWER, Out, PairOptions, ReportOptions, tokens_of
from hooklens.cli.output import show
from hooklens.core.errors import InputError

if TYPE_CHECKING:
    from hooklens.data.prompt_pairs import PromptPairs
    from hooklens.results.table import Table
    from hooklens.studies import LensStudy


@command
def lens(
    prompt: Annotated[str | None, typer.Argument(help="A prompt; or --pairs, whose clean prompts are read.")] = None,
    answer: Annotated[str | None, ANSWER] = None,
    wrong_answer: Annotated[str | None, WRONG_ANSWER] = None,
    pairs: Annotated[Path | None, PAIRS_FILE] = None,
    out: Out = Path("lens.html"),
    *,
    settings: ReportOptions,
) -> None:
    """What would the model predict after every layer, and which components write its answer?

    Example: `hooklens lens "When Mary and John went to the store, John gave a drink to" --answer " Mary" --wrong-answer
    " John"`
    """
    given = PairOptions(answer=answer, wrong_answer=wrong_answer, pairs=pairs)

    def read_pairs() -> "PromptPairs | None":
        if (prompt is None) == (pairs is None):
            raise InputError("give either PROMPT or --pairs file.jsonl")
        return None if pairs is None else given.read()

    read = settings.judge({"pairs": read_pairs, **given.checks()})["pairs"]
    model = settings.load_reader()
    from hooklens.cli import estimates
    from hooklens.data.jsonl import check_pairs
    from hooklens.studies import study_lens

    if read is None:
        prompts, group, names, more = str(prompt), None, ["the prompt"], {}
        tokens = len(model.to_tokens(prompts)[0])
    else:
        check_pairs(model, read, str(pairs), corrupted=False)
        prompts, group, names = read.clean, read.group, [f"line {line}" for line in read["line"]]
        answer, wrong_answer, tokens = read.answer, read.wrong_answer, tokens_of(model, read)
        more = {"read": f"the clean prompts of all {len(read)} lines; a lens does not read the corrupted ones"}
    say(*estimates.how_long(model, estimates.of_lens(model, tokens)))
    study = study_lens(
        model, prompts, answer=answer, wrong_answer=wrong_answer, group=group, names=names, seed=settings.seed
    )
    report = study.report()
    if more:
        report.text(f"Read from {pairs}: {more['read']}.")
    show(
        study.table(),
        settings.as_json,
        caption="Direct contribution of each component to the answer's logit, the largest first; compare it with the "
        "spread over tokens.",
        before={"layers": _layers(study, of_one=read is None)},
        more={**more, **settings.write(report, study)},
    )


def _layers(study: "LensStudy", *, of_one: bool) -> tuple[str, "Table"]:
    """The predictions layer by layer, below a line that says what they are and what the columns of controls are."""
    from hooklens.results.table import Table

    if of_one:
        caption, terms = "The stream's prediction after each layer.", study.lenses[0].terms
        table = study.lenses[0].table()
    else:
        caption = "Layer by layer: medians of ranks, means of the other columns, over prompts."
        path, terms = study.trajectory.table(), study.trajectory.terms
        table = Table(path.columns, [row for row in path.rows if not str(row[0]).endswith("_mid")])
    controls = "; ".join(f"{name}: {terms[name]}" for name in table.columns if name.startswith("control"))
    return f"{caption} {controls}.", table

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

    def prompts() -> "PromptPairs | None":
        if (prompt is None) == (pairs is None):
            raise InputError("give either PROMPT or --pairs file.jsonl")
        return None if pairs is None else given.read()

    read = settings.judge({"pairs": prompts, **given.checks()})["pairs"]
    model = settings.load_reader()
    from hooklens.cli import estimates
    from hooklens.data.jsonl import check_pairs
    from hooklens.results.table import Table
    from hooklens.studies import study_lens

    if read is None:
        text, told = str(prompt), ""
        say(*estimates.how_long(model, estimates.of_lens(model, len(model.to_tokens(text)[0]))))
        names, group = ["the prompt"], None
    else:
        check_pairs(model, read, str(pairs), corrupted=False)
        say(*estimates.how_long(model, estimates.of_lens(model, tokens_of(model, read))))
        told = f"the clean prompts of all {len(read)} lines; a lens does not read the corrupted ones"
        text, answer, wrong_answer, group = read.clean, read.answer, read.wrong_answer, read.group
        names = [f"line {line}" for line in read["line"]]
    study = study_lens(
        model, text, answer=answer, wrong_answer=wrong_answer, group=group, names=names, seed=settings.seed
    )
    report = study.report()
    if read is None:
        opening, layers, terms = (
            "The stream's prediction after each layer.",
            study.lenses[0].table(),
            study.lenses[0].terms,
        )
    else:
        report.text(f"Read from {pairs}: {told}.")
        opening = "Layer by layer: medians of ranks, means of the other columns, over prompts."
        path, terms = study.trajectory.table(), study.trajectory.terms
        layers = Table(path.columns, [row for row in path.rows if not str(row[0]).endswith("_mid")])
    controls = "; ".join(f"{name}: {terms[name]}" for name in layers.columns if name.startswith("control"))
    show(
        study.table(),
        settings.as_json,
        caption="Direct contribution of each component to the answer's logit, the largest first; compare it with the "
        "spread over tokens.",
        before={"layers": (f"{opening} {controls}.", layers)},
        more={**({"read": told} if told else {}), **settings.write(report, study)},
    )

"""`hooklens heads`."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.cli.base import command, say
from hooklens.cli.options import Out, PairOptions, PlanOptions, ReportOptions, tokens_of
from hooklens.cli.output import show


@command
def heads(
    pair: PairOptions,
    n: Annotated[
        int, typer.Option("--sequences", help="Random sequences for scores, and as many for effects; at least 6.")
    ] = 12,
    ioi: Annotated[
        int, typer.Option(help="Prompt pairs to label and measure name movers; a multiple of 4; 0: none.")
    ] = 128,
    out: Out = Path("heads.html"),
    *,
    plans: PlanOptions,
    settings: ReportOptions,
) -> None:
    """Which heads are previous-token, duplicate-token, induction or copy-suppression heads, and on what evidence?

    With prompt pairs, also: which heads carry the answer there? They are chosen on half of the pairs, measured on the
    other half.

    Example: `hooklens heads --pairs ioi.jsonl --out heads.html`
    """
    from hooklens.cli import estimates
    from hooklens.plugins.heads import classify_heads
    from hooklens.plugins.heads.taxonomy import check_pairs_asked, check_sizes
    from hooklens.studies import study_heads
    from hooklens.studies.heads_page import taxonomy_report
    from hooklens.studies.result_claims import head_statements, taxonomy_claims

    own = pair.pairs is not None or bool(pair.given())
    sizes = {"n": lambda: check_sizes(n), "ioi": lambda: check_pairs_asked(ioi)}
    read = {"registered": plans.read, "pairs": lambda: pair.read() if own else None}
    known = settings.judge({**read, **pair.checks(), **sizes})
    registered, pairs, seed = known["registered"], known["pairs"], settings.seed
    model = settings.load_reader() if own else settings.load()
    if own:
        pair.check(model, pairs)
    plans.check(registered, lambda: head_statements(model))
    tokens = estimates.of_heads(model, n, 0 if model.tokenizer is None else ioi)
    say(*estimates.how_long(model, tokens + (estimates.of_head_study(model, tokens_of(model, pairs)) if own else 0.0)))
    taxonomy = classify_heads(model, n=n, ioi=ioi, seed=seed)
    unmet = plans.unmet(taxonomy_claims(taxonomy, model), registered)
    if not own:
        written = settings.write(taxonomy_report(taxonomy, model, registered=registered), taxonomy)
        caption = "Heads on random sequences that repeat: attention, the loss increase without it, and the control."
        show(taxonomy.table(20), settings.as_json, caption=caption, more={"names": taxonomy.note, **written, **unmet})
        return
    study = study_heads(model, pairs, labels=taxonomy.labels(), seed=seed)
    report = taxonomy_report(taxonomy, model, study.report(), registered=registered)
    written = settings.write(report, {"taxonomy": taxonomy, "pairs": study})
    caption = "The decrease of the logit difference without what each head carries, the largest first."
    show(study.table(20), settings.as_json, caption=caption, more=written | unmet)

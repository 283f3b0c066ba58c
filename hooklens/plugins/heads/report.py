"""The taxonomy as a page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.plugins.claims import Registration
    from hooklens.plugins.heads.labels import Taxonomy


def taxonomy_report(
    found: "Taxonomy",
    report: Any = None,
    model: "HookedTransformer | str" = "this model",
    registered: "Sequence[Registration]" = (),
) -> Any:
    """Counts, the labelled heads with their evidence, and the scores behind them; below what a report holds already."""
    from hooklens.plugins.claims import plans_met
    from hooklens.plugins.heads.labels import LEAST_SHARE
    from hooklens.viz.report import Report

    labelled, total = len(found.called()), found.score_p[0].numel()
    title = "Attention heads by what they do"
    report = Report(title) if report is None else report.heading(f"{title}, on random tokens")
    report.text(
        "A label takes a score above that of heads with randomly rotated queries, and a change of the loss in the "
        "direction that the label claims when exactly that attention is blocked, measured on other sequences. "
        "Taking as much attention from its other keys (the placebo) must do less. A labelled head "
        f"whose effect is less than {LEAST_SHARE:.0%} of the loss is called detectable, negligible; one that looks "
        "where the label says and whose effect surely goes the other way has an opposite effect, and no label. "
        "A head without a label may do much that repeated random tokens cannot show."
    )
    report.numbers({"heads": total, "labelled": labelled, "loss on repeats": float(found.loss.mean())})
    report.table(
        found.counts(), "Labels, and how many heads had the score without the effect, or with the opposite one."
    )
    report.figure(
        found.figure(),
        "Empty: chance. Orange: more attention than chance, but blocking it does not do what the label says.",
    )
    report.table(found.table(max(20, labelled)), "Every labelled head with its evidence.")
    met, unmet = plans_met(found.claims(model), registered)
    claims = found.claims(model, registered=met)
    if claims is not None:
        report.heading("What may be claimed").claims(claims)
    for sentence in unmet:
        report.text(sentence)
    report.figure(found.scores.figure(), "Mean attention to each kind of key, on random tokens that repeat.")
    report.figure(found.ov.figure(), "Blue: the head's OV raises the token that it reads. Orange: it lowers it.")
    if found.names is not None:
        report.table(
            found.names.table(20),
            "Indirect-object prompts: attention to the name above any other, share of the logit difference restored "
            "directly, and q-values of the largest of three p: attention, copying of names, direct effect.",
        )
    if found.positions is not None:
        report.table(found.positions.table(20), "Heads that positions alone would send to the previous token.")
    if found.suppression is not None and found.suppression.calibration is not None:
        report.table(found.suppression.table(20), "Effect on the logit of the token looked at, on repeated tokens.")
        change = found.suppression.calibration
        report.table(change.table(None), f"Calibration without these heads, on {change.data}; controls: other heads.")
    return report if not found.note else report.text(found.note)

"""The taxonomy as a page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.plugins.heads.head_labels import Taxonomy
    from hooklens.results.claims import Registration

_SHOWN = 20  # rows of a table; more stand behind a fold
_LABELS = {
    "label": "what a head may be called",
    "heads": "how many are",
    "score passes": "how many attend to that label's keys more than heads with randomly rotated queries",
    "of these without effect": "how many of these do not change the loss as the label says",
    "opposite effect": "how many change it the other way",
    "detectable, negligible": "how many change it as the label says, by too little to matter",
    "no matched control": "how many earned it though their other keys held too little attention for a placebo",
}
_NAMES = {
    "head": "the head",
    "margin": "attention to the indirect object above that to any other position",
    "direct effect": "share of the logit difference that the head restores through the final norm alone",
    "low": "lower end of its 95 % interval",
    "high": "its upper end",
    "q name mover": "rate of false discoveries of the largest of three p: margin, copying of names, direct effect",
    "q negative": "the same with copying and direct effect turned round",
}
_POSITIONS = {
    "head": "the head",
    "margin": "score of the previous position minus the best other one, in nats before the softmax",
    "p": "how often rotated queries do as much",
    "q": "its rate of false discoveries over all heads",
}
_SUPPRESSION = {
    "head": "the head",
    "token looked at": "direct effect on its logit, over the mean of all tokens, weighed by attention",
    "another token": "the same for a token of the prompt that is not attended to",
    "anti low": "lower end of the 95 % interval of their difference",
    "anti high": "its upper end",
    "q": "rate of false discoveries of that difference",
}
_CALIBRATION = {
    "ECE change": "rise of the expected calibration error, the mean gap between confidence and accuracy, without the "
    "head",
    "low": "lower end of its 95 % interval over texts",
    "high": "its upper end",
    "p": "how often another head, changed by as much, moves the error as far",
    "controls (size)": "mean size of those moves",
    "loss change": "rise of the loss",
}


def taxonomy_report(
    found: "Taxonomy",
    model: "HookedTransformer | str" = "this model",
    report: Any = None,
    *,
    registered: "Sequence[Registration]" = (),
) -> Any:
    """Counts, the labelled heads with their evidence, and the scores behind them; below what a report holds already."""
    from hooklens.viz.report import Report

    title = "Attention heads by what they do"
    report = Report(title) if report is None else report.heading(f"{title}, on random tokens")
    _labelled(report, found)
    _claimed(report, found, model, registered)
    _scores(report, found)
    _further_evidence(report, found)
    return report if found.names is not None or not found.note else report.text(found.note)


def _labelled(report: Any, found: "Taxonomy") -> None:
    """What earns a label, how many heads have each, and the evidence of the strongest."""
    from hooklens.plugins.heads.head_labels import LEAST_MATCH, LEAST_SHARE

    labelled, total = len(found.called()), found.score_p[0].numel()
    report.text(
        "A label takes a score above that of heads with randomly rotated queries, and a change of the loss in the "
        "direction that the label claims when exactly that attention is blocked, measured on other sequences. "
        "Taking as much attention from its other keys (the placebo) must do less; where they hold less than "
        f"{LEAST_MATCH:.0%} of it the head has no matched control, and its label no causal claim. A labelled head "
        f"whose effect is less than {LEAST_SHARE:.0%} of the loss is called detectable, negligible; one that looks "
        "where the label says and whose effect surely goes the other way has an opposite effect, and no label. "
        "A head without a label may do much that repeated random tokens cannot show."
    )
    report.numbers({"heads": total, "labelled": labelled, "loss on repeats": float(found.loss.mean())})
    report.table(
        found.counts(),
        "Labels, and how many heads had the score without the effect, or with the opposite one.",
        _LABELS,
    )
    report.figure(
        found.figure(),
        "Empty: chance. Blue: more attention than chance, and the label earned. Orange: more attention than chance, "
        "but blocking it does not do what the label says.",
    )
    report.table(found.table(_SHOWN), "The heads of the strongest evidence; what is labelled comes first.", found.terms)
    if labelled > _SHOWN:
        with report.fold(f"All {labelled} labelled heads"):
            report.table(found.table(labelled), "Columns as above.")


def _claimed(
    report: Any, found: "Taxonomy", model: "HookedTransformer | str", registered: "Sequence[Registration]"
) -> None:
    """Claims of the labels, those of plans written before the run among them."""
    from hooklens.results.claims import plans_met
    from hooklens.studies.head_claims import taxonomy_claims

    met, unmet = plans_met(taxonomy_claims(found, model), registered)
    claims = taxonomy_claims(found, model, registered=met)
    if claims is not None:
        report.heading("What may be claimed").claims(claims)
    for sentence in unmet:
        report.text(sentence)


def _scores(report: Any, found: "Taxonomy") -> None:
    """What the heads attend to, and what they write of it."""
    report.figure(
        found.scores.figure(),
        "Mean attention to each kind of key, on random tokens that repeat. Previous: the token before; duplicate: "
        "earlier occurrences of the query's own token; induction: what followed them; first: position 0.",
    )
    report.figure(
        found.ov.figure(),
        "The head's OV, what it writes of a token that it attends to. Blue: it raises that token's own logit; orange: "
        "it lowers it. z: how far from heads with randomly rotated outputs, in their standard deviations.",
    )


def _further_evidence(report: Any, found: "Taxonomy") -> None:
    """Names, positions and suppression, where the model could be asked."""
    if found.names is not None:
        report.table(found.names.table(_SHOWN), f"Indirect-object prompts. {found.note}", _NAMES)
    if found.positions is not None:
        caption = "Heads that positions alone would send to the previous token. Rows: queries whose largest score, of "
        caption += "positions alone, is that of the position before (p - 1)."
        report.table(found.positions.table(_SHOWN), caption, _POSITIONS)
    if found.suppression is not None and found.suppression.calibration is not None:
        report.table(
            found.suppression.table(_SHOWN),
            "Suppression of what is attended to, on repeated tokens.",
            _SUPPRESSION | _CALIBRATION,
        )
        change = found.suppression.calibration
        terms = {"head": "the head that is ablated by its mean", **_CALIBRATION}
        report.table(change.table(None), f"Calibration without these heads, on {change.data}.", terms)

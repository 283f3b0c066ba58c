"""The taxonomy as a page."""

from collections.abc import Sequence
from typing import Any

from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_labels import LEAST_MATCH, LEAST_SHARE, Taxonomy
from hooklens.results.claims import Registration
from hooklens.studies.pages import add_claims
from hooklens.studies.result_claims import taxonomy_claims

_SHOWN = 20  # number of rows in a table; more are in a folded section
_LABELS = {
    "label": "the label of a head",
    "heads": "how many are",
    "score passes": "number of heads that attend to the label's keys more than heads with randomly rotated queries",
    "of these without effect": "number of these whose effect on the loss is not shown",
    "opposite effect": "number with an effect in the opposite direction",
    "detectable, negligible": "number with the predicted effect, but too small to matter",
    "no matched control": "number of labelled heads whose other keys have too little attention for a placebo",
}
_NAMES = {
    "head": "the head",
    "margin": "attention to the indirect object above that to any other position",
    "direct effect": "share of the logit difference that the head restores through the final norm alone",
    "low": "lower end of its 95 % interval",
    "high": "upper end of that interval",
    "q name mover": "false discovery rate of the largest of three p: margin, copying of names, direct effect",
    "q negative": "the same with copying and direct effect reversed",
}
_POSITIONS = {
    "head": "the head",
    "margin": "score of the previous position minus the best other one, in nats before the softmax",
    "p": "how often rotated queries reach this value",
    "q": "its false discovery rate over all heads",
}
_SUPPRESSION = {
    "head": "the head",
    "token looked at": "direct effect on its logit, relative to the mean of all tokens, weighted by attention",
    "another token": "the same for a token of the prompt that is not attended to",
    "anti low": "lower end of the 95 % interval of their difference",
    "anti high": "upper end of that interval",
    "q": "false discovery rate of that difference",
}
_CALIBRATION = {
    "ECE change": "rise of the expected calibration error, the mean gap between confidence and accuracy, without the "
    "head",
    "low": "lower end of its 95 % interval over texts",
    "high": "upper end of that interval",
    "p": "how often an equally large change of another head changes the error as much",
    "controls (size)": "mean size of those changes",
    "loss change": "rise of the loss",
}


def taxonomy_report(
    taxonomy: Taxonomy,
    model: HookedTransformer | str = "this model",
    report: Any = None,
    *,
    registered: Sequence[Registration] = (),
) -> Any:
    """Counts, the labelled heads with their evidence, and their scores; added below the existing report, if any."""
    from hooklens.viz.report import Report

    title = "Attention heads by function"
    report = Report(title) if report is None else report.heading(f"{title}, on random tokens")
    _labelled(report, taxonomy)
    add_claims(report, lambda plans: taxonomy_claims(taxonomy, model, registered=plans), registered)
    _scores(report, taxonomy)
    _further_evidence(report, taxonomy)
    return report if taxonomy.names is not None or not taxonomy.note else report.text(taxonomy.note)


def _labelled(report: Any, taxonomy: Taxonomy) -> None:
    """The criteria for a label, the number of heads with each, and the evidence of the strongest."""
    labelled, total = len(taxonomy.called()), taxonomy.score_p[0].numel()
    report.text(
        "A label needs a score above that of heads with randomly rotated queries, and a change of the loss in the "
        "direction that the label predicts when exactly this attention is blocked, measured on other sequences. Taking "
        "the same amount of attention from its other keys (the placebo) must have a smaller effect; if they have less "
        f"than {LEAST_MATCH:.0%} of it, the head has no matched control, and its label is not a causal claim. A "
        f"labelled head whose effect is less than {LEAST_SHARE:.0%} of the loss is marked detectable, negligible. A "
        "head that attends to the label's keys with a significant effect in the opposite direction gets no label. A "
        "head without a label may have functions that repeated random tokens cannot show."
    )
    report.numbers({"heads": total, "labelled": labelled, "loss on repeats": float(taxonomy.loss.mean())})
    report.table(
        taxonomy.counts(),
        "Labels, and the number of heads with the score but without the effect, or with the opposite effect.",
        _LABELS,
    )
    report.figure(
        taxonomy.figure(),
        "Empty: chance. Blue: more attention than chance, and the label earned. Orange: more attention than chance, "
        "but blocking it does not have the effect that the label predicts.",
    )
    report.table(taxonomy.table(_SHOWN), "The heads with the strongest evidence, labelled heads first.", taxonomy.terms)
    if labelled > _SHOWN:
        with report.fold(f"All {labelled} labelled heads"):
            report.table(taxonomy.table(labelled), "Columns as above.")


def _scores(report: Any, taxonomy: Taxonomy) -> None:
    """Where the heads attend, and what they write."""
    report.figure(
        taxonomy.scores.figure(),
        "Mean attention to each kind of key, on random tokens that repeat. Previous: the token before; duplicate: "
        "earlier occurrences of the query's own token; induction: what followed them; first: position 0.",
    )
    report.figure(
        taxonomy.ov.figure(),
        "The head's OV: what it writes for a token that it attends to. Blue: it raises that token's own logit; orange: "
        "it lowers it. z: distance from heads with randomly rotated outputs, in their standard deviations.",
    )


def _further_evidence(report: Any, taxonomy: Taxonomy) -> None:
    """Names, positions and suppression, if the model supports them."""
    if taxonomy.names is not None:
        report.table(taxonomy.names.table(_SHOWN), f"Indirect-object prompts. {taxonomy.note}", _NAMES)
    if taxonomy.positions is not None:
        report.table(
            taxonomy.positions.table(_SHOWN),
            "Heads that attend to the previous token because of positions alone. Rows: queries whose largest score by "
            "positions alone is that of the previous position (p - 1).",
            _POSITIONS,
        )
    if taxonomy.suppression is not None and taxonomy.suppression.calibration is not None:
        report.table(
            taxonomy.suppression.table(_SHOWN),
            "Suppression of the attended token, on repeated tokens.",
            _SUPPRESSION | _CALIBRATION,
        )
        change = taxonomy.suppression.calibration
        terms = {"head": "the mean-ablated head", **_CALIBRATION}
        report.table(change.table(None), f"Calibration without these heads, on {change.data}.", terms)

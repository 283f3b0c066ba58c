"""The taxonomy as a page."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooklens.plugins.heads.taxonomy import Taxonomy


def taxonomy_report(found: "Taxonomy") -> Any:
    """Counts, the labelled heads with their evidence, and the scores behind them."""
    from hooklens.viz.report import Report

    labelled = sum(one != "unlabelled" for row in found.labels() for one in row)
    total = sum(map(len, found.labels()))
    report = Report("Attention heads by what they do")
    report.text(
        "A label takes a score above that of heads with randomly rotated queries, and a change of the loss in the "
        "direction that the label claims when exactly that attention is blocked, measured on other sequences. "
        "A head without a label may do much that repeated random tokens cannot show."
    )
    report.numbers({"heads": total, "labelled": labelled, "loss on repeats": float(found.loss.mean())})
    report.table(found.counts(), "Labels, and how many heads had the score without the effect.")
    report.figure(
        found.figure(),
        "Empty: chance. Orange: more attention than chance, but blocking it does not do what the label says.",
    )
    report.table(found.table(max(20, labelled)), "Every labelled head with its evidence.")
    report.figure(found.scores.figure(), "Mean attention to each kind of key, on random tokens that repeat.")
    report.figure(found.ov.figure(), "Blue: the head's OV raises the token that it reads. Orange: it lowers it.")
    return report if not found.note else report.text(found.note)

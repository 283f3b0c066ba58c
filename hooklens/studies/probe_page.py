"""A probe's study as a page: what was read, what else reads it, and what the numbers do not let one say."""

from typing import TYPE_CHECKING, Any

from hooklens.results.statistics import few_groups

if TYPE_CHECKING:
    from hooklens.plugins.probing.study import ProbeStudy

_WHAT = {
    "what": "the labels that are read, or what else reads them: the control task has random labels, the same ones for "
    "all tokens (or groups) alike, and selectivity is how much better the real ones are read than those"
}
_ACCURACY = {
    "balanced accuracy": "share right, averaged within classes first",
    "95% low": "lower end of its interval over groups",
    "95% high": "its upper end",
    "accuracy": "share right",
    "p": "how often shuffled labels are read as well",
    "q": "the rate of false discoveries over all points",
}


def probe_report(study: "ProbeStudy", title: str = "") -> Any:
    """Counts, a verdict in words, accuracy by layer, what reaches it without the model, and calibration."""
    from hooklens.viz.report import Report

    n, groups = len(study.label), int(study.group.max()) + 1
    report = Report(title or f"A {study.kind} probe: {study.task}").numbers(
        {
            "texts": n,
            "groups": groups,
            "classes": ", ".join(study.classes),
            "balanced accuracy": round(study.balanced_accuracy, 3),
            "p against shuffled labels": f"{study.p:.2g}",
        }
    )
    for sentence in verdicts(study):
        report.text(sentence)
    report.text("That a label can be read does not show that the model uses it: steer or ablate along the direction.")
    over = f"Intervals over groups, widened by what refitting the probes adds{few_groups(groups, '; ')}."
    report.figure(study.figure(), f"{over} To pick the best layer here is to look at the test texts.")
    caption = f"Out of fold, the layer chosen in inner folds of other groups; {groups} groups."
    report.table(study.table(), caption, _WHAT | _ACCURACY)
    terms = {"point": "where the probe reads"} | _ACCURACY
    report.heading("By layer").table(study.top(10), _by_layer(study), terms)
    return report.heading("Is it as sure as it is right?").figure(
        study.calibration.figure(),
        "How often a class came true, against the probability that the probe gave it, out of fold; on the diagonal "
        "where the two agree.",
    )


def _by_layer(study: "ProbeStudy") -> str:
    """What p and q of single layers are, and how small they can be."""
    said, draws = "p against shuffled labels, q over all of these", len(study.point_null)
    if not draws:
        return f"{said}; no labels were shuffled."
    if study.least_q > 0.05:
        return (
            f"{said}; no single layer can reach q 0.05: the least that {draws} draws allow it is {study.least_q:.2g}."
        )
    return f"{said}; the least q that {draws} draws allow a single layer is {study.least_q:.2g}."


def verdicts(study: "ProbeStudy") -> list[str]:
    """What the controls take away from the accuracy, in sentences; empty where they take nothing away.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.plugins.probing.probe_training import demo
    >>> verdicts(demo(tiny_model()))[0]
    'Labels that say nothing are read as well (p ...): nothing was shown to be there.'
    """
    said = []
    if study.p > 0.05:
        said.append(f"Labels that say nothing are read as well (p {study.p:.2g}): nothing was shown to be there.")
    value, low, high = study.over_embeddings()
    if not low > 0:
        said.append(
            "It is not shown that the model's layers add anything: an embedding of the tokens does as well (probe "
            f"minus embedding {value:.3f}, 95 % [{low:.3f}, {high:.3f}])."
        )
    value, low, high = study.selectivity_interval()
    if not low > 0:
        said.append(
            f"There is no control task here: {study.no_control}."
            if study.control_by is None
            else f"Random labels (one a {study.control_by}) are read as well from the same streams, so that the probe "
            f"may have learnt the task by itself (selectivity {value:.3f}, 95 % [{low:.3f}, {high:.3f}])."
        )
    return said

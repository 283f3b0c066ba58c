"""Report pages: they draw the content of a study and compute only intervals."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hooklens.core.component import head_name
from hooklens.plugins.circuits.circuit_transfer import CircuitTransfer
from hooklens.plugins.patching.activation import PatchSweep
from hooklens.plugins.patching.grid import STRONGEST
from hooklens.results.account import RunAccount
from hooklens.results.claims import ClaimFamily, Registration, plans_met
from hooklens.results.result import Table
from hooklens.studies.result_claims import LEAST_GROUPS
from hooklens.sweeps.sites import SITES

if TYPE_CHECKING:
    from hooklens.studies.ioi_study import IOIStudy
    from hooklens.studies.pair_study import PairStudy
    from hooklens.viz.report import Report

_UNITS = {"head": "one head at a time", "neuron": "one neuron at a time"}
_PATCHES = {
    "metric": "the logit difference after this patch",
    "recovered": "its share of the difference to restore, 0 as in the corrupted run, 1 as in the clean run",
}
_NAMES = "L5 is layer 5, L5H1 its head 1, L5G1.k shared keys, MLP5 its MLP; then the token and its position in brackets"


def add_claims(
    report: "Report",
    claims_for: Callable[[Sequence[Registration]], ClaimFamily | None],
    registered: Sequence[Registration],
) -> None:
    """Add claims, each with the plan that was registered for it, and a sentence for each plan without a claim."""
    met, unmet = plans_met(claims_for(()), registered)
    claims = claims_for(met)
    if claims is not None:
        report.heading("Claims").claims(claims)
    for sentence in unmet:
        report.text(sentence)


def transfer_report(transfer: CircuitTransfer) -> "Report":
    """The page of a circuit that was transferred to another model."""
    from hooklens.viz.report import Report

    report = Report(f"A circuit of {transfer.source} in {transfer.target}")
    report.text(
        "Nodes were matched by label and by their effect on one half of the prompts; faithfulness is measured on "
        "the other. Matching roles do not imply matching mechanisms."
    )
    report.figure(transfer.figure()).table(transfer.table())
    report.heading("Matched nodes").figure(transfer.matching.figure()).table(transfer.matching.table())
    return report.heading("The circuit in the target").figure(transfer.mapped.circuit.figure())


def pair_report(study: "PairStudy") -> "Report":
    """The page of one pair: predictions, a figure per site, layers, heads, numbers."""
    from hooklens import viz
    from hooklens.viz.report import Report

    report = Report(f"Activation patching in {study.model}")
    _prompts(report, study)
    for site, sweep in study.sweeps.items():
        report.heading(f"Patching {site}")
        _swept(report, study, sweep)
        terms = {site: f"the patch. {_NAMES}", **_PATCHES}
        report.table(sweep.top(8), f"The patches of {site} that moved the logit difference most.", terms)
    report.heading("Layer by layer")
    for sweep in study.layers.values():
        report.figure(sweep.figure(), f"{patched(study, sweep)} One pair has no interval.")
    if study.heads:
        report.heading("What the strongest heads attend to").figure(
            viz.attention_heads(study.patterns, study.clean, study.heads),
            "On the clean prompt. A head that restores the logit difference need not be a name mover: this label needs "
            "many pairs, as in `hooklens demo`.",
        )
    return _exactness(report, [*study.sweeps.values(), *study.layers.values()])


def _swept(report: "Report", study: "PairStudy", sweep: PatchSweep) -> None:
    """A sweep's figure; if it leaves out rows, all rows are in a folded section."""
    report.figure(sweep.figure(), patched(study, sweep))
    rows = sweep.values[..., 0].numel()
    if sweep.values.ndim == 3 and rows > STRONGEST:
        with report.fold(f"All {rows} rows"):
            report.figure(sweep.figure(rows=None))


def patched(study: "PairStudy", sweep: PatchSweep) -> str:
    """What a sweep of this pair wrote where, and how to read its numbers."""
    unit = next((words for axis, words in _UNITS.items() if axis in sweep.by), "one layer at a time")
    first, last = study.shared
    if "pos" in sweep.by:
        where = "one token position at a time"
    elif len(study.clean) == len(study.corrupted):
        where = "at all positions"
    else:
        where = (
            f"only at the first {first} and the last {last} tokens, which both prompts share, because the prompts have "
            f"{len(study.clean)} and {len(study.corrupted)} tokens; the tokens between keep their own value"
        )
    read = "Both runs have the same logit difference, so its change is shown."
    read = "0: as in the corrupted run, 1: as in the clean run." if sweep.defined else read
    return (
        f"Patched: {SITES[sweep.site].words or sweep.site}, {unit}, {where}. Written: its value in the clean run, into "
        f"the corrupted run, every later layer recomputed. {read}"
    )


def ioi_report(study: "IOIStudy") -> "Report":
    """The page of `hooklens demo`."""
    from hooklens.viz.report import Report

    shown, movers, named = study.shown, study.reported, study.named.name_movers
    report = Report(f"Who gets the drink? Indirect objects in {shown.model}")
    report.text(finding(study))
    report.numbers(
        {
            "prompt pairs": len(study.pairs),
            "indirect object above subject": f"{study.correct:.0%}",
            "clean logit difference": float(study.clean_per_pair.mean()),
            "corrupted": float(study.corrupted.mean()),
            "name movers": len(named),
            "their direct effect": _whole(sum(float(movers.share[i]) for i in named)),
        }
    )
    report.heading("The shown pair, and the model's predictions")
    _prompts(report, shown)
    report.heading("Where the answer is, layer by layer")
    _swept(report, shown, shown.sweeps["resid_pre"])
    report.heading("Which heads carry it")
    _swept(report, shown, shown.sweeps["z"])
    _heads(report, study)
    _claims(report, study)
    report.heading(f"Attention and MLPs by layer, over {len(study.pairs)} pairs")
    for sweep in study.layers.values():
        report.figure(_bars(study, sweep), f"{patched(shown, sweep)} {_WHISKERS}")
    _how(report, study)
    return _exactness(report, [*shown.sweeps.values(), *study.layers.values()])


_WHISKERS = "Whiskers: 95 % intervals over groups of four pairs that share names and sentence."


def finding(study: "IOIStudy") -> str:
    """The heads that move the name, and what each restores; or the reason why there is no result."""
    movers = study.reported
    if not movers.defined:
        return (
            "On these pairs the model does not distinguish the indirect object from the subject: the interval of the "
            "clean-corrupted difference includes 0, so there is nothing to restore."
        )
    heads = ", ".join(f"{head_name(a, b)} ({_whole(movers.share[a, b])})" for a, b in study.named.name_movers)
    others = [row for row in study.table(None).rows if row[1] == "restores the logit difference"][:3]
    also = ", ".join(f"{row[0]} ({_whole(row[2])})" for row in others)
    named = f"Name movers, and the share each restores: {heads}." if heads else "No head passes all three tests."
    if not others:
        return f"{named} No other head restores the logit difference."
    return f"{named} Other heads restore the logit difference without moving a name; the strongest are {also}."


def _prompts(report: "Report", study: "PairStudy") -> None:
    report.prompts(
        study.clean,
        study.corrupted,
        clean_top=study.clean_top,
        corrupted_top=study.corrupted_top,
        caption="Coloured: where the prompts differ. Below each prompt: the model's most likely next tokens.",
    )
    sweep = study.any_sweep
    report.numbers(
        {
            "answer": repr(study.answer),
            "wrong answer": repr(study.wrong_answer),
            "logit difference, clean": sweep.clean,
            "logit difference, corrupted": sweep.corrupted,
            "difference to restore": sweep.clean - sweep.corrupted,
        }
    )


def _heads(report: "Report", study: "IOIStudy") -> None:
    """The figure of all heads, the table of the strongest, and the patterns of the first."""
    from hooklens import viz

    criteria = study.movers.criteria
    report.heading(f"Head by head, over {len(study.reported_on)} pairs")
    report.figure(
        study.figure(),
        "Every head of the model; the strongest are named. Name movers are at the upper right, in dark.",
    )
    report.table(_short(study.table()), f"{_chosen(study)} Unrounded numbers are in the JSON file.", _terms(study))
    report.text(
        "A head is labelled a name mover only if all three criteria hold. It attends: the last position's attention to "
        "the indirect object exceeds that to any other position except the first by more than "
        f"{criteria.least_margin:g} (lower end of the interval). It copies: for at least "
        f"{criteria.least_copying:.0%} of the names, its OV puts the name itself among the {criteria.top_k} most "
        "likely tokens. It acts directly: the lower end of its direct effect exceeds "
        f"{criteria.least_direct:.0%}. Other heads are described by their patch: they "
        "restore the logit difference, or lower it."
    )
    drawn, called = study.heads[: len(study.patterns)], study.called()
    names = [f"{head_name(a, b)}, {called[i]}" for i, (a, b) in enumerate(drawn)]
    report.heading("What the strongest heads attend to").figure(
        viz.attention_heads(study.patterns, study.shown.clean, names),
        "On the clean prompt shown above; the bottom row is the last position, where the answer is predicted.",
    )


def _claims(report: "Report", study: "IOIStudy") -> None:
    report.heading("Claims")
    n = len(study.movers.group.unique())
    if study.claims is not None:
        report.text("Heads were labelled on one half of the pairs; the numbers come from the other half.")
        report.claims(study.claims)
    elif n < LEAST_GROUPS:
        report.text(
            f"None: there are {n} groups of pairs (four share names and sentence). One half labels heads and the other "
            f"half tests them, which needs at least {LEAST_GROUPS} groups, {4 * LEAST_GROUPS} pairs."
        )
    else:
        report.text("None: on the half of the pairs that labels heads, no head passed all three tests.")


def _short(table: Table) -> Table:
    """Each interval next to its number: "41% [37, 44]"."""
    columns = ("head", "called", "patched", "direct", "attends to IO", "margin", "copies", "suppresses")
    rows = []
    for head, called, *numbers in table.rows:
        patched, direct = _percent(*numbers[:3]), _percent(*numbers[3:6])
        attention, margin, copies, suppresses = numbers[6:]
        evidence = (f"{attention:.2f}", f"{margin:+.2f}", f"{copies:.0%}", f"{suppresses:.0%}")
        rows.append((head, called, patched, direct, *evidence))
    return Table(columns, rows)


def _whole(share: Any) -> str:
    """A share as a whole percentage, never "-0%"."""
    shown = f"{float(share):.0%}"
    return "0%" if shown == "-0%" else shown


def _percent(value: float, low: float, high: float) -> str:
    return f"{_whole(value)} [{_whole(low)[:-1]}, {_whole(high)[:-1]}]"


def _chosen(study: "IOIStudy") -> str:
    if not study.held_out:
        return "All pairs form one group, so heads are chosen and measured on the same pairs, without intervals."
    return (
        f"Heads are chosen and labelled by {len(study.chosen_on)} of the pairs; every number comes from the other "
        f"{len(study.reported_on)}, which share no group with them."
    )


def _terms(study: "IOIStudy") -> dict[str, str]:
    k = study.movers.criteria.top_k
    return {
        "head": "L5H1 is head 1 of layer 5",
        "called": "name mover if all three tests hold, else the effect of its patch",
        "patched": "share of the clean-corrupted difference that the head's clean output restores with all later "
        "layers recomputed, with its 95 % interval",
        "direct": "the same if only the final norm and the unembedding see it",
        "attends to IO": "the last position's attention to the indirect object",
        "margin": "excess over the attention to any other position except the first",
        "copies": f"share of names that the head's OV (what it writes for a token it attends to) puts among the {k} "
        "most likely tokens",
        "suppresses": f"share of names that its OV puts among the {k} least likely tokens",
    }


def _bars(study: "IOIStudy", sweep: PatchSweep) -> Any:
    from hooklens import viz

    low, high = study.interval(sweep.per_pair - sweep.corrupted_per_pair[:, None])
    title = f"{sweep.site}: recovered by each layer"
    return viz.bars(sweep.recovered, low, high, sweep.labels["layer"], title, x_title="layer", y_title="recovered")


def _how(report: "Report", study: "IOIStudy") -> None:
    pairs, movers = study.pairs, study.reported
    orders = {order: pairs["order"].count(order) for order in dict.fromkeys(pairs["order"])}
    balance = " and ".join(f"{count} {order}" for order, count in orders.items())
    report.heading("How this was measured").text(
        f"{len(pairs)} pairs: {balance}; {len(set(pairs.answer))} names, each as often indirect object as subject, in "
        f"each order; {len(set(pairs['template']))} sentences; all prompts are {int(pairs['end'][0]) + 1} tokens long. "
        "Two names in one sentence give four pairs, which are not independent: every interval over pairs resamples "
        f"such groups ({len(pairs.group.unique())} of them) and recomputes numerator and denominator. Copying is "
        "measured on each name as it leaves block 0, put through the head's own values (shared by its group of heads "
        "where keys and values are grouped) and output, the final norm's weight and W_U; a norm's scale changes no "
        f"rank. On average a head copies {float(movers.copying.mean()):.1%} of the names. Intervals are not corrected "
        f"for the number of heads ({movers.share.numel()}), and direct effects of different heads need not add up to "
        "100 %: the final norm is recomputed for each."
    )
    with report.fold("The first pairs"):
        report.table(pairs.table(8))


def _exactness(report: "Report", sweeps: list[PatchSweep]) -> "Report":
    work = ", ".join(f"{sweep.site} by {' x '.join(sweep.by)} {sweep.computed:.0%}" for sweep in sweeps)
    checked = RunAccount.joined(sweeps).exactness
    return report.text(f"Every patch is exact. {checked} The work done, as a share of the plain loop: {work}.")

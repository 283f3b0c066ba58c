"""The indirect-object experiment: one pair shown in detail, and many balanced pairs for the claims."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.component import head_name
from hooklens.data.indirect_object import ioi
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.mover_result import NameMovers, by_group, of_pairs
from hooklens.plugins.heads.name_movers import find_name_movers
from hooklens.plugins.patching.activation import PatchSweep
from hooklens.plugins.weights.needs import Needs
from hooklens.results.claims import ClaimFamily
from hooklens.results.result import Result, Table
from hooklens.results.statistics import ratio_interval
from hooklens.studies.pages import say_exactness
from hooklens.studies.pair_study import PairStudy, by_layer, grids, head_patterns, sweep_pair
from hooklens.studies.result_claims import LEAST_GROUPS, mover_claims
from hooklens.sweeps.execution import execute
from hooklens.sweeps.planning import Patch, plan
from hooklens.sweeps.settings import engine
from hooklens.sweeps.site_patches import SitePatches

if TYPE_CHECKING:
    from hooklens.viz.report import Report

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
ANSWER, WRONG_ANSWER = " Mary", " John"
_CANDIDATES = 10  # heads taken from each of two rankings: patches of the shown pair, and direct effects over the pairs
_DRAWN = 6
_WHISKERS = "Whiskers: 95 % intervals over groups of four pairs that share names and sentence."


@dataclass(frozen=True, eq=False)
class IOIStudy(Result):
    """The shown pair, the same experiment on many pairs, and the evidence for each head.

    `total` is the logit difference after each of `heads` was patched in each pair, with all later layers recomputed;
    in `movers.direct` only the final norm and the unembedding see the patch. Heads are chosen and labelled by the pairs
    `chosen_on`, and reported numbers come from `reported_on`, the other half of the groups (all pairs both times if
    there is only one group). `claims` are about those heads; None if there are none, or too few pairs.
    """

    ranked_by = "effect of the patch"

    shown: PairStudy
    pairs: PromptPairs
    movers: NameMovers
    layers: dict[str, PatchSweep]
    heads: list[tuple[int, int]]
    total: Float[Tensor, "pair head"]
    corrupted: Float[Tensor, "pair"]
    patterns: Float[Tensor, "drawn query_pos key_pos"]
    claims: ClaimFamily | None
    chosen_on: Int[Tensor, "chosen"]
    reported_on: Int[Tensor, "reported"]

    @cached_property
    def named(self) -> NameMovers:
        """The measurements that label the heads."""
        return of_pairs(self.movers, self.chosen_on)

    @cached_property
    def reported(self) -> NameMovers:
        """The measurements that are reported."""
        return of_pairs(self.movers, self.reported_on)

    @property
    def held_out(self) -> bool:
        """Whether the reported pairs had no part in the labelling."""
        return not torch.isin(self.reported_on, self.chosen_on).any()

    @property
    def clean_per_pair(self) -> Float[Tensor, "pair"]:
        """The logit difference of every clean prompt."""
        return self.corrupted + self.movers.gap

    @property
    def correct(self) -> float:
        """The share of pairs in which the indirect object is more likely than the subject."""
        return float((self.clean_per_pair > 0).float().mean())

    @property
    def recovered(self) -> Float[Tensor, "head"]:
        """The share of the difference that patching each of `heads` restores, all later layers recomputed."""
        return self._recovered(self.reported_on)

    @property
    def _moved(self) -> Float[Tensor, "pair head"]:
        return self.total - self.corrupted[:, None]

    def _recovered(self, index: Int[Tensor, "some"]) -> Float[Tensor, "head"]:
        return self._moved[index].mean(0) / self.movers.gap[index].mean()

    def interval(
        self, moved: Float[Tensor, "pair cell"], index: Int[Tensor, "some"] | None = None
    ) -> tuple[Float[Tensor, "cell"], Float[Tensor, "cell"]]:
        """The interval of a share of the clean-corrupted difference, resampling groups of pairs; None: of all pairs."""
        some = torch.arange(len(moved)) if index is None else index
        group, level = self.movers.group[some], self.movers.criteria.level
        return ratio_interval(by_group(moved[some], group), by_group(self.movers.gap[some], group), level=level)

    def called(self) -> list[str]:
        """The label of each of `heads`: name mover if all three tests hold, else a description of its patch."""
        (low, high), least = self.interval(self._moved, self.chosen_on), self.movers.criteria.least_direct
        labels = []
        for i, head in enumerate(self.heads):
            if head in self.named.name_movers:
                labels.append("name mover")
            elif self.named.defined and low[i] > least:
                labels.append("restores the logit difference")
            elif self.named.defined and high[i] < -least:
                labels.append("lowers the logit difference")
            else:
                labels.append("no clear effect" if len(self.named.group.unique()) > 1 else "no interval")
        return labels

    def finding(self) -> str:
        """The heads that move the name, and what each restores; or why there is no result. The page begins with it."""
        movers = self.reported
        if not movers.defined:
            return (
                "On these pairs the model does not distinguish the indirect object from the subject: the interval of "
                "the clean-corrupted difference includes 0, so there is nothing to restore."
            )
        heads = ", ".join(f"{head_name(a, b)} ({_whole(movers.share[a, b])})" for a, b in self.named.name_movers)
        others = [row for row in self.table(None).rows if row[1] == "restores the logit difference"][:3]
        also = ", ".join(f"{row[0]} ({_whole(row[2])})" for row in others)
        named = f"Name movers, and the share each restores: {heads}." if heads else "No head passes all three tests."
        if not others:
            return f"{named} No other head restores the logit difference."
        return f"{named} Other heads restore the logit difference without moving a name; the strongest are {also}."

    def table(self, n: int | None = 14) -> Table:
        """One row per head: labelled and ranked by one half of the pairs, name movers first; measured on the other."""
        columns = ["head", "called", "patched", "low", "high", "direct", "d. low", "d. high", "attends to IO"]
        columns += ["margin", "copies", "suppresses"]
        movers, (low, high), called = self.reported, self.interval(self._moved, self.reported_on), self.called()
        direct = (movers.share, *movers.share_interval())
        rest = (movers.attention.mean(0), movers.margin.mean(0), movers.copying, movers.suppressing)
        rows, size = [], self._recovered(self.chosen_on).abs().tolist()
        for i in sorted(range(len(called)), key=lambda i: (called[i] != "name mover", -size[i])):
            a, b = self.heads[i]
            patched = (float(value[i]) for value in (self.recovered, low, high))
            rows.append((head_name(a, b), called[i], *patched, *(float(value[a, b]) for value in (*direct, *rest))))
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """Every head by attention, direct effect and copying."""
        return self.reported.figure()

    def report(self) -> Any:
        """The study as a page: `study.report().save("ioi.html", data=study)`."""
        from hooklens import viz
        from hooklens.viz.report import Report

        shown, movers, named = self.shown, self.reported, self.named.name_movers
        report = Report(f"Who gets the drink? Indirect objects in {shown.model}")
        report.text(self.finding())
        report.numbers(
            {
                "prompt pairs": len(self.pairs),
                "indirect object above subject": f"{self.correct:.0%}",
                "clean logit difference": float(self.clean_per_pair.mean()),
                "corrupted": float(self.corrupted.mean()),
                "name movers": len(named),
                "their direct effect": _whole(sum(float(movers.share[i]) for i in named)),
            }
        )
        report.heading("The shown pair, and the model's predictions")
        shown.show_prompts(report)
        report.heading("Where the answer is, layer by layer")
        shown.show_sweep(report, shown.sweeps["resid_pre"])
        report.heading("Which heads carry it")
        shown.show_sweep(report, shown.sweeps["z"])
        _heads(report, self)
        _claims(report, self)
        report.heading(f"Attention and MLPs by layer, over {len(self.pairs)} pairs")
        for site, sweep in self.layers.items():
            low, high = self.interval(sweep.per_pair - sweep.corrupted_per_pair[:, None])
            title, layers = f"{site}: recovered by each layer", sweep.labels["layer"]
            drawn = viz.bars(sweep.recovered, low, high, layers, title, x_title="layer", y_title="recovered")
            report.figure(drawn, f"{shown.patched(sweep)} {_WHISKERS}")
        _how(report, self)
        return say_exactness(report, [*shown.sweeps.values(), *self.layers.values()])


def study_ioi(model: HookedTransformer, n: int = 64, *, seed: int = 0) -> IOIStudy:
    """How does this model know who gets the drink? The shown pair in detail, `n` balanced pairs for the claims.

    Needs a tokenizer in which the names are single tokens. Reference: Wang et al. (2022).
    """
    pairs = ioi(model, n, seed=seed)
    clean, corrupted = pairs.tokens(model)
    with torch.no_grad(), packed_linears(rows=1024):  # packed once for everything below
        pair = PromptPairs(CLEAN, CORRUPTED, answer=ANSWER, wrong_answer=WRONG_ANSWER)
        shown = sweep_pair(model, pair, grids(("resid_pre", "z"), None), {})
        movers = find_name_movers(model, pairs)
        chosen_on, reported_on = movers.halves(seed=seed)
        heads = _candidates(shown, of_pairs(movers, chosen_on))
        patches = [Patch(layer, head=head) for layer, head in heads]
        with engine(verify=0):  # the shown pair's sweeps are checked; one check here costs as much as half of the sweep
            layers = by_layer(model, pairs)
            planned = plan(model, corrupted, "z", clean, patches=patches)
            outcome = execute(SitePatches(planned), pairs.metric_of(model))
        patterns = head_patterns(model, model.to_tokens(CLEAN)[0], heads[:_DRAWN])
    claims = mover_claims(model, movers, seed=seed) if len(movers.group.unique()) >= LEAST_GROUPS else None
    return IOIStudy(
        shown=shown,
        pairs=pairs,
        movers=movers,
        layers=layers,
        heads=heads,
        total=outcome.values.T,
        corrupted=outcome.base,
        patterns=patterns,
        claims=claims,
        chosen_on=chosen_on,
        reported_on=reported_on,
    )


def _candidates(shown: PairStudy, named: NameMovers) -> list[tuple[int, int]]:
    """The heads to patch in every pair: name movers, then the largest direct effects, then those of the shown pair."""
    patched = [(layer, head) for layer, head in shown.sweeps["z"].order()[:_CANDIDATES]]
    return list(dict.fromkeys([*named.name_movers, *named.order()[:_CANDIDATES], *patched]))


def demo(model: HookedTransformer) -> NameMovers | IOIStudy | Needs:
    """The study on four pairs if the tokenizer knows the names; else name movers among token numbers."""
    from hooklens.plugins.heads.name_movers import demo as numbers

    return numbers(model) if model.tokenizer is None else study_ioi(model, 4)


# -- parts of the page


def _heads(report: "Report", study: IOIStudy) -> None:
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


def _claims(report: "Report", study: IOIStudy) -> None:
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


def _chosen(study: IOIStudy) -> str:
    if not study.held_out:
        return "All pairs form one group, so heads are chosen and measured on the same pairs, without intervals."
    return (
        f"Heads are chosen and labelled by {len(study.chosen_on)} of the pairs; every number comes from the other "
        f"{len(study.reported_on)}, which share no group with them."
    )


def _terms(study: IOIStudy) -> dict[str, str]:
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


def _how(report: "Report", study: IOIStudy) -> None:
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

"""The indirect-object experiment: one pair shown in detail, and many balanced pairs for the claims."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
from hooklens.studies import pages
from hooklens.studies.pair_study import PairStudy, by_layer, grids, head_patterns, sweep_pair
from hooklens.studies.result_claims import LEAST_GROUPS, mover_claims
from hooklens.sweeps.execution import execute
from hooklens.sweeps.planning import Patch, plan
from hooklens.sweeps.settings import engine
from hooklens.sweeps.site_patches import SitePatches

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
ANSWER, WRONG_ANSWER = " Mary", " John"
_CANDIDATES = 10  # heads taken from each of two rankings: patches of the shown pair, and direct effects over the pairs
_DRAWN = 6


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
        """The main result in one or two sentences, with which the page begins."""
        return pages.finding(self)

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
        return pages.ioi_report(self)


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

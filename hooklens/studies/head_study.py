"""Heads on your own prompt pairs: the loss without each, its contribution to the answer, and where it attends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.component import Component, head_names
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import need_tokens, rows_of
from hooklens.metrics import answer_ids
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import head_map, head_table
from hooklens.plugins.lens.logit_attribution import direct_logit_attribution
from hooklens.plugins.patching.activation import PatchSweep, patch
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.claims import HeldOutEffects, held_out_top
from hooklens.results.result import Result, Table
from hooklens.results.statistics import INTERVAL_TERMS, group_numbers, mean_interval

_TERMS = {
    "head": "L5H1 is head 1 of layer 5",
    "fall": "decrease of the logit difference, mean over pairs",
    **INTERVAL_TERMS,
    "q": "the false discovery rate over these heads (Benjamini-Hochberg)",
    "where chosen": "the fall on the pairs that chose the head; biased upwards for this reason",
    "direct": "the head's direct contribution to the logit difference on the clean prompt",
    "looks at answer": "the last position's attention to the answer in the prompt, nan if it does not occur",
    "looks at wrong answer": "the same for the wrong answer",
    "on repeated tokens": "its label in the taxonomy of heads",
}
_CHOSEN = 20  # heads that the first half of the pairs chooses
PerHead = Float[Tensor, "pair layer head"]


@dataclass(frozen=True, eq=False)
class HeadStudy(Result):
    """Every head on these pairs; the metric is the logit of the answer minus that of the wrong answer.

    `sweep` writes each head's corrupted value into the clean run and recomputes everything after it: the decrease is
    the part of the difference between the prompts that the head carries. `direct` is the head's own contribution to the
    metric on the clean prompt (NaN in post-norm models, which have no such sum). `to_answer` and `to_wrong` are the
    last position's attention to earlier positions with those tokens; NaN if they do not occur. `held_out` contains the
    heads with the largest decrease on half of the groups, measured on the other half; None for one group.
    """

    ranked_by = "what the head carries"

    model: str
    sweep: PatchSweep
    direct: PerHead
    to_answer: PerHead
    to_wrong: PerHead
    group: Int[Tensor, "pair"]
    held_out: HeldOutEffects | None
    labels: list[list[str]] | None = None  # by layer and head, the labels of `taxonomy` on repeated tokens

    @property
    def fall(self) -> PerHead:
        """The decrease of the metric without what each head carries, pair by pair."""
        return self.sweep.clean_per_pair[:, None, None] - self.sweep.per_pair

    def table(self, n: int | None = 12) -> Table:
        """The heads that carry most; with at least two groups, measured on pairs that did not choose them."""
        columns = ["head", "fall", "95% low", "95% high"]
        if self.held_out is not None:
            columns += ["q", "where chosen"]
            rows: Sequence[Sequence[Any]] = self.held_out.rows()
        else:
            fall, (low, high) = self.fall.mean(0), mean_interval(self.fall, group=self.group)
            rows = head_table(fall.abs(), dict(zip(columns[1:], (fall, low, high), strict=True)), None).rows
        columns += ["direct", "looks at answer", "looks at wrong answer"]
        columns += [] if self.labels is None else ["on repeated tokens"]
        return Table(columns, [(*row, *self._evidence(row[0])) for row in rows]).head(n)

    def _evidence(self, name: str) -> list[Any]:
        layer, head = Component.parse(name).place
        label = [] if self.labels is None else [self.labels[layer][head]]
        parts = (self.direct, self.to_answer, self.to_wrong)
        return [float(part[:, layer, head].nanmean()) for part in parts] + label

    def figure(self) -> Any:
        """Layer by head: the decrease of the metric, mean over pairs."""
        title = "What falls when a head's value is that of the corrupted prompt"
        return head_map(self.fall.mean(0), title, "fall of the logit difference")

    def report(self) -> Any:
        """The study as a page."""
        from hooklens.viz.report import Report

        n, groups = len(self.fall), int(self.group.max()) + 1
        report = Report(f"Attention heads of {self.model} on {n} prompt {'pair' if n == 1 else 'pairs'}").numbers(
            {
                "pairs": n,
                "groups": groups,
                "metric, clean": self.sweep.clean,
                "metric, corrupted": self.sweep.corrupted,
                "fall of the median head": float(self.fall.mean(0).abs().median()),
            }
        )
        report.text(
            "Fall: the exact decrease of the metric on the clean prompt when the head's output is replaced by the "
            "corrupted one and everything after it is recomputed. A head with a small fall may still do the job, if "
            "other heads compensate; where a head attends shows nothing by itself."
        )
        how = "Heads were chosen and measured on the same pairs, so the largest falls are biased upwards."
        if self.held_out is not None:
            how = self.held_out.how("pairs")
        report.figure(self.figure(), f"Mean over {n} pairs.")
        return report.table(self.table(_CHOSEN), f"{how} Related prompts form one group.", _TERMS)


def study_heads(
    model: HookedTransformer, pairs: PromptPairs, *, labels: list[list[str]] | None = None, seed: int = 0
) -> HeadStudy:
    """Which heads carry the answers of these pairs? By exact interventions, with what they write and where they attend.

    >>> from hooklens.testing import induction_model
    >>> clean = [[3, 1, 4, 3], [5, 2, 6, 5], [7, 9, 8, 7], [6, 3, 2, 6]]
    >>> corrupted = [[0, *row[1:]] for row in clean]
    >>> pairs = PromptPairs(clean, corrupted, answer=[1, 2, 9, 3], wrong_answer=[4, 6, 8, 2])
    >>> study = study_heads(induction_model(), pairs)
    >>> sorted(row[0] for row in study.table(2).rows), study.to_answer[:, 1, 1].tolist()
    (['L0H0', 'L1H1'], [1.0, 1.0, 1.0, 1.0])

    Clean and corrupted prompts must have one length within a pair; pairs may differ. Pairs of one `group` are related:
    heads are chosen on half of the groups and measured on the other. `labels` (`classify_heads(model).labels()`) are
    shown next to them in the table. A head that carries nothing of the difference between these prompts may still be
    needed for both.

    Reference: Wang et al. (2022), "Interpretability in the Wild"; Zhang and Nanda (2024), "Towards Best Practices of
    Activation Patching in Language Models" (corrupted into clean).
    """
    need_tokens(model, "study_heads", "hl.patch(model, pairs, site='z') and hl.ablate read vectors")
    group = group_numbers(len(pairs), pairs.group)
    sweep = patch(model, pairs, site="z", value="corrupted")
    rows = rows_of(model, pairs.clean, "clean")
    right, wrong = (answer_ids(model, answer).to(model.device) for answer in (pairs.answer, pairs.wrong_answer))
    to_answer, to_wrong = _attention(model, rows, right, wrong)
    if model.blocks[0].not_a_sum is not None:
        direct = torch.full_like(to_answer, torch.nan)
    else:
        direct = direct_logit_attribution(model, rows, answer=right, wrong_answer=wrong).heads
    held_out = None
    if int(group.max()):
        fall, names = sweep.clean_per_pair[:, None, None] - sweep.per_pair, head_names(*sweep.values.shape)
        held_out = held_out_top(model, fall.cpu(), names, k=min(_CHOSEN, len(names)), group=group, seed=seed)
    return HeadStudy(
        model=model.cfg.model_name,
        sweep=sweep,
        direct=direct,
        to_answer=to_answer,
        to_wrong=to_wrong,
        group=group,
        held_out=held_out,
        labels=labels,
    )


def _attention(
    model: HookedTransformer, rows: list[Int[Tensor, "_"]], right: Int[Tensor, "pair"], wrong: Int[Tensor, "pair"]
) -> tuple[PerHead, PerHead]:
    """Attention from each prompt's last position to its answer and to its wrong answer."""
    attention = []
    with torch.no_grad(), packed_linears(rows=1024):
        for row, *answers in zip(rows, right, wrong, strict=True):
            _, cache = model.run_with_cache(row[None], "pattern", stop_at_layer=model.cfg.n_layers)
            seen = torch.stack([cache["pattern", layer][0, :, -1] for layer in range(model.cfg.n_layers)])
            places = torch.stack([row == token for token in answers])[:, None, None]  # answer 1 1 pos
            there = places.any(-1)
            attention.append(torch.where(there, (seen * places).sum(-1), torch.nan))
    to_answer, to_wrong = torch.stack(attention, dim=1)
    return to_answer, to_wrong


def demo(model: HookedTransformer) -> HeadStudy | Needs:
    """Four short prompt pairs; token numbers where the model has no tokenizer."""
    return needs_tokens(model) or study_heads(model, demo_pairs(model, 4))

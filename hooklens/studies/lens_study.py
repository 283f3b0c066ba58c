"""Lenses on your own prompts: predictions after every layer, where the answer appears, and what writes it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import several
from hooklens.core.errors import ArgumentError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompts import Prompts, need_tokens, rows_of
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens.layer_lens import LogitLens, logit_lens
from hooklens.plugins.lens.logit_attribution import LogitAttribution, direct_logit_attribution
from hooklens.plugins.lens.reading import Answers
from hooklens.plugins.lens.trajectory import Trajectory, trace_predictions
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.results.claims import HeldOutEffects, held_out_top
from hooklens.results.result import Result, Table
from hooklens.results.statistics import INTERVAL_TERMS, Groups, few_groups, group_numbers

_PROMPT = {
    "prompt": "its name",
    "text": "how it ends",
    "answer": "the token that is tracked",
    "probability": "the model's probability of that token",
    "rank": "its rank among all tokens, 0 the most likely",
    "on top from": "the first stream from which on it has rank 0 up to the output",
}
_COMPONENT = {
    "component": "L5H1 is head 1 of layer 5, 5_attn_out and 5_mlp_out are the outputs of its attention and MLP",
    "attribution": "the component's direct contribution to the answer's logit, minus that to the wrong answer's if "
    "there is one",
    **INTERVAL_TERMS,
    "q": "the false discovery rate over these components",
    "where chosen": "the attribution on the prompts that chose the component; biased upwards for this reason",
    "spread over tokens": "standard deviation of its contribution over tokens of the vocabulary",
}
_CHOSEN = 20  # components that the first half of the prompts chooses
_SHOWN_TEXT = 60  # characters of a prompt's end in a table


@dataclass(frozen=True, eq=False)
class LensStudy(Result):
    """The logit lens, the trajectory and the direct logit attribution of the same prompts.

    `lenses` are those of the first prompts. `held_out` contains components chosen by their attribution on half of the
    groups of prompts and measured on the other half; None if all prompts form one group.
    """

    ranked_by = "what it writes of the answer"

    model: str
    names: list[str]  # the name of each prompt
    lenses: list[LogitLens]
    trajectory: Trajectory
    attribution: LogitAttribution
    held_out: HeldOutEffects | None
    group: Int[Tensor, "prompt"]

    def prompt_table(self, n: int | None = None) -> Table:
        """One row per prompt: its end, the probability of its answer, and the stream from which on it is on top."""
        path, rows = self.trajectory, []
        for i, name in enumerate(self.names):
            on_top = int((path.rank[i] == 0).flip(0).long().cumprod(0).sum())  # number of streams, from the last down
            since = path.layers[-on_top] if on_top else "never"
            text = "".join(self.attribution.str_tokens[i])
            end = text if len(text) <= _SHOWN_TEXT else f"…{text[1 - _SHOWN_TEXT :]}"
            output = (float(path.log_prob[i, -1].exp()), int(path.rank[i, -1]))
            rows.append((name, end, repr(path.answer[i]), *output, since))
        return Table(("prompt", "text", "answer", "probability", "rank", "on top from"), rows).head(n)

    def table(self, n: int | None = 12) -> Table:
        """The components that contribute most to the answer; measured on held-out prompts if possible.

        With fewer than two groups, components are chosen and measured on the same prompts.
        """
        if self.held_out is None:
            return self.attribution.table(n)
        spread = self.attribution.spread[self.held_out.reported_on].mean(0)
        of = dict(zip(self.attribution.labels, spread.tolist(), strict=True))
        rows = [(*row, of[row[0]]) for row in self.held_out.rows()]
        columns = ("component", "attribution", "95% low", "95% high", "q", "where chosen", "spread over tokens")
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """The layer at which the answer appears, over all prompts."""
        return self.trajectory.figure()

    def report(self) -> Any:
        """The study as a page."""
        from hooklens.viz.report import Report

        report = Report(f"Logit lens in {self.model}")
        report.text(
            "Every stream is read as if it were the last. Early streams need not use the basis that the unembedding "
            "reads, so an answer may be present without being visible. A component's direct contribution leaves out "
            "all effects through later components."
        )
        report.heading("When the answer comes up").figure(self.figure(), self._over())
        report.table(self.prompt_table(_CHOSEN), "The model's prediction for each prompt.", _PROMPT)
        if len(self.names) > _CHOSEN:
            with report.fold(f"All {len(self.names)} prompts"):
                report.table(self.prompt_table(), "Columns as above.")
        caption = "Medians of ranks and means of the other columns, over prompts."
        report.table(self.trajectory.table(None), caption, Trajectory.terms)
        report.heading("Which components write it").figure(self.attribution.figure(), self._over())
        report.table(self.table(_CHOSEN), self._how(), _COMPONENT)
        shown = f", the first {len(self.lenses)} of {len(self.names)} prompts" * (len(self.lenses) < len(self.names))
        report.heading(f"What the model would say after every layer{shown}")
        for i, (row, lens) in enumerate(zip(self.prompt_table().rows, self.lenses, strict=False)):
            name, text, answer = row[:3]
            caption = f"{name}; the answer is {answer}. Cells: the most likely token, coloured by its probability."
            with report.fold(f"{name}: {text}") if i else nullcontext():
                report.figure(lens.figure(), caption)
        return report

    def _over(self) -> str:
        n, groups = len(self.names), int(self.group.max()) + 1
        if n == 1:
            return "One prompt: there is no interval, and this shows nothing about other prompts."
        return f"Mean over {n} prompts in {groups} {'group' if groups == 1 else 'groups'}{few_groups(groups, '; ')}."

    def _how(self) -> str:
        control = "An attribution that is not large relative to the spread over tokens is not specific to the answer."
        if self.held_out is None:
            return f"Ranked and measured on the same prompts, so the first rows are biased upwards. {control}"
        return f"{self.held_out.how()} {control}"


def study_lens(
    model: HookedTransformer,
    prompts: Prompts,
    *,
    answer: Answers | None = None,
    wrong_answer: Answers | None = None,
    group: Groups = None,
    names: Sequence[str] | None = None,
    shown: int = 12,
    seed: int = 0,
) -> LensStudy:
    """What would the model predict after every layer of these prompts, and which components write the answers?

    >>> from hooklens.testing import induction_model
    >>> prompts = [[3, 1, 4, 3], [5, 2, 6, 5], [7, 9, 8, 7], [1, 3, 2, 1]]
    >>> study = study_lens(induction_model(), prompts, answer=[1, 2, 9, 3])
    >>> study.prompt_table(1).rows[0][2:], study.table(1).rows[0][0]        # chosen on two prompts, measured on two
    (("'1'", 0.999..., 0, 'final_post'), '1_attn_out')

    `answer` is one token for all prompts or one per prompt; None: the model's own prediction. The lens is kept for the
    first `shown` prompts, everything else for all prompts. Prompts of one `group` are related: a group is used either
    for choosing or for reporting.

    Reference: those of `logit_lens`, `trajectory` and `direct_logit_attribution`.
    """
    need_tokens(model, "study_lens", "hl.lens.prediction_lens and direct_logit_attribution read vectors")
    rows = rows_of(model, prompts, "prompts")
    number = group_numbers(len(rows), group)
    names = [f"prompt {i}" for i in range(1, len(rows) + 1)] if names is None else several("names", names)
    if len(names) != len(rows):
        raise ArgumentError("{names} are one per prompt, {0} in all; got {1}", len(rows), len(names))
    if answer is None:
        with torch.no_grad():
            answer = [int(model(row[None], logits_at=-1)[0, 0].argmax()) for row in rows]
    path = trace_predictions(model, rows, answer=answer, wrong_answer=wrong_answer, group=number)
    parts = direct_logit_attribution(model, rows, answer=answer, wrong_answer=wrong_answer, group=number)
    held_out = None
    if int(number.max()):
        k = min(_CHOSEN, len(parts.labels))
        held_out = held_out_top(model, parts.components.cpu(), parts.labels, k=k, group=number, seed=seed)
    return LensStudy(
        model=model.cfg.model_name,
        names=names,
        lenses=[logit_lens(model, row[None]) for row in rows[:shown]],
        trajectory=path,
        attribution=parts,
        held_out=held_out,
        group=number,
    )


def demo(model: HookedTransformer) -> LensStudy | Needs:
    """Four short prompts; token numbers where the model has no tokenizer."""
    lacks, pairs = lacking(model), demo_pairs(model, 4)
    return lacks or study_lens(model, pairs.clean, answer=pairs.answer, wrong_answer=pairs.wrong_answer, shown=1)

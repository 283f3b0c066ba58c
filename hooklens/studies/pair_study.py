"""One prompt pair in detail: predictions, sweeps, layers, and the attention patterns of the strongest heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import several
from hooklens.core.component import head_name
from hooklens.core.errors import InputError, judge
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import check_prompts_differ, common_ends, need_tokens, read_pairs, rows_of
from hooklens.model.ids import show
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.activation import PatchSweep, patch
from hooklens.plugins.patching.grid import STRONGEST
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.studies.pages import say_exactness
from hooklens.sweeps.planning import grid_axes, has_site, site_kind
from hooklens.sweeps.sites import SITES

if TYPE_CHECKING:
    from hooklens.viz.report import Report

_STRONGEST = 6
_GUESSES = 5
_UNITS = {"head": "one head at a time", "neuron": "one neuron at a time"}
_PATCHES = {
    "metric": "the logit difference after this patch",
    "recovered": "its share of the difference to restore, 0 as in the corrupted run, 1 as in the clean run",
}
_NAMES = "L5 is layer 5, L5H1 its head 1, L5G1.k shared keys, MLP5 its MLP; then the token and its position in brackets"


@dataclass(frozen=True, eq=False)
class PairStudy(Result):
    """The model's predictions for both prompts, and the effect of every patch between them on the logit difference.

    `sweeps` are the requested sites, `layers` whole layers of attn_out and mlp_out. `patterns` belong to `heads`, those
    whose patch changed the metric most (empty if z was not swept). `shared` is the number of tokens that both prompts
    share at their beginning and end; only these are patched by layer or head if the prompts differ in length.
    """

    model: str
    clean: list[str]
    corrupted: list[str]
    answer: str
    wrong_answer: str
    clean_top: list[tuple[str, float]]
    corrupted_top: list[tuple[str, float]]
    sweeps: dict[str, PatchSweep]
    layers: dict[str, PatchSweep]
    heads: list[str]
    patterns: Float[Tensor, "head query_pos key_pos"]
    shared: tuple[int, int]

    @property
    def any_sweep(self) -> PatchSweep:
        """Any of the sweeps, for the two baselines that all share."""
        return next(iter(self.sweeps.values()))

    def table(self, n: int | None = 16) -> Table:
        """The patches that changed the logit difference most, equally many per site; at most `n` in total."""
        per_site = None if n is None else -(-n // max(1, len(self.sweeps)))
        rows = [(site, *row) for site, sweep in self.sweeps.items() for row in sweep.table(per_site).rows]
        return Table(("site", "patch", "logit difference", *self.any_sweep.table(0).columns[2:]), rows).head(n)

    def figure(self) -> Any:
        """The first site's sweep."""
        return self.any_sweep.figure()

    def report(self) -> Any:
        """The study as a page: predictions, a figure per site, layers, heads; `report().save(path, data=study)`."""
        from hooklens import viz
        from hooklens.viz.report import Report

        report = Report(f"Activation patching in {self.model}")
        self.show_prompts(report)
        for site, sweep in self.sweeps.items():
            report.heading(f"Patching {site}")
            self.show_sweep(report, sweep)
            terms = {site: f"the patch. {_NAMES}", **_PATCHES}
            report.table(sweep.top(8), f"The patches of {site} that moved the logit difference most.", terms)
        report.heading("Layer by layer")
        for sweep in self.layers.values():
            report.figure(sweep.figure(), f"{self.patched(sweep)} One pair has no interval.")
        if self.heads:
            report.heading("What the strongest heads attend to").figure(
                viz.attention_heads(self.patterns, self.clean, self.heads),
                "On the clean prompt. A head that restores the logit difference need not be a name mover: this label "
                "needs many pairs, as in `hooklens demo`.",
            )
        return say_exactness(report, [*self.sweeps.values(), *self.layers.values()])

    def show_prompts(self, report: "Report") -> None:
        """The two prompts with the model's guesses, the answers, and the difference between the runs."""
        report.prompts(
            self.clean,
            self.corrupted,
            clean_top=self.clean_top,
            corrupted_top=self.corrupted_top,
            caption="Coloured: where the prompts differ. Below each prompt: the model's most likely next tokens.",
        )
        sweep = self.any_sweep
        report.numbers(
            {
                "answer": repr(self.answer),
                "wrong answer": repr(self.wrong_answer),
                "logit difference, clean": sweep.clean,
                "logit difference, corrupted": sweep.corrupted,
                "difference to restore": sweep.clean - sweep.corrupted,
            }
        )

    def show_sweep(self, report: "Report", sweep: PatchSweep) -> None:
        """A sweep's figure; if it leaves out rows, all rows are in a folded section."""
        report.figure(sweep.figure(), self.patched(sweep))
        rows = sweep.values[..., 0].numel()
        if sweep.values.ndim == 3 and rows > STRONGEST:
            with report.fold(f"All {rows} rows"):
                report.figure(sweep.figure(rows=None))

    def patched(self, sweep: PatchSweep) -> str:
        """What a sweep of this pair wrote where, and how to read its numbers."""
        unit = next((words for axis, words in _UNITS.items() if axis in sweep.by), "one layer at a time")
        first, last = self.shared
        if "pos" in sweep.by:
            where = "one token position at a time"
        elif len(self.clean) == len(self.corrupted):
            where = "at all positions"
        else:
            where = (
                f"only at the first {first} and the last {last} tokens, which both prompts share, because the prompts "
                f"have {len(self.clean)} and {len(self.corrupted)} tokens; the tokens between keep their own value"
            )
        read = "Both runs have the same logit difference, so its change is shown."
        read = "0: as in the corrupted run, 1: as in the clean run." if sweep.defined else read
        return (
            f"Patched: {SITES[sweep.site].words or sweep.site}, {unit}, {where}. Written: its value in the clean run, "
            f"into the corrupted run, every later layer recomputed. {read}"
        )


def study_pair(
    model: HookedTransformer,
    pairs: PromptPairs,
    *,
    sites: Sequence[str] = ("resid_pre", "z"),
    by: str | None = None,
    resume: Mapping[str, Path] | None = None,
) -> PairStudy:
    """Sweep several sites of one pair, and whole layers, with the logit difference of two answers as the metric.

    >>> from hooklens.testing import tiny_model
    >>> study = study_pair(tiny_model(), PromptPairs([1, 2, 3], [1, 4, 3], answer=5, wrong_answer=6))
    >>> study.sweeps["z"].values.shape, len(study.heads)         # layer head
    (torch.Size([2, 2]), 4)

    `by` is the grid of the sites that are swept by position by default; `resume` gives one file per site.
    """
    with torch.no_grad(), packed_linears(rows=1024):  # the weights are packed once for all sweeps
        study = sweep_pair(model, pairs, grids(sites, by), resume or {})
        return replace(study, layers=by_layer(model, pairs))


def sweep_pair(
    model: HookedTransformer, pairs: PromptPairs, axes: Mapping[str, tuple[str, ...]], resume: Mapping[str, Path]
) -> PairStudy:
    """`study_pair` without its whole layers: sweeps over the grid of each site. Gradients must be off."""
    need_tokens(model, "study_pair", "hl.patch(model, clean, corrupted, metric) sweeps the same sites for vectors")
    metric = pairs.metric_of(model)
    sweeps = {site: patch(model, pairs, site=site, by=by, resume=resume.get(site)) for site, by in axes.items()}
    clean, corrupted = (rows_of(model, prompts, "prompts")[0] for prompts in (pairs.clean, pairs.corrupted))
    by_head = "z" in sweeps and sweeps["z"].by == ("layer", "head")
    strongest = sweeps["z"].order()[:_STRONGEST] if by_head else []
    return PairStudy(
        model.cfg.model_name,
        clean=show(model, clean),
        corrupted=show(model, corrupted),
        answer=show(model, metric.answer)[0],
        wrong_answer=show(model, metric.wrong_answer)[0],
        clean_top=_guesses(model, clean),
        corrupted_top=_guesses(model, corrupted),
        sweeps=sweeps,
        layers={},
        heads=[head_name(layer, head) for layer, head in strongest],
        patterns=head_patterns(model, clean, strongest),
        shared=common_ends(clean, corrupted),
    )


def check_pair(
    model: HookedTransformer, pairs: PromptPairs, *, sites: Sequence[str], by: str | None
) -> tuple[int, list[tuple[str, ...]]]:
    """Return the clean prompt's length and every site's grid; raise for unusable arguments before anything runs."""
    swept = grids(sites, by)
    axes = list(swept.values())

    def prompts() -> int:
        groups = read_pairs(model, pairs.clean, pairs.corrupted, [name for names in axes for name in names])
        check_prompts_differ(groups)
        return groups[0].clean.shape[1]

    answers = {"answer": lambda: pairs.metric_of(model)}
    there = {"sites": lambda: [has_site(model, site) for site in swept]}
    return judge({**answers, **there, "clean": prompts})["clean"], axes


def grids(sites: Sequence[str], by: str | None) -> dict[str, tuple[str, ...]]:
    """The grid of each site: `by` if the site has those axes, else its own. Raises if `by` fits none of them.

    >>> grids(["resid_pre", "z"], "layer x head x pos")
    {'resid_pre': ('layer', 'pos'), 'z': ('layer', 'head', 'pos')}
    """
    kinds = [site_kind(site) for site in several("sites", sites)]
    axes, refused = {}, []
    for site in kinds:
        try:
            axes[site] = grid_axes(site, by)
        except InputError as error:
            refused.append(error)
            axes[site] = grid_axes(site, None)
    if len(refused) == len(kinds):
        raise refused[0]
    return axes


def by_layer(model: HookedTransformer, pairs: PromptPairs) -> dict[str, PatchSweep]:
    """What does each layer's attention, and each layer's MLP, restore at all positions at once?"""
    points = model.hook_points()
    sites = [site for site in ("attn_out", "mlp_out") if f"blocks.0.{SITES[site].point}" in points]
    return {site: patch(model, pairs, site=site, by="layer") for site in sites}


def head_patterns(
    model: HookedTransformer, ids: Tensor, heads: Sequence[tuple[int, ...]]
) -> Float[Tensor, "head query_pos key_pos"]:
    """The attention patterns of the given heads on one prompt."""
    if not heads:
        return torch.zeros(0, len(ids), len(ids))
    _, cache = model.run_with_cache(ids[None], [("pattern", layer) for layer in sorted({layer for layer, _ in heads})])
    return torch.stack([cache["pattern", layer][0, head] for layer, head in heads])


def _guesses(model: HookedTransformer, ids: Tensor) -> list[tuple[str, float]]:
    probs = model(ids[None], logits_at=-1)[0, 0].float().softmax(-1)
    best = probs.topk(min(_GUESSES, len(probs)))
    return list(zip(show(model, best.indices), best.values.tolist(), strict=True))


def demo(model: HookedTransformer) -> PairStudy | Needs:
    """Two short prompts that differ in one token; token numbers where the model has no tokenizer."""
    return needs_tokens(model) or study_pair(model, demo_pairs(model))

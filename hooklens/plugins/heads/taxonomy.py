"""A taxonomy of heads: one label per head, with its score, its causal effect and its caveats."""

from dataclasses import replace
from numbers import Real

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.cache import ActivationCache
from hooklens.core.errors import ArgumentError, InputError
from hooklens.data.indirect_object import check_n_pairs
from hooklens.data.prompts import need_tokens
from hooklens.data.repeated import Repeated, repeated_tokens
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.copy_suppression import CopySuppression, anti_copy
from hooklens.plugins.heads.copying import score_copying
from hooklens.plugins.heads.ece_change import calibration_change, calibration_text
from hooklens.plugins.heads.head_labels import UNLABELLED, Taxonomy
from hooklens.plugins.heads.head_scores import LABELS, key_masks, score_heads
from hooklens.plugins.heads.knockout import KEPT, Keeps, all_but, knockout_after
from hooklens.plugins.heads.named import name_evidence
from hooklens.plugins.heads.previous_token import PositionScores, score_positions
from hooklens.plugins.heads.rotations import DRAWS, Mask
from hooklens.plugins.heads.which import captured, check_model
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.statistics import q_values
from hooklens.sweeps.settings import engine

__all__ = ["LABELS", "UNLABELLED", "Taxonomy", "classify_heads", "demo", "placebo_keep"]
_N_POS = 16
_LEAST_SEQUENCES = 6
_TEXTS = 8  # for the calibration change: each control needs a run over them
_SUPPRESSORS = ("copy suppression", "negative name mover")


def classify_heads(
    model: HookedTransformer, *, n: int = 12, alpha: float = 0.05, draws: int = DRAWS, ioi: int = 128, seed: int = 0
) -> Taxonomy:
    """Which heads are previous-token, duplicate-token, induction or copy-suppression heads, with evidence?

    A label takes two findings. The score: on `n` repeated random sequences the head looks at the label's keys more
    than heads do whose queries are rotated at random (and for copy suppression its OV lowers the token it reads more
    than rotated values do), at q <= `alpha` over all heads and labels. The effect: on `n` other sequences, blocking
    exactly that attention raises the loss of the repeated tokens (for copy suppression: lowers it), with an interval
    and a q-value that exclude 0, and more than taking as much attention from the head's other keys
    (`placebo_keep`). A head with several labels keeps that of the largest effect; one without stays unlabelled.

    >>> from hooklens.testing import induction_model
    >>> classify_heads(induction_model()).labels()
    [['previous token', 'unlabelled'], ['unlabelled', 'induction']]

    With a tokenizer that knows names, `ioi` prompt pairs are used to look for name movers and negative name movers (0
    to skip): half of them label heads, and the numbers come from the other half.

    Reference: Olsson et al. (2022), "In-context Learning and Induction Heads"; McDougall et al. (2023), "Copy
    Suppression"; Geva et al. (2023), "Dissecting Recall of Factual Associations" (attention knockout).
    """
    check_model(model, "classify_heads")
    need_tokens(model, "classify_heads", "hl.heads.score_heads(model, prompts) and hl.ablate read vectors")
    check_sizes(n, alpha)
    check_pairs_asked(ioi)
    both = repeated_tokens(model, 2 * n, seed=seed)
    chosen, reported = both.part(0, n), both.part(n, 2 * n)
    with torch.no_grad(), packed_linears(rows=1024):
        scores = score_heads(model, chosen.tokens, draws=draws, seed=seed)
        ov = score_copying(model, draws=draws, seed=seed)
        p = {label: scores.p[kind] for label, (kind, _) in LABELS.items()}
        p["copy suppression"] = torch.maximum(p["copy suppression"], ov.suppresses)
        score_p = torch.stack(list(p.values()))
        names, note = None, "name movers were not asked for"
        if ioi:
            names, note = name_evidence(model, ioi, alpha=alpha, seed=seed)
        untouched = captured(model, reported.tokens, KEPT)[1]
        masks = key_masks(reported.tokens)
        blocking = {kind: all_but(mask, model) for kind, mask in masks.items()}
        effect = _effects(model, reported, untouched, blocking, q_values(score_p) <= alpha)
        taxonomy = Taxonomy(
            scores=scores,
            ov=ov,
            score_p=score_p,
            effect=effect,
            placebo=torch.full_like(effect, torch.nan),
            loss=-reported.metric()(model(reported.tokens)),
            names=names,
            note=note,
            alpha=alpha,
            positions=_positions(model, seed),
        )
        taxonomy = _with_placebo(model, taxonomy, reported, untouched, blocking)
        return replace(taxonomy, suppression=_suppression(model, taxonomy, reported, seed))


def check_sizes(n: int, alpha: float = 0.05) -> None:
    """Are these enough sequences for a p-value at this level?"""
    if not isinstance(alpha, Real) or not 0 < alpha < 1:
        raise ArgumentError("{alpha} lies between 0 and 1, got {0}", f"{alpha!r:.80}")
    if whole("n", n) < _LEAST_SEQUENCES:
        raise ArgumentError(
            "{n} is the number of random sequences, at least {0}: p-values come from flipping their signs; got {1}",
            _LEAST_SEQUENCES,
            n,
        )


def check_pairs_asked(ioi: int) -> None:
    """Raise if this number of prompt pairs cannot be made; 0 means none."""
    if whole("ioi", ioi):
        check_n_pairs(ioi, "ioi")


def placebo_keep(
    pattern: Float[Tensor, "sequence head query_pos key_pos"], mask: Mask, *, normalised: bool = True
) -> Float[Tensor, "sequence head query_pos key_pos"]:
    """The share of their weight that the other keys keep when they lose as much attention as the marked keys have.

    All other keys lose the same share, query by query; if they have less than the marked keys, they lose everything. In
    a `normalised` pattern the rows are divided by their sums afterwards, which returns part of what was taken. With t
    on the marked keys and o = 1 - t on others that keep k, the others end up with k o / (k o + t). This equals o - t, a
    loss equal to the marked keys' attention, at k = (o - t) / 2 o.

    >>> pattern = torch.tensor([[[[0.5, 0.2, 0.25, 0.05]]]])
    >>> keep = placebo_keep(pattern, torch.tensor([[[False, True, False, False]]]))[0, 0, 0]
    >>> keep.tolist(), round((pattern * keep / (pattern * keep).sum())[0, 0, 0, 1].item(), 6)     # 0.2 moved to it
    ([0.375, 1.0, 0.375, 0.375], 0.4)
    """
    size, marked = pattern.abs(), mask[:, None]
    own, others = ((size * part).sum(-1, keepdim=True) for part in (marked, ~marked))
    left = (others - own).clamp_min(0) / others.clamp_min(torch.finfo(size.dtype).tiny)
    return torch.where(marked | ~marked.any(-1, keepdim=True), 1.0, left / 2 if normalised else left)


def _effects(
    model: HookedTransformer,
    sequences: Repeated,
    untouched: ActivationCache,
    keeps: dict[str, Keeps],
    asked: Bool[Tensor, "label layer head"],
) -> Float[Tensor, "sequence label layer head"]:
    """The knockout effect of every requested head and label, NaN elsewhere; labels of one kind share a sweep."""
    tokens, metric, kinds = sequences.tokens, sequences.metric(), [kind for kind, _ in LABELS.values()]
    wide = torch.promote_types(model.dtype, torch.float32)  # dtype of the decreases: half precision would round them
    effect = torch.full((len(sequences), *asked.shape), torch.nan, dtype=wide, device=model.device)
    for kind in dict.fromkeys(kinds):
        rows = [i for i, other in enumerate(kinds) if other == kind]
        heads = [(layer, head) for layer, head in asked[rows].any(0).nonzero().tolist()]
        if heads:
            sweep = knockout_after(
                model, untouched, tokens=tokens, metric=metric, kind=kind, keeps=keeps[kind], chosen=heads
            )
            layers, which = zip(*heads, strict=True)
            for row in rows:
                effect[:, row, layers, which] = sweep.fall.to(effect)
    return torch.where(asked.to(effect.device), effect, torch.nan)


def _with_placebo(
    model: HookedTransformer,
    taxonomy: Taxonomy,
    reported: Repeated,
    untouched: ActivationCache,
    blocking: dict[str, Keeps],
) -> Taxonomy:
    """The placebo's effect, and the attention that both interventions took, where the effect differs from 0."""
    masks, asked = key_masks(reported.tokens), taxonomy.candidates | taxonomy.opposite
    scores = [untouched["attn_scores", layer] for layer in range(model.cfg.n_layers)]
    patterns = [block.attn.score.pattern(score, None) for block, score in zip(model.blocks, scores, strict=True)]
    normalised = model.blocks[0].attn.score.row_sums_to_one
    others = {
        kind: [placebo_keep(pattern, mask, normalised=normalised) for pattern in patterns]
        for kind, mask in masks.items()
    }
    with engine(verify=0):  # the same sweep with other keys was checked above
        placebo = _effects(model, reported, untouched, others, asked)
    blocked = torch.stack([_blocked(patterns, masks, keeps, normalised) for keeps in (blocking, others)])
    return replace(taxonomy, placebo=placebo, blocked=blocked.where(asked.to(blocked.device), torch.nan))


def _blocked(
    patterns: list[Tensor], masks: dict[str, Mask], keeps: dict[str, Keeps], normalised: bool
) -> Float[Tensor, "label layer head"]:
    """The attention that keys finally lose with these shares, mean over the queries with a key of the label."""
    labels = []
    for kind, _ in LABELS.values():
        queries, lost = masks[kind].any(-1)[:, None], []
        for pattern, keep in zip(patterns, keeps[kind], strict=True):
            size, kept = pattern.abs(), pattern.abs() * keep
            if normalised:
                kept *= size.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
            lost.append(((size - kept).clamp_min(0).sum(-1) * queries).sum((0, 2)) / queries.sum())
        labels.append(torch.stack(lost))
    return torch.stack(labels)


def _positions(model: HookedTransformer, seed: int) -> PositionScores | None:
    try:
        return score_positions(model, n_pos=_N_POS, seed=seed)
    except InputError:  # positions cannot be separated in this model
        return None


def _suppression(model: HookedTransformer, taxonomy: Taxonomy, reported: Repeated, seed: int) -> CopySuppression | None:
    """The effect of the suppressing heads on the token they attend to, on these sequences, and on calibration."""
    heads = sorted(at for at, labels in taxonomy.called().items() if set(labels) & set(_SUPPRESSORS))
    if not heads:
        return None
    direct, control = anti_copy(model, reported.tokens, seed=seed)
    text, data = calibration_text(model, _TEXTS, seed)
    change = calibration_change(model, text, heads, data, seed=seed)
    return CopySuppression(direct, control, change, "random tokens that repeat")


def demo(model: HookedTransformer) -> Taxonomy | Needs:
    """The taxonomy on a few short sequences; works on any model that reads tokens."""
    return needs_tokens(model) or classify_heads(model, n=6, draws=50, ioi=0)

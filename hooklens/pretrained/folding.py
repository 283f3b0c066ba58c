"""Weight folding: pure functions from a model to a new model with the same log-probabilities and simpler weights.

Each function copies the weights, leaves the original model unchanged, records its name in `cfg.folded`, and raises
where it would not be exact.

Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", appendix; TransformerLens's
`fold_ln` and friends.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError, did_you_mean
from hooklens.model.block import Block
from hooklens.model.config import Biases, HookedTransformerConfig, LayerNormPart, Sinusoidal
from hooklens.model.norms import Norm
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.builder import assign, own_parameters, parameter_shapes

Weights = dict[str, Tensor]
_READERS: dict[Literal["attn", "mlp"], tuple[str, ...]] = {
    "attn": ("attn.q", "attn.k", "attn.v"),
    "mlp": ("mlp.in_", "mlp.gate"),
}
_GROUPS = {
    "qkv": ("attn.q.bias", "attn.k.bias", "attn.v.bias"),
    "o": ("attn.o.bias",),
    "mlp": ("mlp.in_.bias", "mlp.out.bias"),
    "gate": ("mlp.gate.bias",),
    "unembed": ("unembed.linear.bias",),
}
_EMBED, _HEAD = "embed.weight", "unembed.linear.weight"


def fold_ln(model: HookedTransformer) -> HookedTransformer:
    """Move each norm's weight and bias into the layers that read it: W (g x + s) = (W g) x + W s.

    Norms stay in place and divide as before, with weight 1 and bias 0. Tied embeddings are untied, because the final
    norm's weight goes into the unembedding only. Norms inside attention (q/k) and after a branch (sandwich) are not
    followed by a linear layer and stay unchanged.

    >>> from hooklens.testing import tiny_model
    >>> folded = fold_ln(tiny_model())
    >>> folded.ln_final.weight.unique(), folded.cfg.folded
    (tensor([1.], grad_fn=<...>), ('fold_ln',))
    """
    if model.blocks[0].not_a_sum is not None:
        raise _refused("fold_ln", f"{model.blocks[0].not_a_sum}: the norm's output is the residual stream")
    weights = _copied(model, "fold_ln")
    for layer, block in enumerate(model.blocks):
        for part, linears in _READERS.items():
            norm = block.reads_through(part).norm
            _absorb(weights, norm, [f"blocks.{layer}.{linear}" for linear in linears])
    _untie(weights)
    _absorb(weights, model.ln_final, ["unembed.linear"])
    return _made(model, weights, "fold_ln")


def center_writing_weights(model: HookedTransformer) -> HookedTransformer:
    """Subtract the mean over d_model from everything that is written to the residual stream.

    Every reader is a LayerNorm, which subtracts this mean anyway, so its output is unchanged. Tied embeddings are
    untied: the unembedding keeps the old rows.

    >>> from hooklens.testing import tiny_model
    >>> bool(center_writing_weights(tiny_model()).W_E.mean(-1).abs().max() < 1e-6)
    True
    """
    _check_centring(model.cfg, model.blocks[0])
    weights = _copied(model, "center_writing_weights")
    _untie(weights)
    for name, weight in weights.items():
        if name in (_EMBED, "pos_embed.weight") and weight.shape[-1] == model.cfg.d_model:
            weights[name] = _less_mean(weight, -1)
        elif name.startswith("embed.") or name.endswith(_WRITERS):  # (d_model, in), or a bias
            weights[name] = _less_mean(weight, 0)
    return _made(model, weights, "center_writing_weights")


def center_unembed(model: HookedTransformer) -> HookedTransformer:
    """Subtract the mean over the vocabulary from W_U and b_U, so that all logits of a position shift by one amount.

    Log-probabilities are unchanged; logits are not.

    >>> from hooklens.testing import tiny_model
    >>> bool(center_unembed(tiny_model()).W_U.mean(-1).abs().max() < 1e-6)
    True
    """
    if model.cfg.output_logits_soft_cap is not None:
        raise _refused("center_unembed", "a soft cap follows the logits, so a shift before it changes probabilities")
    weights = _copied(model, "center_unembed")
    _untie(weights)
    for name in (_HEAD, "unembed.linear.bias"):
        if name in weights:
            weights[name] = _less_mean(weights[name], 0)
    return _made(model, weights, "center_unembed")


def fold_value_biases(model: HookedTransformer) -> HookedTransformer:
    """Fold b_V into b_O: the rows of a pattern sum to 1, so every query receives the whole b_V wherever it attends.

    >>> from hooklens.testing import tiny_model
    >>> int(fold_value_biases(tiny_model()).b_V.count_nonzero())
    0
    """
    if not model.cfg.score_fn.row_sums_to_one:
        raise _refused(
            "fold_value_biases",
            f"the rows of a pattern with the score function {model.cfg.score_fn.name!r} need not sum to 1",
        )
    weights = _copied(model, "fold_value_biases")
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}.attn."
        if at + "v.bias" not in weights:
            continue
        grouped = weights[at + "v.bias"].double().view(-1, model.cfg.d_head)
        per_head = grouped.repeat_interleave(model.cfg.n_heads // len(grouped), 0)
        moved = weights[at + "o.weight"].double() @ per_head.flatten()
        _add(weights, at + "o", moved)
        weights[at + "v.bias"] = torch.zeros_like(weights[at + "v.bias"])
    return _made(model, weights, "fold_value_biases")


FOLDINGS: dict[str, Callable[[HookedTransformer], HookedTransformer]] = {
    fold.__name__: fold for fold in (fold_ln, center_writing_weights, center_unembed, fold_value_biases)
}
_WRITERS = ("attn.o.weight", "attn.o.bias", "mlp.out.weight", "mlp.out.bias")


def fold_all(model: HookedTransformer, names: Sequence[str]) -> HookedTransformer:
    """Apply the named foldings in order.

    >>> from hooklens.testing import tiny_model
    >>> fold_all(tiny_model(), ["fold_ln", "center_unembed"]).cfg.folded
    ('fold_ln', 'center_unembed')
    """
    for name in [names] if isinstance(names, str) else names:
        if name not in FOLDINGS:
            raise did_you_mean("folding", name, FOLDINGS)
        model = FOLDINGS[name](model)
    return model


def _refused(name: str, why: str) -> InputError:
    return InputError(f"{name} would not be exact on this model: {why}; use the model without this folding")


def _copied(model: HookedTransformer, name: str) -> Weights:
    return {key: p.detach().clone() for key, p in own_parameters(model, name).items()}


def _untie(weights: Weights) -> None:
    if _HEAD not in weights:
        weights[_HEAD] = weights[_EMBED].clone()


def _less_mean(weight: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    wide = weight.double()
    mean = wide.masked_fill(wide.isneginf(), torch.nan).nanmean(dim, keepdim=True)  # -inf in b_U forbids a token
    return (wide - mean).to(weight.dtype)


def _add(weights: Weights, linear: str, shift: Float[Tensor, "d_out"]) -> None:
    """Add to a layer's bias; creates the bias if there is none."""
    old = weights.get(f"{linear}.bias")
    total = shift if old is None else old.double() + shift
    weights[f"{linear}.bias"] = total.to(weights[f"{linear}.weight"].dtype)


def _absorb(weights: Weights, norm: Norm | None, linears: list[str]) -> None:
    """Put a norm's weight and bias into the layers behind it."""
    if norm is None or norm.weight is None:
        return
    name = norm.hook_scale.name.removesuffix(".hook_scale")
    gain = norm.gain().detach().double()  # type: ignore[union-attr]
    for linear in (linear for linear in linears if f"{linear}.weight" in weights):
        weight = weights[f"{linear}.weight"]
        if norm.bias is not None:
            _add(weights, linear, weight.double() @ norm.bias.detach().double())
        weights[f"{linear}.weight"] = (weight.double() * gain).to(weight.dtype)
    weights[f"{name}.weight"] = torch.full_like(weights[f"{name}.weight"], norm.unit_weight)
    if norm.bias is not None:
        weights[f"{name}.bias"] = torch.zeros_like(weights[f"{name}.bias"])


def _check_centring(cfg: HookedTransformerConfig, block: Block) -> None:
    name = "center_writing_weights"
    written = [*block.writes_through("attn").scales, *block.writes_through("mlp").scales]
    if written or block.leaves_through().norm is not None or block.not_a_sum is not None:
        kind = block.part.name
        raise _refused(name, f"in a {kind}-norm block a norm writes to the residual stream, and its mean stays")
    for norm in (cfg.normalization_type, cfg.final_norm):
        if not isinstance(norm, LayerNormPart):
            what = (
                "no norm" if norm is None else f"{type(norm).__name__.removesuffix('Part')}, which does not subtract it"
            )
            raise _refused(name, f"a layer reads the stream through {what}")
    if isinstance(cfg.positional_embedding_type, Sinusoidal):
        raise _refused(name, "the fixed sinusoidal positions write to the residual stream, and their mean remains")


def _made(model: HookedTransformer, weights: Weights, name: str) -> HookedTransformer:
    """A model with these weights; it is untied and has additional biases where the weights require it."""
    cfg = model.cfg
    present: dict[str, Any] = {f: any(key.endswith(names) for key in weights) for f, names in _GROUPS.items()}
    if not cfg.gated_mlp or present["gate"] == present["mlp"]:
        present["gate"] = None
    folded = HookedTransformer(
        cfg.replace(
            tie_word_embeddings=cfg.tie_word_embeddings and _HEAD not in weights,
            biases=Biases(**present),
            folded=cfg.folded if name in cfg.folded else (*cfg.folded, name),
        ),
        tokenizer=model.tokenizer,
        device="meta",
        dtype=model.dtype,
    )
    for key, shape in parameter_shapes(folded).items():
        if key not in weights:  # a new bias in a group where another layer now has one
            weights[key] = weights[key.removesuffix("bias") + "weight"].new_zeros(shape)
        assign(folded, key, weights[key])
    folded.tie()
    return folded.train(model.training)

"""A model's self check: are the weights finite, do the identities hold, do different ways to the logits agree?"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.hooks import HookCall
from hooklens.model.attention import differentiable_attention
from hooklens.model.config import TokenEmbed
from hooklens.model.kv_cache import KVCache
from hooklens.model.transformer import HookedTransformer
from hooklens.results.result import Result, Table

Inputs = Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_in"]
Row = tuple[str, float, float, bool]

#: The largest allowed difference between two computations, as a share of the largest value: rounding over the layers.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}
_RESIDUAL_BOUND = 1e-6
_ROOM = 3  # positions of padding


@dataclass(frozen=True, eq=False)
class CheckReport(Result):
    """The checks that ran: name, measured value, bound, and whether the check passed."""

    model: str
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Did every check pass?"""
        return all(row[3] for row in self.rows)

    def table(self, n: int | None = None) -> Table:
        """One row per check."""
        shown = [
            (name, _readable(measured), _readable(bound), "ok" if ok else "FAILED")
            for name, measured, bound, ok in self.rows
        ]
        return Table(("check", "measured", "at most", "result"), shown).head(n)


def _readable(value: float) -> str:
    """Format counts in full, and differences with two digits.

    >>> [_readable(x) for x in (0.0, 49151.0, 0.0001, 1.23456e-07, 1234.5, float("nan"))]
    ['0', '49,151', '0.0001', '1.2e-07', '1,234', 'nan']
    """
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value, 0) else f"{value:.2g}"


def check(model: HookedTransformer, *, n_tokens: int = 12, seed: int = 0) -> CheckReport:
    """Does this model satisfy what every HookedTransformer promises? Runs about nine forward passes on random tokens.

    >>> from hooklens.testing import tiny_model
    >>> check(tiny_model()).ok
    True
    """
    x = random_inputs(model, batch=2, pos=max(1, min(n_tokens, model.cfg.n_ctx - _ROOM)), seed=seed)
    rows = [_row("non-finite values in the weights", _not_finite(model), 0)]
    with torch.no_grad():
        rows += _identities(model, x)
        rows.append(_row("hook points missing or out of order", _out_of_order(model, x), 0))
        whole = model(x)
        bound = BOUNDS.get(model.dtype, 1e-4)
        for name, other in _other_ways(model, x, whole).items():
            rows.append(_row(name, _apart(other, whole), bound))
    if model.tokenizer is not None:
        rows.append(_row("the tokenizer's largest id", model.tokenizer.vocab_size - 1, model.cfg.d_vocab - 1))
    return CheckReport(model.cfg.model_name, rows)


def random_inputs(model: HookedTransformer, *, batch: int, pos: int, seed: int) -> Inputs:
    """Random tokens, or random vectors if the model reads vectors."""
    cfg, generator = model.cfg, seeded(seed)
    if isinstance(cfg.embed, TokenEmbed):
        return torch.randint(cfg.d_vocab, (batch, pos), generator=generator).to(model.device)
    return torch.randn(batch, pos, cfg.embed.d_in, generator=generator).to(model.device, model.dtype)


def _row(name: str, measured: float | int, bound: float | int) -> Row:
    return name, float(measured), float(bound), bool(measured <= bound)  # False for NaN


def _apart(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """The largest difference, as a share of the largest value; tokens with -inf in both agree."""
    forbidden = a.isneginf() & b.isneginf()
    a, b = (x.double().masked_fill(forbidden, 0.0) for x in (a, b))
    return float((a - b).abs().amax() / b.abs().amax().clamp_min(1e-30))


def _not_finite(model: HookedTransformer) -> int:
    forbids = model.unembed.linear.bias  # -inf here means that the model never predicts this token
    bad = sum(int((~parameter.isfinite()).sum()) for parameter in model.parameters())
    return bad if forbids is None else bad - int(forbids.isneginf().sum())


def _identities(model: HookedTransformer, x: Inputs) -> list[Row]:
    """Check the two sums that make up the residual stream, at the layer with the largest error."""
    _, cache = model.run_with_cache(x, names=["resid_pre", "attn_out", "resid_post", *_optional(model)])
    worst: dict[str, float] = {}
    block: Any
    for layer, block in enumerate(model.blocks):
        order = ("mlp_out", "attn_out") if block.attn_reads_mlp else ("attn_out", "mlp_out")
        first, *later = [site for site in order if (site, layer) in cache]
        stream = cache["resid_pre", layer] + cache[first, layer]
        if ("resid_mid", layer) in cache:
            name = f"resid_mid against resid_pre + {first}"
            worst[name] = max(worst.get(name, 0.0), _apart(cache["resid_mid", layer], stream))
            stream = block.after_mid(cache["resid_mid", layer])
        for site in later:
            stream = stream + cache[site, layer]
        name = f"resid_post against the stream + {later[0] if later else first}"
        worst[name] = max(worst.get(name, 0.0), _apart(cache["resid_post", layer], stream))
    return [_row(name, apart, _RESIDUAL_BOUND) for name, apart in worst.items()]


def _optional(model: HookedTransformer) -> list[str]:
    names = model.hook_names()
    return [site for site in ("resid_mid", "mlp_out") if any(name.endswith(f".hook_{site}") for name in names)]


def _out_of_order(model: HookedTransformer, x: Inputs) -> int:
    fired: list[str] = []

    def note(act: Tensor, hook: HookCall) -> None:
        fired.append(hook.name)

    with model.hooks(fwd_hooks=[(model.hook_names(), note)]):
        model(x)
    wanted = model.hook_names()
    return sum(a != b for a, b in zip(fired, wanted, strict=False)) + abs(len(fired) - len(wanted))


def _other_ways(
    model: HookedTransformer, x: Inputs, whole: Float[Tensor, "batch pos d_vocab"]
) -> dict[str, Float[Tensor, "batch pos d_vocab"]]:
    """The same logits, computed in different ways."""
    ways = {"hooks on every point": model.run_with_hooks(x, fwd_hooks=[(model.hook_names(), _leave)])}
    with differentiable_attention():
        ways["attention not fused"] = model(x)
    half = model(x, stop_at_layer=model.cfg.n_layers // 2)
    ways["stopped half way and restarted"] = model(half, start_at_layer=model.cfg.n_layers // 2)
    ways["left padding"] = _padded(model, x, left=True)
    ways["right padding"] = _padded(model, x, left=False)
    if model.cfg.causal:
        past = KVCache()
        steps = [model(x[:, i : i + 1], kv_cache=past) for i in range(x.shape[1])]
        ways["step by step through the KV cache"] = torch.cat(steps, dim=1)
    return ways


def _leave(act: Tensor, hook: HookCall) -> Tensor:
    return act.clone()


def _padded(model: HookedTransformer, x: Inputs, *, left: bool) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits of the real positions, with padding before or after them."""
    room = x[:, : min(_ROOM, model.cfg.n_ctx - x.shape[1])]
    joined = torch.cat((room, x) if left else (x, room), dim=1)
    mask: Bool[Tensor, "batch pos"] = torch.ones(joined.shape[:2], dtype=torch.bool, device=x.device)
    mask[:, slice(0, room.shape[1]) if left else slice(x.shape[1], None)] = False
    logits = model(joined, attention_mask=mask)
    return logits[:, room.shape[1] :] if left else logits[:, : x.shape[1]]

"""Direct effects for prompts of one length: activations times the vector that maps the stream to the answer's logit.

Weights are never read: input times gradient is exact for a linear layer, whatever wraps it (LoRA).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.cache import ActivationCache
from hooklens.core.errors import InputError
from hooklens.core.gradients import need_gradients
from hooklens.model.linear import is_plain, without_bias
from hooklens.model.norms import Passage
from hooklens.model.transformer import HookedTransformer

Vector = Float[Tensor, "prompt d_model"]
Pick = Callable[[Float[Tensor, "prompt d_out"]], Float[Tensor, "prompt"]]

_TOKENS_COMPARED = 2048  # number of tokens of the vocabulary used for a spread
_TOKENS_AT_ONCE = 4096  # maximum number of prompt tokens per forward pass


class Direct(NamedTuple):
    """The parts of a LogitAttribution for prompts of one length; `tensors` have one row per prompt."""

    tensors: dict[str, Tensor]
    sources: list[Float[Tensor, "layer head _"]]
    labels: list[str]
    error: float


class DirectEffects:
    """One position of each prompt: its activations, and the vector that turns a stream into the answer's logit."""

    def __init__(self, model: HookedTransformer, tokens: Shaped[Tensor, "prompt pos *d_in"], pos: int, pick: Pick):
        if not -tokens.shape[1] <= pos < tokens.shape[1]:
            raise InputError(f"pos={pos} is out of range for a prompt of {tokens.shape[1]} tokens")
        self.model, self.pick = model, pick
        self.cache, stream = _run(model, tokens, pos)
        points = ["unembed.hook_out", *Passage(model.ln_final).scales]
        with torch.no_grad():
            _, last = model.run_with_cache(stream[:, None], points, start_at_layer=model.cfg.n_layers)
        self.final_scale = lambda name: last[name][:, 0]
        self.wide = torch.promote_types(stream.dtype, torch.float32)
        self.logit = pick(last["unembed.hook_out"][:, 0].to(self.wide))
        read, self.unembed_bias = _read_by(model.unembed.linear, stream, lambda out: pick(out.to(self.wide)))
        self.final = Passage(model.ln_final)
        self.vector = _before(self.final, self.final_scale, read)
        self.norm_bias = _bias_read(self.final, read)

    def dot(self, x: Float[Tensor, "*lead prompt d_model"]) -> Float[Tensor, "*lead prompt"]:
        """The contribution of these stream vectors to the answer's logit."""
        return (x.to(self.wide) * self.vector.to(self.wide)).sum(-1)

    def spread(self, x: Float[Tensor, "*lead prompt d_model"]) -> Float[Tensor, "*lead prompt"]:
        """The standard deviation over the vocabulary of what they add to a token's logit; NaN for a single output."""
        linear = self.model.unembed.linear
        if self.model.cfg.d_vocab_out < 2:
            return torch.full_like(x[..., 0], float("nan"), dtype=self.wide)
        with torch.no_grad():
            read = self.final.frozen(x, self.final_scale)
            n = self.model.cfg.d_vocab_out
            some = torch.arange(0, n, -(-n // _TOKENS_COMPARED), device=x.device)
            if is_plain(linear):
                return (read @ linear.weight[some].T).to(self.wide).std(-1, correction=0)
            return torch.stack([without_bias(linear, row)[..., some].std(-1, correction=0) for row in read])

    def branch(self, module: Any, passage: Passage, x: Float[Tensor, "prompt d_in"]) -> tuple[Tensor, Tensor]:
        """What each number that enters a branch's last linear layer adds, and what the branch's constants add.

        Scales on the way to the stream are frozen too.
        """
        vector = _before(passage, self.cache.__getitem__, self.vector)
        read, constant = _read_by(module, x, lambda out: (out * vector).sum(-1).to(self.wide))
        return read.to(self.wide), constant + _bias_read(passage, self.vector).to(self.wide)


def direct_effects(
    model: HookedTransformer,
    tokens: Shaped[Tensor, "prompt pos *d_in"],
    right: Int[Tensor, "prompt"],
    wrong: Int[Tensor, "prompt"] | None,
    pos: int,
) -> list[Direct]:
    """Compute the parts of a LogitAttribution, for as many prompts at a time as fit in memory."""
    need_gradients("direct logit attribution")
    some = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
    effects = []
    for i in range(0, len(tokens), some):
        part = slice(i, i + some)
        effects.append(_direct(model, tokens[part], right[part], None if wrong is None else wrong[part], pos))
    return effects


def _direct(model, tokens: Tensor, right: Tensor, wrong: Tensor | None, pos: int) -> Direct:
    rows = torch.arange(len(tokens), device=tokens.device)

    def pick(logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, "prompt"]:
        return logits[rows, right] if wrong is None else logits[rows, right] - logits[rows, wrong]

    at = DirectEffects(model, tokens, pos, pick)
    stack, labels = at.cache.decompose_resid()
    heads, head_spread, attn_bias, sources = (torch.stack(part, 1) for part in _attention(model, at))
    neurons, mlp_bias = _mlps(model, at)
    pair = 1.0 if wrong is None else 2**0.5  # standard deviation of a difference of two tokens
    tensors = {
        "components": at.dot(stack).T,
        "spread": pair * at.spread(stack).T,
        "heads": heads,
        "head_spread": pair * head_spread,
        "attn_bias": attn_bias,
        "neurons": neurons,
        "mlp_bias": mlp_bias,
        "logit": at.logit,
        "unembed_bias": at.unembed_bias,
        "norm_bias": at.norm_bias,
    }
    error = _checked(model, labels, tensors, sources)
    return Direct(tensors, list(sources), labels, error)


def _run(model: HookedTransformer, tokens: Tensor, pos: int) -> tuple[ActivationCache, Vector]:
    """The values needed from a forward pass: of all keys, and of everything else at the query position."""
    kept: dict[str, Tensor] = {}

    def keep(act: Tensor, hook: Any) -> None:
        site = hook.name.rpartition("hook_")[2]
        if site == "pattern":
            act = act[:, :, pos]
        elif site != "v":
            act = act[:, pos]
        kept[hook.name] = act.clone()

    wanted = {"embed", "pos_embed", "attn_out", "mlp_out", "z", "v", "pattern", "post"}
    names = [name for name in model.hook_names() if name.rpartition("hook_")[2] in wanted]
    for block in model.blocks:
        names += [*block.writes_through("attn").scales, *block.writes_through("mlp").scales]
    with torch.no_grad():
        stream = model.run_with_hooks(tokens, fwd_hooks=[(names, keep)], stop_at_layer=model.cfg.n_layers)
    return ActivationCache(kept, model), stream[:, pos]


def _attention(model, at: DirectEffects) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Per layer: contributions of heads, their spread, contributions of biases, and of each head's source positions."""
    columns: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
    for layer, block in enumerate(model.blocks):
        name, attn = f"blocks.{layer}", block.attn
        z, v, pattern = (at.cache[f"{name}.attn.hook_{site}"] for site in ("z", "v", "pattern"))
        passage = block.writes_through("attn")
        read, constant = at.branch(attn.o, passage, z.flatten(1))
        read = read.view(z.shape)
        values = v.repeat_interleave(attn.n_heads // attn.n_kv_heads, 2).to(read)
        with torch.no_grad():
            result = passage.frozen(attn.results(z[:, None])[:, 0].transpose(0, 1), at.cache.__getitem__)
        by_source = torch.einsum("nhk,nkhd,nhd->nhk", pattern.to(read), values, read)
        for part, value in zip(columns, ((z * read).sum(-1), at.spread(result).T, constant, by_source), strict=True):
            part.append(value)
    return columns


def _mlps(model, at: DirectEffects) -> tuple[Float[Tensor, "prompt layer neuron"], Float[Tensor, "prompt layer"]]:
    """Contributions of neurons and of biases; no neurons in attention-only models."""
    n_prompts, n_layers = len(at.logit), model.cfg.n_layers
    if model.blocks[0].mlp is None:
        return at.logit.new_zeros(n_prompts, n_layers, 0), at.logit.new_zeros(n_prompts, n_layers)
    neurons, constants = [], []
    for layer, block in enumerate(model.blocks):
        post = at.cache[f"blocks.{layer}.mlp.hook_post"]
        read, constant = at.branch(block.mlp.out, block.writes_through("mlp"), post)
        neurons.append(post * read)
        constants.append(constant)
    return torch.stack(neurons, 1), torch.stack(constants, 1)


def _checked(model, labels: list[str], tensors: dict[str, Tensor], sources: Tensor) -> float:
    """The largest deviation of a sum. A deviation beyond rounding means that a hook made an edit the parts lack."""
    parts, heads, neurons = tensors["components"], tensors["heads"], tensors["neurons"]
    expected = tensors["logit"] - tensors["unembed_bias"] - tensors["norm_bias"]
    misses = [parts.sum(1) - expected, sources.sum(-1) - heads]
    branches = {"attn_out": heads.sum(-1) + tensors["attn_bias"], "mlp_out": neurons.sum(-1) + tensors["mlp_bias"]}
    for name, branch in branches.items():
        if columns := [i for i, label in enumerate(labels) if label.endswith(name)]:
            misses.append(branch - parts[:, columns])
    error = max(float(miss.abs().max()) for miss in misses)
    allowed = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if not error <= allowed * (1 + float(parts.abs().max())):
        raise InputError(
            f"the parts do not sum to their total; the difference is {error:.3g}. Is a hook editing z, result, "
            "attn_out, mlp_out or the stream? Values written by a hook have no known parts; leave that scope"
        )
    return error


def _read_by(module: Any, at: Float[Tensor, "prompt d_in"], pick: Pick) -> tuple[Tensor, Float[Tensor, "prompt"]]:
    """The gradient of the picked output of an affine module, and the picked output for input 0."""
    with torch.enable_grad():
        x = torch.zeros_like(at).requires_grad_()
        picked = pick(module(x))
        (gradient,) = torch.autograd.grad(picked.sum(), x)
    return gradient, picked.detach()


def _before(passage: Passage, scale_at: Callable[[str], Tensor], vector: Vector) -> Vector:
    """The vector that reads, before a passage of frozen scale, what this one reads behind it."""
    with torch.enable_grad():
        x = torch.zeros_like(vector).requires_grad_()
        (gradient,) = torch.autograd.grad((passage.frozen(x, scale_at) * vector).sum(), x)
    return gradient


def _bias_read(passage: Passage, vector: Vector) -> Float[Tensor, "prompt"]:
    return (passage.bias(vector).detach() * vector).sum(-1)

"""The plain loop: one hooked forward pass a patch. The reference that the engine is held to, and its fallback."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.errors import InputError
from hooklens.core.hooks import HookFn, edited_elsewhere
from hooklens.model.attention import Attention
from hooklens.model.block import BLOCKS, Block
from hooklens.model.mlp import MLP, GatedMLP
from hooklens.sweeps.plan import Patch, Plan

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.sweeps.measure import Reader


def plain_values(plan: Plan, patches: Sequence[Patch], reader: "Reader") -> Float[Tensor, "patch pair"]:
    """The metric of some patches, from one forward pass that has the pairs once for each, a hook for each."""
    n, model = len(plan.tokens), plan.model
    hooks = [writing(plan, patch, slice(i * n, (i + 1) * n)) for i, patch in enumerate(patches)]
    tokens = plan.tokens.repeat(len(patches), 1)
    if reader.read is None or reader.whole:
        return torch.stack([reader.on_logits(x) for x in model.run_with_hooks(tokens, fwd_hooks=hooks).split(n)])
    streams = model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=model.cfg.n_layers)
    return torch.stack([reader.on_stream(x) for x in streams.split(n)])


def writing(plan: Plan, patch: Patch, rows: slice = slice(None)) -> tuple[str, HookFn]:
    """The patch as a hook, in those rows of the batch."""
    region, value = plan.region(patch), plan.values[patch.layer]

    def write(act: Tensor, hook: Any) -> Tensor:
        act[(rows, *region)] = value[(slice(None), *region)]
        return act

    return plan.point(patch.layer), write


def why_plain(model: "HookedTransformer", *, steps: bool = False) -> str | None:
    """Why the engine must not be used now: hooks of others would be skipped, or every pass draws new dropout masks.

    `steps`: it runs attention and the MLP of a block by themselves.
    """
    if edited_elsewhere(model.hook_points().values()):
        return "other hooks are active on this model"
    if drops_out(model):
        return "dropout is on (model.eval() turns it off)"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "torch hooks are on this model's modules"
    if not all(_is_ours(block) for block in model.blocks):
        return "a block of this model, or its attention or MLP, is of another class"
    if steps and not all(block.in_steps for block in model.blocks):
        return "blocks of this kind have a forward pass of their own"
    return None


def drops_out(model: nn.Module) -> bool:
    """Does every forward pass draw new masks, so that no two agree?"""
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in model.modules())


def _is_ours(block: nn.Module) -> bool:
    """Are the block and its parts those whose seams the engine knows? (Linear layers inside them may be anything.)"""
    if type(block) not in BLOCKS.values() or not isinstance(block, Block):
        return False
    return type(block.attn) is Attention and type(block.mlp) in (MLP, GatedMLP, type(None))


def first_nonfinite(model: "HookedTransformer", tokens: Tensor, *edits: tuple[str, HookFn]) -> str | None:
    """The first hook point that holds NaN or an infinity, None if all are finite; -inf forbids a key or a token.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(); model.W_in[1] = float("nan")
    >>> first_nonfinite(model, torch.tensor([[1, 2]]))
    'blocks.1.mlp.hook_pre'
    """
    found: list[str] = []

    def look(act: Tensor, hook: Any) -> None:
        forbids = hook.name.endswith("hook_attn_scores") or hook.name == "unembed.hook_out"
        bad = act.isnan() | act.isposinf() if forbids else ~act.isfinite()
        if not found and bool(bad.any()):
            found.append(hook.name)

    with torch.no_grad():
        looking = (lambda name: not name.endswith(("_input", "attn_in", "result")), look)
        model.run_with_hooks(tokens, fwd_hooks=[*edits, looking])
    return found[0] if found else None


def not_finite(*values: Float[Tensor, "..."]) -> str | None:
    """What is wrong with numbers that should all be finite: "NaN" or "infinite"; None if nothing is.

    >>> not_finite(torch.tensor([1.0, float("inf")]))
    'infinite'
    """
    if all(bool(value.isfinite().all()) for value in values):
        return None
    return "NaN" if any(bool(value.isnan().any()) for value in values) else "infinite"


def refuse_nonfinite(plan: Plan, values: Float[Tensor, "patch pair"], base: Float[Tensor, "pair"]) -> None:
    """A metric that comes out NaN or infinite is an error that names where it began."""
    said = not_finite(values, base)
    if said is None:
        return
    point = first_nonfinite(plan.model, plan.tokens)
    if point is not None:
        raise InputError(
            f"the metric is {said}: the model's own activations are not finite from {point} on; hooklens check shows "
            "more"
        )
    for layer, value in plan.values.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"the metric is {said}: the values to write at {plan.point(layer)} are not finite")
    bad = ~values.isfinite().all(1)
    n, first = int(bad.sum()), int(bad.long().argmax())
    point = first_nonfinite(plan.model, plan.tokens, writing(plan, plan.patches[first])) if n else None
    if point is not None:
        raise InputError(
            f"the metric is {said} for {n} of {len(values)} patches, the first of them {plan.patches[first]}: with it "
            f"written, activations are not finite from {point} on"
        )
    raise InputError(
        f"the metric is {said} for {n} of {len(values)} patches, though every activation is finite: look at the "
        "metric, and whether the model forbids a token that it reads (a logit of -inf)"
    )

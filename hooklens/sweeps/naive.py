"""When a sweep must run as plain hooked forward passes, and where numbers stop being finite."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.hooks import HookFn, edited_elsewhere
from hooklens.model.attention import Attention
from hooklens.model.block import BLOCKS, Block
from hooklens.model.mlp import MLP, GatedMLP
from hooklens.model.transformer import HookedTransformer


def why_plain(model: HookedTransformer, *, steps: bool = False) -> str | None:
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


def first_nonfinite(model: HookedTransformer, tokens: Tensor, *edits: tuple[str, HookFn]) -> str | None:
    """The first hook point that holds NaN or an infinity, None if all are finite; -inf forbids a key or a token.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(); model.W_in[1] = float("nan")
    >>> first_nonfinite(model, torch.tensor([[1, 2]]))
    'blocks.1.mlp.hook_pre'
    """
    points: list[str] = []

    def look(act: Tensor, hook: Any) -> None:
        forbids = hook.name.endswith("hook_attn_scores") or hook.name == "unembed.hook_out"
        bad = act.isnan() | act.isposinf() if forbids else ~act.isfinite()
        if not points and bool(bad.any()):
            points.append(hook.name)

    with torch.no_grad():
        looking = (lambda name: not name.endswith(("_input", "attn_in", "result")), look)
        model.run_with_hooks(tokens, fwd_hooks=[*edits, looking])
    return points[0] if points else None


def not_finite(*values: Float[Tensor, "..."]) -> str | None:
    """What is wrong with numbers that should all be finite: "NaN" or "infinite"; None if nothing is.

    >>> not_finite(torch.tensor([1.0, float("inf")]))
    'infinite'
    """
    if all(bool(value.isfinite().all()) for value in values):
        return None
    return "NaN" if any(bool(value.isnan().any()) for value in values) else "infinite"

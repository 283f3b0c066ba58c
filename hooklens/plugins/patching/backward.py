"""Backward passes through a metric: whether they can be made, how many prompts fit in one, and their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.gradients import need_gradients
from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import drops_out
from hooklens.sweeps.settings import current


def need_backward(model: HookedTransformer, asker: str) -> None:
    """Raise where gradients are off, or where every pass would draw other dropout masks."""
    need_gradients(asker)
    if drops_out(model):
        raise InputError(
            f"{asker} compares passes, and dropout draws other masks in each; turn it off with model.eval()"
        )


def backward_rows(model: HookedTransformer, n_pos: int, width: int = 0) -> int:
    """How many prompts of that length a backward pass through the model takes in the engine's memory, about.

    `width` is how much of each position and layer is kept beside what the backward pass itself keeps.
    """
    cfg = model.cfg
    kept = 16 * cfg.d_model + 4 * (cfg.d_mlp or 0) + 3 * width
    return current().memory // (cfg.n_layers * n_pos * kept * model.W_E.element_size())


def gradients_of(
    model: HookedTransformer, metric: Any, stream: Float[Tensor, "prompt pos d_model"], at: Sequence[Tensor]
) -> tuple[Float[Tensor, "prompt"], Sequence[Tensor]]:
    """The metric of every prompt, from the stream that leaves the last block, and its gradients at these tensors."""
    reader = Reader(model, metric, stream.detach())
    total = reader.in_graph(stream).sum()
    if not total.requires_grad:
        raise InputError(
            "the metric has no gradient (does it compare, round or take an argmax?); use hl.patch or hl.ablate"
        )
    return reader.base, torch.autograd.grad(total, at, materialize_grads=True)

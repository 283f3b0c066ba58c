"""A transformer whose weights are set by hand to add modulo p with chosen frequencies."""

import math

import torch

from hooklens.model.config import Biases, HookedTransformerConfig
from hooklens.model.transformer import HookedTransformer

PHASES = 16  # neurons a frequency
SCALE = 30.0


def adding_model(p, frequencies, *, dtype=torch.float64):
    """Uniform attention adds the waves of a and b. Neurons of 16 phases x are relu(cos(w a + x) + cos(w b + x)), and
    write cos(w c + 2 x) to the answers. Their sum has the sign and wave of cos(w (a + b - c)), but for small aliases.
    """
    n = 2 * len(frequencies)
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=2 * n,
        n_ctx=3,
        n_heads=1,
        d_head=n,
        d_mlp=PHASES * len(frequencies),
        d_vocab=p + 1,
        act_fn="relu",
        normalization_type=None,
        biases=Biases(qkv=False, o=False, mlp=False),
    )
    model = HookedTransformer(cfg, dtype=dtype)
    block, numbers = model.blocks[0], torch.arange(p, dtype=dtype)
    phases = 2 * math.pi / PHASES * torch.arange(PHASES, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        block.attn.W_V[0, :n] = torch.eye(n, dtype=dtype)
        block.attn.W_O[0, :, :n] = 3 * torch.eye(n, dtype=dtype)
        for i, k in enumerate(frequencies):
            at, own = slice(2 * i, 2 * i + 2), slice(PHASES * i, PHASES * (i + 1))
            angles = 2 * math.pi * k / p * numbers
            model.W_E[:p, at] = torch.stack([angles.cos(), angles.sin()], 1)
            block.mlp.W_in[at, own] = torch.stack([phases.cos(), -phases.sin()])
            block.mlp.W_out[own, n + 2 * i : n + 2 * i + 2] = (
                SCALE / PHASES * torch.stack([(2 * phases).cos(), -(2 * phases).sin()], 1)
            )
            model.W_U[n + 2 * i : n + 2 * i + 2, :p] = torch.stack([angles.cos(), angles.sin()])
    return model


def written_out(p, frequencies):
    """The same logits from the formula, without a model."""
    n = torch.arange(p).double()
    logits = torch.zeros(p, p, p, dtype=torch.float64)
    for k in frequencies:
        w = 2 * math.pi * k / p
        for i in range(PHASES):
            x = 2 * math.pi * i / PHASES
            neuron = ((w * n[:, None] + x).cos() + (w * n + x).cos()).relu()
            logits += SCALE / PHASES * neuron[:, :, None] * (w * n + 2 * x).cos()
    return logits

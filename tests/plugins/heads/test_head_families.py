"""Every method of heads/ on parts that are unlike each other."""

from importlib import import_module

import pytest
import torch
from torch import nn

from hooklens.model.config import Softmax
from hooklens.testing import tiny_model

FAMILIES = {
    "sandwich, soft caps": {"block": "sandwich", "score_fn": Softmax(soft_cap=5.0), "output_logits_soft_cap": 9.0},
    "query and key norms": {
        "qk_norm": "RMS",
        "n_heads": 4,
        "n_key_value_heads": 2,
        "positional_embedding_type": "rotary",
    },
    "parallel, sliding window": {"block": "parallel", "mask": {"part": "sliding_window", "window": 5}},
    "linear attention, no norm": {"score_fn": "linear", "normalization_type": None},
    "other output vocabulary": {"d_vocab_out": 9},
}
METHODS = ("taxonomy", "copying", "copy_suppression", "induction", "mediation", "redundancy", "composition")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_and_its_numbers_are_finite(family):
    model = tiny_model(**FAMILIES[family])
    for method in METHODS:
        result = import_module(f"hooklens.plugins.heads.{method}").demo(model)
        assert len(result.table(3)) <= 3
        for value in vars(result).values():
            if isinstance(value, torch.Tensor) and method not in ("taxonomy", "induction", "composition"):
                assert bool(value.isfinite().all())


class Adapter(nn.Module):
    """A linear layer inside another module, as LoRA wraps it."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear

    def forward(self, x):
        return self.base(x) * 1.5


def test_wrapped_layers_are_called_where_their_weights_would_lie():
    plain, wrapped = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    for block, other in zip(plain.blocks, wrapped.blocks, strict=True):
        with torch.no_grad():
            block.attn.v.weight *= 1.5
            block.attn.o.weight *= 1.5
        other.attn.v, other.attn.o = Adapter(other.attn.v), Adapter(other.attn.o)
    for name in ("copying", "copy_suppression", "mediation", "redundancy"):
        method = import_module(f"hooklens.plugins.heads.{name}")
        first, second = method.demo(plain), method.demo(wrapped)
        for name, value in vars(first).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, vars(second)[name], atol=1e-9, rtol=1e-6)

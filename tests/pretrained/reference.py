"""transformers in float64 throughout, as the reference for a model in float64.

Its norms, softmax and rotary tables cast to float32 whatever the model's dtype is. This mode turns each of those casts
into one to float64, so that the two implementations can be compared to rounding.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InFloat64(TorchFunctionMode):
    """Inside this `with` block a cast to float32, and float32 asked for by name, mean float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: _widened(value) for key, value in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_widened, args), **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def reference_logits(model: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """transformers' logits; of a float64 model, computed in float64 from its tables to its softmax."""
    with torch.no_grad():
        if next(model.parameters()).dtype != torch.float64:
            return model(tokens, **inputs).logits
        with InFloat64():
            _rebuild_tables(model)
            return model(tokens, **inputs).logits


def _rebuild_tables(model: Any) -> None:
    """Rotary frequencies are made in float32 when a model is built; make them again, inside the mode."""
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            fresh = type(module)(module.config)
            module._buffers.update(fresh._buffers)
            module.__dict__.update({k: v for k, v in fresh.__dict__.items() if k.endswith("inv_freq")})

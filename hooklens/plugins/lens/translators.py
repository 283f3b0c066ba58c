"""The tuned lens as a module: an affine map for every stream except the last, and its file format."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.envelope import Schema, read_envelope, write_envelope
from hooklens.core.errors import InputError
from hooklens.core.files import reading
from hooklens.model.transformer import HookedTransformer

LENS_SCHEMA = Schema("hooklens.tuned_lens", 1, "a tuned lens", "TunedLens.save")


class TunedLens(nn.Module):
    """Maps the stream before a block to the stream that the final norm reads: x + x weight + bias, one map per layer.

    With all zeros it equals the logit lens.

    >>> lens = TunedLens(n_layers=2, d_model=8)
    >>> x = torch.ones(3, 8)
    >>> torch.equal(lens(0, x), x), sum(p.numel() for p in lens.parameters())
    (True, 144)

    Reference: Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", equation 6.
    """

    def __init__(
        self, n_layers: int, d_model: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_layers, d_model, d_model, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(n_layers, d_model, device=device, dtype=dtype))

    def forward(self, layer: int, stream: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_model"]:
        """The vector that the final norm reads in place of the stream that enters this layer."""
        wide = stream.to(self.weight.dtype)
        return (wide + wide @ self.weight[layer] + self.bias[layer]).to(stream.dtype)

    def check_fits(self, model: HookedTransformer) -> None:
        """Raise unless there is a map of the right size for every block of the model."""
        n_layers, d_model = self.weight.shape[:2]
        if (n_layers, d_model) != (model.cfg.n_layers, model.cfg.d_model):
            raise InputError(
                f"this tuned lens has {n_layers} layers of d_model {d_model}, but the model has "
                f"{model.cfg.n_layers} layers of d_model {model.cfg.d_model}: train a lens for it with train_tuned_lens"
            )

    def save(self, path: str | Path) -> None:
        """Write the maps as one safetensors file, whole or not at all; `TunedLens.load` reads it back."""
        write_envelope(path, LENS_SCHEMA, None, {"weight": self.weight, "bias": self.bias})

    @classmethod
    def load(cls, path: str | Path) -> "TunedLens":
        """The lens in a file that `save` or a training, finished or interrupted, has written."""
        tensors = dict(read_envelope(path, LENS_SCHEMA).tensors())
        with reading(path, LENS_SCHEMA.what):
            weight, bias = tensors["weight"], tensors["bias"]
            n_layers, d_model, d_out = weight.shape
            if d_out != d_model or bias.shape != (n_layers, d_model) or not weight.is_floating_point():
                raise ValueError(f"weight {weight.dtype} {list(weight.shape)} with bias {list(bias.shape)}")
            return cls.of(weight, bias)

    @classmethod
    def of(cls, weight: Float[Tensor, "layer d_model d_model"], bias: Float[Tensor, "layer d_model"]) -> "TunedLens":
        """Make a lens from these maps."""
        lens = cls(*weight.shape[:2], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            lens.weight.copy_(weight)
            lens.bias.copy_(bias)
        return lens

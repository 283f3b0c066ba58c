"""All trained parameters as one vector: optimisers, norms, clipping and checkpoints work on it in a few calls."""

import re
from collections.abc import Collection, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.allocator import long_zeros
from hooklens.core.errors import InputError

_ALIGNMENT = 64  # bytes: matrix kernels may add in another order on memory aligned otherwise
_BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+|[^.]+")

Vector = Float[Tensor, "parameter"]


class ParameterVector:
    """The parameters that require gradients, as views of one vector, layer after layer.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> vector = ParameterVector(model)
    >>> list(vector.layers)
    ['embed', 'pos_embed', 'blocks.0', 'blocks.1', 'ln_final', 'unembed']
    >>> _ = vector.values.zero_()
    >>> float(model.blocks[0].attn.q.weight.detach().abs().sum())
    0.0

    A parameter that several modules share counts once. Each parameter begins at a multiple of 64 bytes, so that a
    resumed process computes in the same order as the one that was interrupted; the gaps hold zeros.
    """

    def __init__(self, module: nn.Module):
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        check_trained(self.parameters)
        first = next(iter(self.parameters.values()))
        self.slices: dict[str, slice] = {}
        self.layers: dict[str, slice] = {}
        stop = 0
        for name, parameter in self.parameters.items():
            start = -(-stop * first.itemsize // _ALIGNMENT) * _ALIGNMENT // first.itemsize
            stop = start + parameter.numel()
            self.slices[name] = slice(start, stop)
            layer = layer_of(name)
            self.layers[layer] = slice(self.layers[layer].start if layer in self.layers else start, stop)
        self.values = long_zeros(stop, dtype=first.dtype, device=first.device)
        for name, view in self.views(self.values).items():
            view.copy_(self.parameters[name].detach())
            self.parameters[name].data = view
        places = ((name, name.rpartition(".")) for name in self.parameters)
        self._places = {
            name: (module.get_submodule(owner), key, self.parameters[name], self.parameters[name].data_ptr())
            for name, (owner, _, key) in places
        }

    def replaced(self) -> str | None:
        """The name of a parameter that is no longer a view of the vector, or no longer trained; None if all are."""
        for name, (owner, key, parameter, address) in self._places.items():
            now = owner._parameters.get(key)
            if now is not parameter or not parameter.requires_grad or parameter.data_ptr() != address:
                return name
        return None

    def zeros(self) -> Vector:
        """Another vector of this layout, such as a gradient."""
        return long_zeros(len(self.values), dtype=self.values.dtype, device=self.values.device)

    def views(self, vector: Vector) -> dict[str, Tensor]:
        """The part of each parameter in a vector of this layout, in the parameter's shape."""
        return {name: vector[where].view(self.parameters[name].shape) for name, where in self.slices.items()}

    def by_layer(self, vector: Vector) -> list[Tensor]:
        """The part of each layer in a vector of this layout."""
        return [vector[where] for where in self.layers.values()]

    def gather_gradients(self, out: Vector, written: Collection[int] = ()) -> None:
        """Copy the gradients into a vector and release them; a parameter without one counts as zero.

        What the vector holds of parameters whose id is in `written` stays, and their gradients are added to it.
        """
        views = self.views(out)
        for name, parameter in self.parameters.items():
            if parameter.grad is None and id(parameter) not in written:
                views[name].zero_()
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        copied = [name for name in gradients if id(self.parameters[name]) not in written]
        if copied:
            torch._foreach_copy_([views[name] for name in copied], [gradients[name] for name in copied])
        for name in gradients.keys() - copied:
            views[name].add_(gradients[name])
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Release the gradients of all parameters, also those that an interrupted pass or the caller left."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def norms(self, vector: Vector) -> Float[Tensor, "layer"]:
        """The Euclidean norm of each layer's part."""
        return torch.stack(torch._foreach_norm(self.by_layer(vector)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its block, else the first word of its name.

    >>> layer_of("blocks.3.attn.q.weight"), layer_of("unembed.linear.weight")
    ('blocks.3', 'unembed')
    """
    match = _BLOCK.match(name)
    return name if match is None else match.group()


def check_trained(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless these parameters can be one vector."""
    if not parameters:
        raise InputError(
            "there is nothing to train: no parameter of the model requires a gradient; call model.requires_grad_()"
        )
    kinds = {(str(p.dtype), str(p.device)) for p in parameters.values()}
    if len(kinds) > 1:
        seen = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds))
        raise InputError(f"all trained parameters have one dtype and one device, got {seen}; move the model with .to()")

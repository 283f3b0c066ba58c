"""The MLP of a block: post = act(pre), or act(gate) times a linear branch."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hooklens.core.errors import did_you_mean
from hooklens.core.hooks import HookedPart, HookPoint
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.linear import Linear, matrix_of

Stream = Float[Tensor, "batch pos d_model"]
Neurons = Float[Tensor, "batch pos d_mlp"]

#: Activation functions by name; `gelu` is exact, `gelu_new` its tanh approximation.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function with this name.

    >>> activation("relu")(torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    if name not in ACTIVATIONS:
        raise did_you_mean("activation function", name, ACTIVATIONS)
    return ACTIVATIONS[name]


class MLP(HookedPart):
    """in_, activation, out."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__()
        self.act, self.d_mlp = cfg.act_fn, cfg.d_mlp
        activation(cfg.act_fn)
        self.in_ = Linear(cfg.d_model, cfg.d_mlp, bias=cfg.biases.mlp)
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()
        self.out = Linear(cfg.d_mlp, cfg.d_model, bias=cfg.biases.mlp)

    def forward(self, x: Stream) -> Stream:
        return self.out(self.neurons(x))

    def neurons(self, x: Stream) -> Neurons:
        pre = self.hook_pre(self.in_(x))
        return self.hook_post(activation(self.act)(pre))

    def output_matrix(self) -> Float[Tensor, "d_mlp d_model"]:
        """W_out, even if `out` is wrapped."""
        return matrix_of(self.out, self.d_mlp).T

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.in_.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.out.weight.T

    @property
    def b_in(self) -> Float[Tensor, "d_mlp"] | None:
        return self.in_.bias

    @property
    def b_out(self) -> Float[Tensor, "d_model"] | None:
        return self.out.bias


class GatedMLP(MLP):
    """act(gate) times in_, then out (Shazeer 2020, equation 6). `hook_pre` is the gate's pre-activation."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__(cfg)
        biased = cfg.biases.mlp if cfg.biases.gate is None else cfg.biases.gate
        self.gate = Linear(cfg.d_model, cfg.d_mlp, bias=biased)
        self.hook_pre_linear = HookPoint()
        self._modules["hook_post"] = self._modules.pop("hook_post")  # points are listed in firing order

    def neurons(self, x: Stream) -> Neurons:
        pre = self.hook_pre(self.gate(x))
        linear = self.hook_pre_linear(self.in_(x))
        return self.hook_post(activation(self.act)(pre) * linear)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.gate.weight.T

"""Add a direction to activations or ablate it, in a forward pass and in every step of a generation."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.core.hooks import HookCall, HookFn
from hooklens.core.names import AXES, Where, parse
from hooklens.plugins.steering.positions import Positions, checked, touched

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Direction = Float[Tensor, "*point"]
_STREAM = ("resid_pre", "resid_mid", "resid_post")
_OF_HEADS = ("q", "k", "v", "z", "result")


class StreamEdit(AbstractContextManager["StreamEdit"]):
    """Hooks that edit activations: a reusable `with` block, or `.hooks` for `run_with_hooks`."""

    def __init__(self, model: "HookedTransformer", hooks: list[tuple[Where, HookFn]], what: str):
        self.model, self.hooks, self.what = model, hooks, what
        self._open: list[Any] = []

    def __enter__(self) -> "StreamEdit":
        scope = self.model.hooks(self.hooks)
        scope.__enter__()
        self._open.append(scope)  # if interrupted before this line, the scope has no references and ends
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.pop().__exit__(*exc)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": []}  # a copy is not entered

    def __repr__(self) -> str:
        return f"StreamEdit({self.what})"


def steer(
    model: "HookedTransformer",
    direction: Direction,
    coefficient: float | int | Tensor = 1.0,
    *,
    site: Where,
    positions: Positions = "all",
) -> StreamEdit:
    """Add `coefficient` times a direction at a site, in every forward pass and generation of a `with` block.

    >>> from hooklens.testing import tiny_model
    >>> model, direction = tiny_model(), torch.ones(8)
    >>> with steer(model, direction, 3.0, site=("resid_post", 0), positions="generated"):
    ...     out = model.generate([1, 2, 3], 4)
    >>> logits = model.run_with_hooks([[1, 2]], fwd_hooks=steer(model, direction, 3.0, site=("resid_pre", 1)).hooks)

    `direction` is one vector for all points, or `[layer width]` with one per layer; at heads (q, k, v, z) `[head
    d_head]` or `[layer head d_head]`, with zeros for heads that stay unchanged. `coefficient` is a number, or one per
    row of the batch; at 0 no hook is attached. `positions` is "all", "prompt", "generated", numbers or a slice.
    Negative numbers count from the end of the prompt, so slice(-1, None) is every position that predicts a new token.

    Reference: Turner et al. (2023), "Activation Addition"; Rimsky et al. (2023), "Steering Llama 2 via Contrastive
    Activation Addition", section 3.
    """
    positions = checked(positions)
    points = _points(model, site, direction, "steer")
    amount = torch.as_tensor(coefficient)
    if amount.ndim > 1:
        raise InputError(f"coefficient must be a number, or one per batch row, got a tensor {list(amount.shape)}")
    if not bool(amount.isfinite().all()) or not bool(direction.isfinite().all()):
        raise InputError("coefficient and direction must be finite; some of the given numbers are not")
    what = f"{points[0]}{' and others' * (len(points) > 1)}, positions {positions!r}"
    if amount.ndim == 0 and float(amount) == 0:
        return StreamEdit(model, [], f"nothing: coefficient 0 at {what}")
    hooks: list[tuple[Where, HookFn]] = []
    for name in points:
        vector = of_point(direction, name, point_shape(model, name, "steer"))
        hooks.append((name, Adding(vector[None], amount, positions)))
    return StreamEdit(model, hooks, f"adds at {what}")


@dataclass(frozen=True, eq=False)
class Adding:
    """A hook that adds amount * vector at the positions: one vector to all rows of the batch, or to each its own."""

    vector: Float[Tensor, "row *point"]
    amount: Tensor
    positions: Positions

    def __call__(self, act: Tensor, hook: HookCall) -> Tensor | None:
        where = touched(self.positions, hook, act.shape[1])
        if where is False:
            return None
        scale = self.amount.to(act)
        scale = scale.view(-1, *[1] * (self.vector.ndim - 1)) if scale.ndim else scale
        moved = act + _by_row(scale * self.vector.to(act), act)
        return moved if where is True else torch.where(_mask(where, act), moved, act)


def project_out(
    x: Float[Tensor, "*lead width"], direction: Float[Tensor, "*#lead width"]
) -> Float[Tensor, "*lead width"]:
    """x without its component along a direction: x - u (u . x) with u of length 1; x itself if the direction is 0.

    >>> project_out(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).tolist()
    [3.0, 0.0]

    Reference: Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction", equation 4.
    """
    size = direction.norm(dim=-1, keepdim=True)
    unit = (direction / torch.where(size > 0, size, 1.0)).to(x)
    return x - (x * unit).sum(-1, keepdim=True) * unit


def ablate_direction(
    model: "HookedTransformer", direction: Direction, *, sites: Where | None = None, positions: Positions = "all"
) -> StreamEdit:
    """Remove a direction from the residual stream at every point, so that no component can read it.

    >>> from hooklens.testing import tiny_model
    >>> model, direction = tiny_model(), torch.ones(8)
    >>> with ablate_direction(model, direction):
    ...     _, cache = model.run_with_cache([[1, 2, 3]], names="resid_post")
    >>> bool((cache["resid_post", 1] @ direction).abs().max() < 1e-5)
    True

    `sites=None` means every point of the residual stream at every layer: equivalent to weights that cannot write the
    direction. After chosen sites, later components can write it again. `direction` may be `[layer width]`; at heads
    each head loses its own direction of `[head d_head]`, and a head whose direction is 0 is unchanged.

    Reference: Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction", section 2.4.
    """
    positions = checked(positions)
    points = _points(model, stream_sites(model) if sites is None else sites, direction, "ablate")
    hooks: list[tuple[Where, HookFn]] = []
    for name in points:
        vector = of_point(direction, name, point_shape(model, name, "ablate"))
        if not bool(vector.isfinite().all()) or not bool(vector.any()):
            raise InputError("a direction to ablate is finite and not 0; the one given points nowhere")
        hooks.append((name, Removing(vector[None], positions)))
    return StreamEdit(model, hooks, f"ablates a direction at {len(points)} points, positions {positions!r}")


@dataclass(frozen=True, eq=False)
class Removing:
    """A hook that projects a vector out at the positions: one out of all rows of the batch, or out of each its own."""

    vector: Float[Tensor, "row *point"]
    positions: Positions

    def __call__(self, act: Tensor, hook: HookCall) -> Tensor | None:
        where = touched(self.positions, hook, act.shape[1])
        if where is False:
            return None
        left = project_out(act, _by_row(self.vector, act))
        return left if where is True else torch.where(_mask(where, act), left, act)


def stream_sites(model: "HookedTransformer") -> list[str]:
    """Every point at which the residual stream itself stands."""
    model.blocks[0].need_sum("ablating a direction everywhere", "the direction would come back; name sites=...")
    found = [(name, parse(name)) for name in model.hook_names()]
    return [name for name, site in found if site is not None and site.name in _STREAM]


def _points(model: "HookedTransformer", where: Where, direction: Direction, verb: str) -> list[str]:
    """The full names of the points, with the direction's shape checked against each point."""
    if not isinstance(direction, Tensor) or not direction.is_floating_point():
        raise WrongType(f"a direction must be a float tensor such as [width], got {type(direction).__name__}")
    names = [point.name for point in model.resolve(where)]
    for name in names:
        here = point_shape(model, name, verb)
        if tuple(direction.shape) not in (here, (model.cfg.n_layers, *here)):
            raise InputError(
                f"{name} has the shape {list(here)} at each position, so the direction must have this shape, or "
                f"{[model.cfg.n_layers, *here]} with one per layer; got {list(direction.shape)}"
            )
    return names


def point_shape(model: "HookedTransformer", name: str, verb: str) -> tuple[int, ...]:
    """The shape at each position of a point: a vector, or one per head.

    >>> from hooklens.testing import tiny_model
    >>> [point_shape(tiny_model(), f"blocks.0.{point}", "steer") for point in ("hook_resid_post", "attn.hook_z")]
    [(8,), (2, 4)]
    """
    cfg, found = model.cfg, parse(name)
    inside = AXES.get(found.name if found else "", ())
    sizes = {"d_model": cfg.d_model, "d_mlp": cfg.d_mlp, "d_vocab": cfg.d_vocab_out, "d_head": cfg.d_head}
    sizes |= {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads}
    in_module = found is not None and found.name not in _OF_HEADS and "attn" in (found.part or "")
    if inside[:2] != ("batch", "pos") or not set(inside[2:]) <= set(sizes) or in_module:
        raise InputError(
            f"{verb} needs a point with one vector per position, such as resid_post, attn_out, mlp_out or post, "
            f"or one per head: q, k, v, z; {name} has {' '.join(inside) or 'something else'}"
        )
    return tuple(sizes[axis] for axis in inside[2:])


def of_point(direction: Direction, name: str, shape: tuple[int, ...]) -> Float[Tensor, "*here"]:
    """The direction at one point: itself, or that of the point's layer if there is one per layer."""
    if direction.ndim == len(shape):
        return direction
    found = parse(name)
    if found is None or found.layer is None:
        raise InputError(f"{name} belongs to no layer, but the direction has one vector per layer; give one vector")
    return direction[found.layer]


def _by_row(vector: Float[Tensor, "row *point"], act: Float[Tensor, "batch pos *point"]) -> Tensor:
    """Reshape the vector to broadcast with the activation."""
    if len(vector) not in (1, len(act)):
        raise InputError(f"the edit has {len(vector)} rows, but the batch has {len(act)}")
    return vector[:, None]


def _mask(where: Bool[Tensor, "batch_or_one pos"], act: Float[Tensor, "batch pos *point"]) -> Tensor:
    return where.to(act.device).view(*where.shape, *[1] * (act.ndim - 2))

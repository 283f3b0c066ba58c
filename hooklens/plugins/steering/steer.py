"""Edits along a direction: add it, or take it out, in a forward pass and in every step of a generation."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.core.hooks import HookCall, HookFn
from hooklens.core.names import AXES, Where, parse
from hooklens.plugins.steering.positions import Positions, checked, touched

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Direction = Float[Tensor, "*layer_or_row width"]
_STREAM = ("resid_pre", "resid_mid", "resid_post")


class StreamEdit(AbstractContextManager["StreamEdit"]):
    """Hooks that edit activations: a `with` block, which may be entered again, or `.hooks` for `run_with_hooks`."""

    def __init__(self, model: "HookedTransformer", hooks: list[tuple[Where, HookFn]], what: str):
        self.model, self.hooks, self.what = model, hooks, what
        self._open: list[Any] = []

    def __enter__(self) -> "StreamEdit":
        scope = self.model.hooks(self.hooks)
        scope.__enter__()
        self._open.append(scope)
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.pop().__exit__(*exc)

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

    `direction` is one vector for all points, or `[layer width]` with one a layer; `coefficient` a number, or one a row
    of the batch; at 0 no hook is attached. `positions` is "all", "prompt", "generated", numbers or a slice: negative
    ones count from the end of the prompt, so that slice(-1, None) is every position from which a new token is read.

    Reference: Turner et al. (2023), "Activation Addition"; Rimsky et al. (2023), "Steering Llama 2 via Contrastive
    Activation Addition", section 3.
    """
    positions = checked(positions)
    points = _points(model, site, direction, "steer")
    amount = torch.as_tensor(coefficient)
    if amount.ndim > 1:
        raise InputError(f"coefficient is a number, or one a row of the batch, got a tensor {list(amount.shape)}")
    if not bool(amount.isfinite().all()) or not bool(direction.isfinite().all()):
        raise InputError("a coefficient and a direction are finite numbers; some of those given are not")
    what = f"{points[0]}{' and others' * (len(points) > 1)}, positions {positions!r}"
    if amount.ndim == 0 and float(amount) == 0:
        return StreamEdit(model, [], f"nothing: coefficient 0 at {what}")
    hooks: list[tuple[Where, HookFn]] = [
        (name, adding(_of_point(direction, name), amount, positions)) for name in points
    ]
    return StreamEdit(model, hooks, f"adds at {what}")


def adding(vector: Float[Tensor, "*row width"], amount: Float[Tensor, "*row"] | Tensor, positions: Positions) -> HookFn:
    """A hook that adds amount * vector at the positions; with a row axis, to each row of the batch its own."""

    def add(act: Tensor, hook: HookCall) -> Tensor | None:
        where = touched(positions, hook, act.shape[1])
        if where is False:
            return None
        scale = amount.to(act)
        added = scale.view(-1, 1) * vector.to(act) if scale.ndim else scale * vector.to(act)
        moved = act + _by_row(added, act)
        return moved if where is True else torch.where(_mask(where, act), moved, act)

    return add


def project_out(
    x: Float[Tensor, "*lead width"], direction: Float[Tensor, "*#lead width"]
) -> Float[Tensor, "*lead width"]:
    """x without its component along a direction: x - u (u . x), u the direction at length 1.

    >>> project_out(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).tolist()
    [3.0, 0.0]

    Reference: Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction", equation 4.
    """
    unit = direction / direction.norm(dim=-1, keepdim=True)
    unit = unit.to(x)
    return x - (x * unit).sum(-1, keepdim=True) * unit


def ablate_direction(
    model: "HookedTransformer", direction: Direction, *, sites: Where | None = None, positions: Positions = "all"
) -> StreamEdit:
    """Take a direction out of the stream wherever it stands, so that no component can read it.

    >>> from hooklens.testing import tiny_model
    >>> model, direction = tiny_model(), torch.ones(8)
    >>> with ablate_direction(model, direction):
    ...     _, cache = model.run_with_cache([[1, 2, 3]], names="resid_post")
    >>> bool((cache["resid_post", 1] @ direction).abs().max() < 1e-5)
    True

    `sites=None` is every point of the residual stream at every layer: the same as weights that cannot write the
    direction. Chosen sites leave it to be written again after them. `direction` may be `[layer width]`.

    Reference: Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction", section 2.4.
    """
    positions = checked(positions)
    points = _points(model, stream_sites(model) if sites is None else sites, direction, "ablate")
    if not bool(direction.isfinite().all()) or not bool((direction.norm(dim=-1) > 0).all()):
        raise InputError("a direction to ablate is finite and not 0; the one given points nowhere")
    hooks: list[tuple[Where, HookFn]] = [(name, removing(_of_point(direction, name), positions)) for name in points]
    return StreamEdit(model, hooks, f"ablates a direction at {len(points)} points, positions {positions!r}")


def removing(vector: Float[Tensor, "*row width"], positions: Positions) -> HookFn:
    """A hook that projects a vector out at the positions; with a row axis, out of each row of the batch its own."""

    def remove(act: Tensor, hook: HookCall) -> Tensor | None:
        where = touched(positions, hook, act.shape[1])
        if where is False:
            return None
        left = project_out(act, _by_row(vector, act))
        return left if where is True else torch.where(_mask(where, act), left, act)

    return remove


def stream_sites(model: "HookedTransformer") -> list[str]:
    """Every point at which the residual stream itself stands."""
    if getattr(model.blocks[0], "renorms_stream", False):
        raise InputError(
            "ablating a direction everywhere needs a stream that components add to; this model's post-norm blocks "
            "normalise the stream between its points, which brings the direction back; name sites=..."
        )
    found = [(name, parse(name)) for name in model.hook_names()]
    return [name for name, site in found if site is not None and site.name in _STREAM]


def _points(model: "HookedTransformer", where: Where, direction: Direction, verb: str) -> list[str]:
    """The full names of the points, each checked to hold vectors of the direction's width."""
    if not isinstance(direction, Tensor) or not direction.is_floating_point():
        raise WrongType(f"a direction is a float tensor [width] or [layer width], got {type(direction).__name__}")
    if direction.ndim not in (1, 2) or (direction.ndim == 2 and len(direction) != model.cfg.n_layers):
        raise InputError(
            f"a direction is [width], or [layer width] with one a layer of the {model.cfg.n_layers}, got "
            f"{list(direction.shape)}"
        )
    names = [point.name for point in model.resolve(where)]
    for name in names:
        width = _width(model, name, verb)
        if direction.shape[-1] != width:
            raise InputError(f"{name} holds vectors of width {width}, and the direction has {direction.shape[-1]}")
    return names


def _width(model: "HookedTransformer", name: str, verb: str) -> int:
    found = parse(name)
    axes = AXES.get(found.name if found else "", ())
    sizes = {"d_model": model.cfg.d_model, "d_mlp": model.cfg.d_mlp, "d_vocab": model.cfg.d_vocab_out}
    in_head = found is not None and "attn" in (found.part or "")
    if len(axes) != 3 or axes[:2] != ("batch", "pos") or axes[2] not in sizes or in_head:
        raise InputError(
            f"{verb} works where one vector stands at each position, such as resid_post, attn_out, mlp_out or post; "
            f"{name} holds {' '.join(axes) or 'something else'}"
        )
    return sizes[axes[2]]


def _of_point(direction: Direction, name: str) -> Float[Tensor, "width"]:
    found = parse(name)
    if direction.ndim == 1:
        return direction
    if found is None or found.layer is None:
        raise InputError(f"{name} belongs to no layer, and the direction is one a layer; give one vector")
    return direction[found.layer]


def _by_row(vector: Float[Tensor, "*row width"], act: Float[Tensor, "batch pos width"]) -> Tensor:
    """Ready to stand beside [batch pos width]."""
    if vector.ndim == 2 and len(vector) != len(act):
        raise InputError(f"{len(vector)} rows were to be edited each in its own way, and the batch has {len(act)}")
    return vector[:, None] if vector.ndim == 2 else vector


def _mask(where: Any, act: Tensor) -> Tensor:
    return where.to(act.device)[..., None]

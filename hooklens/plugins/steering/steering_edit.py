"""Add a direction to activations or ablate it, in a forward pass and in every step of a generation."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.core.hooks import HookCall, HookedModule, HookFn
from hooklens.core.names import AXES, Where, parse
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.steering.positions import Positions, checked, touched

Direction = Float[Tensor, "*point"]
_STREAM = ("resid_pre", "resid_mid", "resid_post")
_OF_HEADS = ("q", "k", "v", "z", "result")


class StreamEdit(AbstractContextManager["StreamEdit"]):
    """Hooks that edit activations: a reusable `with` block, or `.hooks` for `run_with_hooks`."""

    def __init__(self, model: HookedModule, hooks: list[tuple[Where, HookFn]], what: str):
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
    model: HookedTransformer,
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
    amount = finite_numbers("coefficient is a number, or one per batch row", coefficient, dims=(0, 1))
    positions = checked(positions)
    vectors = at_points(model, site, _checked_direction(direction)[None], "steer")
    what = f"{next(iter(vectors))}{' and others' * (len(vectors) > 1)}, positions {positions!r}"
    if amount.ndim == 0 and float(amount) == 0:
        return StreamEdit(model, [], f"nothing: coefficient 0 at {what}")
    return StreamEdit(model, hooks_of(vectors, amount, positions), f"adds at {what}")


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
    model: HookedTransformer, direction: Direction, *, sites: Where | None = None, positions: Positions = "all"
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
    positions, where = checked(positions), stream_sites(model) if sites is None else sites
    vectors = at_points(model, where, _checked_direction(direction)[None], "ablate")
    if not all(bool(vector.any()) for vector in vectors.values()):
        raise InputError("a direction to ablate must be finite and not 0; the given one is 0")
    what = f"ablates a direction at {len(vectors)} points, positions {positions!r}"
    return StreamEdit(model, hooks_of(vectors, None, positions), what)


@dataclass(frozen=True, eq=False)
class DirectionHook:
    """A hook that adds amount * vector at the positions, or projects the vector out if the amount is None.

    The vector and the amount are the same for all rows of the batch, or one for each.
    """

    vector: Float[Tensor, "row *point"]
    amount: Tensor | None
    positions: Positions
    strict: bool = True

    def __call__(self, act: Tensor, hook: HookCall) -> Tensor | None:
        where = touched(self.positions, hook, act.shape[1], strict=self.strict)
        if where is False:
            return None
        vector = self.vector
        if self.amount is not None:
            vector = self.amount.to(act).view(-1, *[1] * (vector.ndim - 1)) * vector.to(act)
        if len(vector) not in (1, len(act)):
            raise InputError(f"the edit has {len(vector)} rows, but the batch has {len(act)}")
        edited = project_out(act, vector[:, None]) if self.amount is None else act + vector[:, None]
        if where is True:
            return edited
        return torch.where(where.to(act.device).view(*where.shape, *[1] * (act.ndim - 2)), edited, act)


def hooks_of(vectors: Mapping[str, Tensor], amount: Tensor | None, positions: Positions) -> list[tuple[Where, HookFn]]:
    """The hooks that add these vectors, or project them out, at their points."""
    return [(name, DirectionHook(vector, amount, positions)) for name, vector in vectors.items()]


def stream_sites(model: HookedTransformer) -> list[str]:
    """The names of all points of the residual stream."""
    model.blocks[0].need_sum("ablating a direction everywhere", "the direction would come back; name sites=...")
    sites = [(name, parse(name)) for name in model.hook_names()]
    return [name for name, site in sites if site is not None and site.name in _STREAM]


def at_points(
    model: HookedTransformer, where: Where, directions: Float[Tensor, "row *direction"], verb: str
) -> dict[str, Float[Tensor, "row *point"]]:
    """The directions at each point, by its full name: the same at all, or those of the point's layer.

    >>> from hooklens.testing import tiny_model
    >>> at = at_points(tiny_model(), "resid_post", torch.tensor([[[1.0] * 8, [2.0] * 8]]), "steer")
    >>> {name: float(vector.mean()) for name, vector in at.items()}
    {'blocks.0.hook_resid_post': 1.0, 'blocks.1.hook_resid_post': 2.0}
    """
    vectors = {}
    for point in model.resolve(where):
        shape, given = point_shape(model, point.name, verb), tuple(directions.shape[1:])
        if given not in (shape, (model.cfg.n_layers, *shape)):
            raise InputError(
                f"{point.name} has the shape {list(shape)} at each position, so the direction must have this shape, or "
                f"{[model.cfg.n_layers, *shape]} with one per layer; got {list(given)}"
            )
        layer = getattr(parse(point.name), "layer", None)
        if given != shape and layer is None:
            raise InputError(f"{point.name} belongs to no layer, but there is one direction per layer; give one vector")
        vectors[point.name] = directions if given == shape else directions[:, layer]
    if not vectors:
        raise InputError(f"{where!r:.60} selects no point to {verb} at; give a site such as ('resid_post', 0)")
    return vectors


def point_shape(model: HookedTransformer, name: str, verb: str) -> tuple[int, ...]:
    """The shape at each position of a point: a vector, or one per head.

    >>> from hooklens.testing import tiny_model
    >>> [point_shape(tiny_model(), f"blocks.0.{point}", "steer") for point in ("hook_resid_post", "attn.hook_z")]
    [(8,), (2, 4)]
    """
    cfg, point = model.cfg, parse(name)
    axes = AXES.get(point.name if point else "", ())
    sizes = {"d_model": cfg.d_model, "d_mlp": cfg.d_mlp, "d_vocab": cfg.d_vocab_out, "d_head": cfg.d_head}
    sizes |= {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads}
    in_module = point is not None and point.name not in _OF_HEADS and "attn" in (point.part or "")
    if axes[:2] != ("batch", "pos") or not set(axes[2:]) <= set(sizes) or in_module:
        raise InputError(
            f"{verb} needs a point with one vector per position, such as resid_post, attn_out, mlp_out or post, "
            f"or one per head: q, k, v, z; {name} has {' '.join(axes) or 'something else'}"
        )
    return tuple(sizes[axis] for axis in axes[2:])


def _checked_direction(direction: Any) -> Direction:
    if not isinstance(direction, Tensor) or not direction.is_floating_point():
        raise WrongType(f"a direction must be a float tensor such as [width], got {direction!r:.60}")
    if not bool(direction.isfinite().all()):
        raise InputError("a direction must be finite; some of its numbers are not")
    return direction


def finite_numbers(what: str, values: Any, *, dims: Sequence[int]) -> Tensor:
    """The numbers as a tensor with one of these numbers of axes; `what` begins the error.

    >>> finite_numbers("coefficient is a number", float("inf"), dims=[0])
    Traceback (most recent call last):
    hooklens.core.errors.InputError: coefficient is a number, all finite; got inf
    """
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(f"{what}, got {values!r:.60}") from error
    if numbers.ndim not in dims or numbers.is_complex() or not numbers.numel() or not bool(numbers.isfinite().all()):
        raise InputError(f"{what}, all finite; got {values!r:.60}")
    return numbers

"""Integrals of gradients along a path from 0 to 1, with the points where the path is rough."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError

Values = Float[Tensor, "node prompt"]
Slopes = Float[Tensor, "node prompt pos"]
Evaluate = Callable[[Float[Tensor, "node prompt"]], tuple[Values, Slopes]]

_FIRST, _AT_ONCE = 4, 4  # panels at the start, panels split a round


class Integral(NamedTuple):
    """The integral a token, and the function's values at both ends of the path."""

    per_token: Float[Tensor, "prompt pos"]
    start: Float[Tensor, "prompt"]
    end: Float[Tensor, "prompt"]
    n_nodes: int


def integrate(evaluate: Evaluate, n_prompts: int, most: int) -> Integral:
    """Integrate slopes over 0 to 1 with at most `most` points a prompt, split where they account least for the values.

    `evaluate` gives, at one place of the path a node and prompt, the function's value and its slope token by token. The
    slopes of a panel should sum to the difference of the values at its ends, so that the error of each is known: the
    panels where it is largest are halved, each prompt's own. Simpson's rule in each.

    >>> def cubed(at):                      # one token whose function is at^3
    ...     return at**3, (3 * at**2)[..., None]
    >>> found = integrate(cubed, 1, 9)
    >>> round(found.per_token.item(), 12), found.n_nodes
    (1.0, 9)
    """
    if isinstance(most, bool) or not isinstance(most, int) or most < 3:
        raise InputError(f"an integral needs at least 3 gradients a prompt, got {most!r:.80}")
    first = min(_FIRST, (most - 1) // 2)
    at = torch.linspace(0, 1, 2 * first + 1, dtype=torch.float64)[:, None].expand(-1, n_prompts)
    values, slopes = evaluate(at)
    corner = 2 * torch.arange(first)
    panels = torch.stack([corner, corner + 1, corner + 2], 1).expand(n_prompts, first, 3)  # nodes: left, middle, right
    while len(at) + 2 <= most:
        n = min(_AT_ONCE, (most - len(at)) // 2, panels.shape[1])
        worst = _missing(at, values, slopes, panels).topk(n, dim=1).indices
        halves, new = _halved(at, panels, worst)
        more = evaluate(new)
        at, values, slopes = torch.cat([at, new]), torch.cat([values, more[0]]), torch.cat([slopes, more[1]])
        panels = halves
    per_token = _simpson(at, slopes, panels).sum(1)
    return Integral(per_token, values[0], values[2 * first], len(at))


def _simpson(at: Tensor, slopes: Slopes, panels: Int[Tensor, "prompt panel 3"]) -> Float[Tensor, "prompt panel pos"]:
    """h / 6 (left + 4 middle + right) of every panel."""
    prompt = torch.arange(panels.shape[0])[:, None]
    left, middle, right = panels.unbind(-1)
    width = (at[right, prompt] - at[left, prompt]).to(slopes)[..., None]
    prompt = prompt.to(slopes.device)
    left, middle, right = (ends.to(slopes.device) for ends in (left, middle, right))
    return width / 6 * (slopes[left, prompt] + 4 * slopes[middle, prompt] + slopes[right, prompt])


def _missing(at: Tensor, values: Values, slopes: Slopes, panels: Tensor) -> Float[Tensor, "prompt panel"]:
    """How far each panel's integral lies from the difference of the values at its ends."""
    prompt = torch.arange(panels.shape[0])[:, None]
    values = values.cpu()
    gap = values[panels[..., 2], prompt] - values[panels[..., 0], prompt]
    return (_simpson(at, slopes, panels).sum(-1).cpu() - gap).abs()


def _halved(
    at: Tensor, panels: Tensor, worst: Int[Tensor, "prompt chosen"]
) -> tuple[Tensor, Float[Tensor, "new prompt"]]:
    """The panels with the chosen ones cut in two, and where the new middles lie; they count on from the old nodes."""
    n_prompts, n = worst.shape
    row = torch.arange(n_prompts)[:, None]
    left, middle, right = panels[row, worst].unbind(-1)  # prompt chosen
    places = torch.cat([(at[left, row] + at[middle, row]) / 2, (at[middle, row] + at[right, row]) / 2], 1)
    number = len(at) + torch.arange(2 * n).expand(n_prompts, -1)
    lower = torch.stack([left, number[:, :n], middle], -1)
    upper = torch.stack([middle, number[:, n:], right], -1)
    kept = torch.ones(panels.shape[:2], dtype=torch.bool).scatter(1, worst, False)
    rest = panels[kept].view(n_prompts, -1, 3)
    return torch.cat([rest, lower, upper], 1), places.T

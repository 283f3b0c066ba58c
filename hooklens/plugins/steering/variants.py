"""Many edits of the same prompts at once, and what the model says with them: metrics, losses, continuations."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError
from hooklens.core.names import Where, parse
from hooklens.data.prompts import Pairs, Prompts, read_pairs, rows_of
from hooklens.generation.sampling import Generation
from hooklens.metrics import MinusLoss
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.grid import in_order
from hooklens.plugins.patching.two_runs import joined
from hooklens.plugins.steering.positions import Positions
from hooklens.plugins.steering.steering_edit import DirectionHook, at_points
from hooklens.sweeps.many_edits import Edits, Hooks, run_edits
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.resume import Resume

Row = Int[Tensor, "_pos"]  # texts of one call differ in length
_POSITIONS = 2048  # of one batch


class Variants(Edits):
    """Edits of a model, and what it says with them: the metric of prompts, the loss of texts, continuations."""

    @classmethod
    def of(
        cls,
        model: HookedTransformer,
        site: Where,
        directions: Float[Tensor, "variant *direction"],
        amount: Tensor | None,
        positions: Positions,
        *,
        asked: Any,
    ) -> "Variants":
        """One edit per direction, which is added at the site, or projected out if the amount is None.

        `asked` are the arguments from which the directions were made.
        """
        vectors = at_points(model, site, directions, "ablate" if amount is None else "steer")
        layers = [point.layer for point in map(parse, vectors) if point is not None and point.layer is not None]
        if len(layers) < len(vectors):
            raise InputError(
                f"a sweep edits points inside blocks, and {next(iter(vectors))} is not one; use resid_pre of layer 0"
            )

        def hooks(index: Int[Tensor, "row"]) -> Hooks:
            edit = partial(DirectionHook, amount=amount, positions=positions, strict=False)
            return [(name, edit(vector[index])) for name, vector in vectors.items()]

        identity = (asked, list(vectors), amount, positions)
        return cls(len(directions), hooks, min(layers), (identity, {}), [directions])

    def generate(
        self, model: HookedTransformer, prompts: Sequence[Row], index: Int[Tensor, "variant"], options: dict[str, Any]
    ) -> Generation:
        """Every prompt continued under each of these edits: rows by variant, then prompt."""
        with model.hooks(self.hooks(index.repeat_interleave(len(prompts)))):
            return model.generate([row for _ in index for row in prompts], **options)


def values_and_losses(
    model: HookedTransformer,
    prompts: tuple[Variants, Sequence[Pairs], Any],
    texts: tuple[Variants, Sequence[Row], Sequence[int]],
    *,
    title: str,
    file: Resume | None,
) -> tuple[Float[Tensor, "variant prompt"], Float[Tensor, "variant text"]]:
    """The metric of prompts under edits, and the loss of texts under as many: nats per token from their `start` on."""
    if model.cfg.d_vocab_out < model.cfg.d_vocab:
        raise InputError("the loss of a text needs a logit for every token, and this model has fewer")
    (edits, groups, metric), (on_texts, rows, starts) = prompts, texts
    asked: list[tuple[Edits, Tensor, Any]] = [(edits, group.clean, group.of(metric)) for group in groups]
    for row, start in zip(rows, starts, strict=True):
        asked.append((on_texts, row[None], MinusLoss(torch.tensor([-1]), row[None], start - 1)))
    outcomes, n = run_edits(model, asked, title=title, resume=file), len(groups)
    return joined(groups, outcomes[:n]).values, -torch.cat([outcome.values for outcome in outcomes[n:]], 1)


def continuation_loss(model: HookedTransformer, written: Generation) -> Float[Tensor, "text"]:
    """The model's loss on each continuation, in nats per new token, with the hooks that are active now.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> continuation_loss(model, model.generate([[1, 2], [3]], 4)).shape
    torch.Size([2])
    """
    groups, losses = read_pairs(model, written.tokens, written.prompts, ()), []
    for group in groups:
        for rows in group.clean.split(max(1, _POSITIONS // group.clean.shape[1])):
            stream = model(rows, stop_at_layer=model.cfg.n_layers)
            metric = MinusLoss(torch.full((len(rows),), -1), rows, group.corrupted.shape[1] - 1)
            losses.append(-Reader(model, metric, stream).base)
    return in_order(groups, losses)


def repeated(ids: Int[Tensor, "pos"]) -> float:
    """The share of two-token sequences that occurred earlier in the same text.

    >>> repeated(torch.tensor([1, 2, 1, 2, 1])), repeated(torch.tensor([1, 2, 3]))
    (0.5, 0.0)

    Reference: Li et al. (2016), "A Diversity-Promoting Objective Function", distinct-2 (this is 1 minus it).
    """
    pairs = list(zip(ids.tolist(), ids.tolist()[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def texts_of(model: HookedTransformer, neutral: Prompts) -> list[Row]:
    """The token ids of texts that are long enough to have a loss."""
    rows = rows_of(model, neutral, "neutral")
    short = [i for i, row in enumerate(rows) if len(row) < 2]
    if short:
        raise InputError(f"neutral needs texts of at least two tokens to have a loss, and number {short[0]} has one")
    return rows


def unit_controls(
    controls: int | Float[Tensor, "draw *given"], direction: Float[Tensor, "*point"], seed: int
) -> Float[Tensor, "_draw *point"]:
    """Control directions of length 1 at each layer and head: as many random ones as `controls` says, or the given ones.

    >>> unit_controls(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0).tolist()
    [[0.6, 0.8]]
    """
    shape = list(direction.shape)
    if not isinstance(controls, Tensor):
        n = whole("controls", controls, 1)
        controls = torch.randn(n, *shape, generator=seeded(seed), dtype=torch.float64)
    if list(controls.shape[1:]) != shape or not len(controls):
        raise InputError(
            f"control directions are [draw {' '.join(map(str, shape))}], at least one, got {list(controls.shape)}"
        )
    wide = controls.detach().double().cpu()
    size = wide.norm(dim=-1, keepdim=True)
    if not bool(((size > 0).squeeze(-1) | (direction.cpu().norm(dim=-1) == 0)).all()):
        raise InputError("a control direction is 0 and points nowhere; leave it out")
    return wide / torch.where(size > 0, size, 1.0)

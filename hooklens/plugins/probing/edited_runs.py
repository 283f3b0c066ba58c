"""Run prompts again from an edited position on, with many directions at once."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.names import axes
from hooklens.data.prompts import Pairs
from hooklens.model.kv_cache import KVCache
from hooklens.plugins.probing.folds import Fold, split
from hooklens.plugins.probing.probes import Logistic
from hooklens.plugins.probing.scoring import as_rows, correct
from hooklens.sweeps.measure import Reader

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_ROWS = 2048  # maximum number of positions per forward pass


class EditedRuns:
    """Prompts of one length that are run again from the edited layer and position, with many directions at once."""

    def __init__(self, model: "HookedTransformer", pairs: Pairs, metric: Any, point: str, layer: int, pos: Tensor):
        self.model, self.point, self.layer = model, point, layer
        tokens, n = pairs.clean, model.cfg.n_layers
        # positions before the first edit keep their keys and values; rot_k fires again for the cached ones
        self.start = int(pos.min()) if model.cfg.causal and "key_pos" not in axes(point) else 0
        self.pos = pos.to(tokens.device) - self.start
        before, whole = f"blocks.{layer}.hook_resid_pre", KVCache()
        last, cache = model.run_with_cache(tokens, names=[before], stop_at_layer=n, kv_cache=whole)
        self.past = whole.before(self.start)
        self.before, self.last = cache[before][:, self.start :], last
        self.reader = Reader(model, pairs.of(metric), last)

    def edited(
        self, shift: Float[Tensor, "edit prompt"], directions: Float[Tensor, "direction d"]
    ) -> Float[Tensor, "edit direction prompt"]:
        """The metric after each prompt's activation is moved by its shift along each direction."""
        n, length = self.before.shape[:2]
        at_once = max(1, _ROWS // (n * length))
        moves = [(i, j) for i in range(len(shift)) for j in range(len(directions))]
        values = []
        for first in range(0, len(moves), at_once):
            some = moves[first : first + at_once]
            change = torch.stack([shift[i][:, None] * directions[j] for i, j in some]).flatten(0, 1)
            stream = self._run(change.to(self.before), len(some)).unflatten(0, (len(some), n))
            values += [self._metric(torch.cat([self.last[:, : self.start], one], 1)) for one in stream]
        return torch.stack(values).view(len(shift), len(directions), n)

    def _run(self, change: Float[Tensor, "row d"], times: int) -> Float[Tensor, "row pos d_model"]:
        rows = torch.arange(len(self.before), device=self.before.device).repeat(times)
        past = None
        if self.start:
            past = copy.copy(self.past)
            past.keep_rows(rows)

        def add(act: Tensor, hook: Any) -> Tensor:
            at = (torch.arange(len(act), device=act.device), self.pos[rows])
            act[at] += change.view(act[at].shape)
            return act

        with self.model.hooks(fwd_hooks=[(self.point, add)]):
            n = self.model.cfg.n_layers
            return self.model(self.before[rows], start_at_layer=self.layer, stop_at_layer=n, kv_cache=past)

    def _metric(self, stream: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, "prompt"]:
        return self.reader.on_stream(stream)


def refitted(
    x: Float[Tensor, "state prompt d"], label: Int[Tensor, "prompt"], group: Int[Tensor, "prompt"], seed: int
) -> Float[Tensor, "state prompt"]:
    """Out-of-fold correctness, in the same folds, for the original and for the edited activations."""
    try:
        parts = [Fold(train, test, ()) for train, test in split(label, group, 5, seed)]
    except InputError:
        return torch.full_like(x[..., 0], float("nan"))
    return torch.stack([correct(as_rows(rows), label, 2, parts, Logistic()) for rows in x]).to(x)

"""Information flow: which path, from a component to a reader of the stream, carries how much of the difference?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.component import Component
from hooklens.core.files import make_folder
from hooklens.core.hooks import HookFn
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts, read_pairs
from hooklens.metrics import ReadingMetric
from hooklens.plugins.patching.flow import Choice, InformationFlow
from hooklens.plugins.patching.path import path_patch
from hooklens.plugins.patching.path_sweep import PathSweep
from hooklens.results.statistics import group_numbers, halves
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.nodes import Order, Receiver, Sender, of_pairs, on_tokens, read_receivers, read_senders
from hooklens.sweeps.settings import engine

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def trace_information(
    model: "HookedTransformer",
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    receivers: Any,
    senders: Any = None,
    choice: Choice | None = None,
    resume: str | Path | None = None,
) -> InformationFlow:
    """Which path carries how much, from senders over the q, k or v of these receivers to the logits?

    Every path is an edge patched (`path_patch`), clean into corrupted, with everything above the receiver live.
    The strongest senders of each receiver are chosen on one half of the groups of pairs; what they carry is measured on
    the other, beside control senders: themselves turned into random directions, and all others at that receiver.
    `receivers` as there, each on its own; a dict names several that are patched together: {"queries": [("q", 9)]}.
    `resume` names a folder with a file a sweep, so that an interrupted study goes on.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.paths[0], found.halved, found.turned.shape[0]
    ('L0H0 to L1H0.q', True, 9)

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 3; the halves and controls are ours.
    """
    options, sending = choice or Choice(), read_senders(model, senders)
    pairs = as_pairs(model, clean, corrupted, metric, options.group)
    number, every = group_numbers(len(pairs), pairs.group), torch.arange(len(pairs))
    halved = len(number.unique()) > 1
    first, second = halves(len(pairs), group=number, seed=options.seed) if halved else (every, every)
    chosen_on = first[: options.choose_on]
    between = _Between(model, replace(pairs, group=number), folder=resume)
    parts = [
        _paths_to(
            between,
            chosen_on,
            second=second,
            name=name,
            receivers=reading,
            senders=sending,
            options=options,
        )
        for name, reading in _named(model, receivers).items()
    ]
    return InformationFlow(
        paths=[name for part in parts for name in part.paths],
        receivers=[part.receiver for part in parts for _ in part.paths],
        chosen_by=torch.cat([part.chosen_by for part in parts]),
        moved=torch.cat([part.moved for part in parts], -1),
        turned=torch.cat([part.turned for part in parts], -1),
        others=_side_by_side([part.others for part in parts]),
        total=torch.cat([part.total for part in parts], -1),
        gap=parts[0].gap,
        group=number[second],
        halved=halved,
        largest_error=max(part.largest_error for part in parts),
        choice=replace(options, group=None),  # which pairs belong together stands in `group`
    )


class _PathsTo(NamedTuple):
    """The paths to one receiver, as InformationFlow holds those of all."""

    paths: list[str]
    receiver: str
    chosen_by: Float[Tensor, "path"]
    moved: Float[Tensor, "pair path"]
    turned: Float[Tensor, "draw pair path"]
    others: Float[Tensor, "other path"]
    total: Float[Tensor, "pair path"]
    gap: Float[Tensor, "pair"]
    largest_error: float


class _Between:
    """Edges between senders and receivers, of which some pairs are swept at a time."""

    def __init__(self, model: "HookedTransformer", pairs: PromptPairs, *, folder: str | Path | None):
        self.model, self.pairs = model, pairs
        self.folder, self.n_sweeps = None if folder is None else make_folder(folder), 0

    def sweep(self, index: Tensor, senders: Sequence[Sender], receivers: tuple[Receiver, ...]) -> PathSweep:
        """The edges from these senders to the receivers, for some pairs."""
        swept, asked, rest = self._some(index)
        ends, starts = self._at(receivers, asked), self._at(senders, asked)
        file = None if self.folder is None else self.folder / f"paths-{self.n_sweeps}"
        self.n_sweeps += 1
        return path_patch(self.model, swept, receivers=ends, senders=starts, resume=file).of_pairs(rest)

    def whole(self, index: Tensor, receivers: tuple[Receiver, ...], base: PathSweep) -> Float[Tensor, "pair"]:
        """How far the metric moves when all that the receivers read is the clean run's."""
        swept, asked, rest = self._some(index)
        n, found = self.model.cfg.n_layers, base.per_pair.new_zeros(len(swept))
        for one in read_pairs(self.model, swept.clean, swept.corrupted, ()):
            own = of_pairs(self._at(receivers, asked), one.index, len(swept))
            points = [(r, _point(self.model, r)) for r in on_tokens(own, *one.clean.shape)]
            with torch.no_grad():
                _, cache = self.model.run_with_cache(one.clean, [at for _, at in points], stop_at_layer=n)
                hooks = [(at, _from(cache[at], r)) for r, at in points]
                stream = self.model.run_with_hooks(one.corrupted, fwd_hooks=hooks, stop_at_layer=n)
                found[list(one.index)] = Reader(self.model, one.of(swept.metric), stream).base
        return found[rest] - base.corrupted_per_pair

    def _at(self, nodes: Sequence[Component], asked: list[int]) -> tuple[Component, ...]:
        """Nodes with the positions of the pairs that are swept."""
        return of_pairs(nodes, asked, len(self.pairs))

    def _some(self, index: Tensor) -> tuple[PromptPairs, list[int], Tensor]:
        """The pairs that are swept, their numbers, and which of them are meant: a plain function is asked about all."""
        if not isinstance(self.pairs.metric, ReadingMetric):
            return self.pairs, list(range(len(self.pairs))), index
        return self.pairs[index], index.tolist(), torch.arange(len(index))


def _named(model: "HookedTransformer", receivers: Any) -> dict[str, tuple[Receiver, ...]]:
    """Receivers that are patched together, by what they are called."""
    if isinstance(receivers, Mapping):
        return {str(name): read_receivers(model, some) for name, some in receivers.items()}
    return {one.name: (one,) for one in read_receivers(model, receivers)}


def _point(model: "HookedTransformer", receiver: Receiver) -> tuple[str, int]:
    return ("resid_post", model.cfg.n_layers - 1) if receiver.kind == "final" else (receiver.kind, receiver.layer)


def _from(value: Tensor, receiver: Receiver) -> HookFn:
    rows = torch.arange(len(value), device=value.device)
    pos = None if receiver.pos is None else torch.as_tensor(receiver.pos, device=value.device)
    where = (slice(None), slice(None)) if pos is None else (rows, pos)
    at = where if receiver.head is None else (*where, receiver.head)

    def write(act: Tensor, hook: Any) -> Tensor:
        act[at] = value[at]
        return act

    return write


def _paths_to(
    pairs: _Between,
    first: Tensor,
    second: Tensor,
    name: str,
    receivers: tuple[Receiver, ...],
    senders: Sequence[Sender],
    options: Choice,
) -> _PathsTo:
    """Choose on the first pairs, measure on the second, beside the controls."""
    order = Order(pairs.model)
    last = max(order.reads_at(receiver) for receiver in receivers)
    reaching = [sender for sender in senders if order.feeds_from(sender) <= last] or list(senders)
    chose = pairs.sweep(first, reaching, receivers)
    best = chose.order()[: options.per_receiver]
    turned = [replace(reaching[i], turned=options.seed + draw) for draw in range(options.draws) for i in best]
    with engine(verify=0):  # the same senders were checked on the half that chose
        report = pairs.sweep(second, [*reaching, *turned], receivers)
        whole = pairs.whole(second, receivers, report)
    moved, n = report.moved, len(reaching)
    effect = moved[:, :n].mean(0)
    return _PathsTo(
        paths=[f"{reaching[i].name} to {name}" for i in best],
        receiver=name,
        chosen_by=chose.share[best],
        moved=moved[:, best],
        turned=moved[:, n:].unflatten(1, (options.draws, -1)).transpose(0, 1),
        others=torch.stack([torch.cat((effect[:i], effect[i + 1 :])) for i in best], 1),
        total=whole[:, None].expand(-1, len(best)),
        gap=report.clean_per_pair - report.corrupted_per_pair,
        largest_error=chose.largest_error,
    )


def _side_by_side(others: list[Float[Tensor, "_ _"]]) -> Float[Tensor, "other path"]:
    """Receivers have more or fewer senders; what is missing is NaN."""
    most = max(map(len, others))
    return torch.cat([torch.cat((one, one.new_full((most - len(one), one.shape[1]), torch.nan))) for one in others], 1)


def demo(model: "HookedTransformer") -> InformationFlow:
    """Four short prompt pairs; who talks to a query of the last layer and to the logits."""
    last = model.cfg.n_layers - 1
    receivers = [("q", last, 0), "final"] if last else "final"
    return trace_information(model, demo_pairs(model, 4), receivers=receivers, choice=Choice(per_receiver=2, draws=9))

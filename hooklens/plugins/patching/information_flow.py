"""Information flow: which path, from a component to a reader of the stream, carries how much of the difference?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hooklens.core.component import Component
from hooklens.core.errors import InputError, WrongType
from hooklens.core.files import make_folder
from hooklens.core.hooks import HookFn
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts, read_pairs
from hooklens.metrics import ReadingMetric
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.flow import Choice, InformationFlow
from hooklens.plugins.patching.path import PathSweep, path_patch
from hooklens.results.account import RunAccount
from hooklens.results.statistics import group_numbers, halves
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.nodes import Order, Receiver, Sender, of_pairs, on_tokens, read_receivers, read_senders
from hooklens.sweeps.paths import point_of
from hooklens.sweeps.settings import engine


def trace_information(
    model: HookedTransformer,
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
    if choice is not None and not isinstance(choice, Choice):
        raise WrongType(f"choice is a Choice, such as Choice(per_receiver=4, draws=99); got {choice!r:.60}")
    options, sending = choice or Choice(), read_senders(model, senders)
    pairs = as_pairs(model, clean, corrupted, metric, options.group)
    number, every = group_numbers(len(pairs), pairs.group), torch.arange(len(pairs))
    halved = len(number.unique()) > 1
    first, second = halves(len(pairs), group=number, seed=options.seed) if halved else (every, every)
    between = _Between(model, replace(pairs, group=number), folder=resume)
    swept = (first[: options.choose_on], second)
    parts = [
        _paths_to(between, swept, name, receivers=reading, senders=sending, options=options)
        for name, reading in _named(model, receivers).items()
    ]
    sweeps = [sweep for part in parts for sweep in part["sweeps"]]
    by_path: dict[str, Any] = {
        name: torch.cat([part[name] for part in parts], -1) for name in ("chosen_by", "moved", "turned", "total")
    }
    return InformationFlow(
        paths=[path for part in parts for path in part["paths"]],
        receivers=[name for part in parts for name in part["receivers"]],
        # receivers have more or fewer senders; what is missing is NaN
        others=pad_sequence([column for part in parts for column in part["others"]], padding_value=torch.nan),
        gap=parts[0]["gap"],
        group=number[second],
        halved=halved,
        choice=replace(options, group=None),  # which pairs belong together stands in `group`
        **by_path,
        **RunAccount.joined(sweeps, [sweep.per_pair.numel() for sweep in sweeps]).account,
    )


class _Between:
    """Edges between senders and receivers, of which some pairs are swept at a time."""

    def __init__(self, model: HookedTransformer, pairs: PromptPairs, *, folder: str | Path | None):
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
        n, metric = self.model.cfg.n_layers, base.per_pair.new_zeros(len(swept))
        for group in read_pairs(self.model, swept.clean, swept.corrupted, ()):
            own = of_pairs(self._at(receivers, asked), group.index, len(swept))
            points = [(r, point_of(self.model, r.kind, r.layer)) for r in on_tokens(own, *group.clean.shape[:2])]
            with torch.no_grad():
                _, cache = self.model.run_with_cache(group.clean, [at for _, at in points], stop_at_layer=n)
                hooks = [(at, _clean_into(cache[at], r)) for r, at in points]
                stream = self.model.run_with_hooks(group.corrupted, fwd_hooks=hooks, stop_at_layer=n)
                metric[list(group.index)] = Reader(self.model, group.of(swept.metric), stream).base
        return metric[rest] - base.corrupted_per_pair

    def _at(self, nodes: Sequence[Component], asked: list[int]) -> tuple[Component, ...]:
        """Nodes with the positions of the pairs that are swept."""
        return of_pairs(nodes, asked, len(self.pairs))

    def _some(self, index: Tensor) -> tuple[PromptPairs, list[int], Tensor]:
        """The pairs that are swept, their numbers, and which of them are meant: a plain function is asked about all."""
        if not isinstance(self.pairs.metric, ReadingMetric):
            return self.pairs, list(range(len(self.pairs))), index
        return self.pairs[index], index.tolist(), torch.arange(len(index))


def _named(model: HookedTransformer, receivers: Any) -> dict[str, tuple[Receiver, ...]]:
    """Receivers that are patched together, by what they are called."""
    if isinstance(receivers, Mapping):
        if not receivers:
            raise InputError('receivers= is an empty dict; name at least one group: {"queries": [("q", 9)]}')
        return {str(name): read_receivers(model, some) for name, some in receivers.items()}
    return {receiver.name: (receiver,) for receiver in read_receivers(model, receivers)}


def _clean_into(value: Tensor, receiver: Receiver) -> HookFn:
    """A hook that writes what a receiver reads in the clean run, where it reads."""
    pairs = torch.arange(len(value), device=value.device)
    pos = None if receiver.pos is None else torch.as_tensor(receiver.pos, device=value.device)
    at = (slice(None), slice(None)) if pos is None else (pairs, pos)
    at = at if receiver.head is None else (*at, receiver.head)

    def write(act: Tensor, hook: Any) -> Tensor:
        act[at] = value[at]
        return act

    return write


def _paths_to(
    pairs: _Between,
    halves: tuple[Tensor, Tensor],
    name: str,
    *,
    receivers: tuple[Receiver, ...],
    senders: Sequence[Sender],
    options: Choice,
) -> dict[str, Any]:
    """Choose on the first half, measure on the second, beside the controls: fields of InformationFlow."""
    order = Order(pairs.model)
    last = max(order.reads_at(receiver) for receiver in receivers)
    reaching = [sender for sender in senders if order.feeds_from(sender) <= last] or list(senders)
    chose = pairs.sweep(halves[0], reaching, receivers)
    best = chose.order()[: options.per_receiver]
    turned = [replace(reaching[i], turned=options.seed + draw) for draw in range(options.draws) for i in best]
    with engine(verify=0):  # the same senders were checked on the half that chose
        report = pairs.sweep(halves[1], [*reaching, *turned], receivers)
        whole = pairs.whole(halves[1], receivers, report)
    moved, n = report.moved, len(reaching)
    effect = moved[:, :n].mean(0)
    return {
        "paths": [f"{reaching[i].name} to {name}" for i in best],
        "receivers": [name] * len(best),
        "chosen_by": chose.share[best],
        "moved": moved[:, best],
        "turned": moved[:, n:].unflatten(1, (options.draws, -1)).transpose(0, 1),
        "others": [torch.cat((effect[:i], effect[i + 1 :])) for i in best],
        "total": whole[:, None].expand(-1, len(best)),
        "gap": report.gap,
        "sweeps": [chose, report],
    }


def demo(model: HookedTransformer) -> InformationFlow:
    """Four short prompt pairs; who talks to a query of the last layer and to the logits."""
    last = model.cfg.n_layers - 1
    receivers = [("q", last, 0), "final"] if last else "final"
    return trace_information(model, demo_pairs(model, 4), receivers=receivers, choice=Choice(per_receiver=2, draws=9))

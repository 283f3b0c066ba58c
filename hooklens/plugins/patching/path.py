"""Path patching: some readers of the residual stream see a component's value of the other run, all others do not."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompts import Pairs, Prompts, check_prompts_differ, read_pairs
from hooklens.model.linear import packed_linears
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.patching.grid import in_order
from hooklens.plugins.patching.path_sweep import PathSweep
from hooklens.results.statistics import Groups, group_numbers
from hooklens.sweeps.execute import Outcome
from hooklens.sweeps.execute_paths import execute_paths
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.nodes import Order, Receiver, Sender, of_pairs, read_receivers, read_senders
from hooklens.sweeps.paths import EDGES, FIXED, FIXED_FROZEN, plan_paths
from hooklens.sweeps.replacement import Value, as_replacement, is_run

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def path_patch(
    model: "HookedTransformer",
    clean: Prompts,
    corrupted: Prompts,
    metric: Any,
    *,
    receivers: Any = "final",
    senders: Any = None,
    value: Value = "clean",
    group: Groups = None,
) -> PathSweep:
    """What does each component tell these readers? Only the edges from sender to receivers carry its new value.

    A receiver reads the live stream in which the sender has its value of the other run; the sender itself, and whatever
    comes after the receivers, is live. With every receiver (`receivers="all"`) this is activation patching.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import logit_diff
    >>> model = tiny_model(); clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    >>> metric = logit_diff(model, answer=5, wrong_answer=6)
    >>> sweep = path_patch(model, clean, corrupted, metric, receivers=("q", 1, 0))
    >>> sweep.senders, sweep.reaches.tolist()
    (['L0H0', 'L0H1', 'L1H0', 'L1H1', 'MLP0', 'MLP1'], [True, True, False, False, True, False])

    `receivers`, one or a list: ("q", 9, 6) or "L9H6.q", and so "k" and "v" (of a key/value head), ("q", 9) for every
    head of the layer, ("mlp", 9) or "MLP9", "final" (what the final norm reads: the direct path to the logits), "all".
    `senders`: (9, 6) or "L9H6", ("mlp", 9) or "MLP9", "embed", "heads", "mlps"; None: all heads and MLPs. Each is
    patched alone. Senders and receivers are meant at all positions; `At("L9H6.q", -1)` or `At("heads", s2, "S2")` means
    one position, the same in every pair or one a pair. `value`: "clean" goes into the corrupted run, "corrupted" into
    the clean one. `group`: pairs with the same label share something, and intervals resample groups.

    Every norm on the way is recomputed. Sandwich norms join a layer's heads: a head's new value is what the norm makes
    of the layer with this head alone exchanged, so that senders of one layer do not add up. Post-norm blocks have no
    paths and are refused.

    Reference: Goldowsky-Dill et al. (2023), "Localizing Model Behavior with Path Patching", section 3.
    """
    return _path_patch(
        EDGES,
        model,
        clean=clean,
        corrupted=corrupted,
        metric=metric,
        receivers=receivers,
        senders=senders,
        value=value,
        group=group,
    )


def path_patch_fixed(
    model: "HookedTransformer",
    clean: Prompts,
    corrupted: Prompts,
    metric: Any,
    *,
    receivers: Any = "final",
    senders: Any = None,
    value: Value = "clean",
    group: Groups = None,
) -> PathSweep:
    """What does each component tell these readers, directly and through MLPs? The procedure of Wang et al.

    First the sender takes its value of the other run while every other head keeps its own, MLPs are recomputed, and
    what the receivers read is recorded. Then the base run goes again with the receivers held at that. The arguments are
    those of `path_patch`; "final" stands alone here, as nothing held below it could count.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import logit_diff
    >>> model = tiny_model(); clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    >>> sweep = path_patch_fixed(model, clean, corrupted, logit_diff(model, answer=5, wrong_answer=6))
    >>> sweep.semantics, sweep.receivers
    ('fixed receivers', ['final'])

    Reference: Wang et al. (2022), "Interpretability in the Wild", appendix B.
    """
    return _path_patch(
        FIXED,
        model,
        clean=clean,
        corrupted=corrupted,
        metric=metric,
        receivers=receivers,
        senders=senders,
        value=value,
        group=group,
    )


def path_patch_fixed_frozen(
    model: "HookedTransformer",
    clean: Prompts,
    corrupted: Prompts,
    metric: Any,
    *,
    receivers: Any = "final",
    senders: Any = None,
    value: Value = "clean",
    group: Groups = None,
) -> PathSweep:
    """What does each component tell these readers directly? `path_patch_fixed` with the MLPs frozen too.

    With one receiver this is `path_patch`. With several, a higher one holds what the sender alone changes in it,
    while there it also reads what the lower ones do.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import logit_diff
    >>> model = tiny_model(); clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    >>> metric = logit_diff(model, answer=5, wrong_answer=6)
    >>> one, other = (f(model, clean, corrupted, metric) for f in (path_patch, path_patch_fixed_frozen))
    >>> torch.allclose(one.values, other.values, rtol=1e-5, atol=0)
    True
    """
    return _path_patch(
        FIXED_FROZEN,
        model,
        clean=clean,
        corrupted=corrupted,
        metric=metric,
        receivers=receivers,
        senders=senders,
        value=value,
        group=group,
    )


def _path_patch(semantics: str, model, clean, corrupted, metric, receivers, senders, value, group) -> PathSweep:
    replacement = as_replacement(value)
    if not (is_run(replacement, "clean") or is_run(replacement, "corrupted")):
        raise InputError(f"a path carries the value of a run, value='clean' or 'corrupted', got {replacement.label!r}")
    value = replacement.label
    sending, reading = read_senders(model, senders), read_receivers(model, receivers)
    groups = _aligned(model, clean, corrupted)
    check_metric(metric, groups)
    n = sum(len(one.index) for one in groups)
    with torch.no_grad(), packed_linears(rows=1024):
        both = []
        for one in groups:
            senders_here, receivers_here = of_pairs(sending, one.index, n), of_pairs(reading, one.index, n)
            both.append(_sweep(model, one, metric, senders_here, receivers_here, semantics=semantics, value=value))
    parts = [outcome for outcome, _ in both]
    ends = in_order(groups, [p.base for p in parts]), in_order(groups, [other for _, other in both])
    corrupted_end, clean_end = ends if value == "clean" else ends[::-1]
    number = group_numbers(len(clean_end), group)
    return PathSweep(
        per_pair=in_order(groups, [p.values.T for p in parts]),
        clean_per_pair=clean_end,
        corrupted_per_pair=corrupted_end,
        senders=[sender.name for sender in sending],
        receivers=[one.name(grouped=model.cfg.n_heads != model.cfg.n_key_value_heads) for one in reading],
        semantics=semantics,
        into="corrupted" if value == "clean" else "clean",
        place=torch.tensor([[s.layer, -1 if s.head is None else s.head] for s in sending]),
        reaches=_reaches(model, sending, reading),
        shape=(model.cfg.n_layers, model.cfg.n_heads),
        group=number,
        computed=sum(p.computed * len(g.index) for p, g in zip(parts, groups, strict=True)) / len(number),
        largest_error=float(torch.tensor([p.largest_error for p in parts]).max()),
        n_verified=sum(p.n_verified for p in parts),
        how=parts[0].how,
        kernel=parts[0].kernel,
    )


def _aligned(model: "HookedTransformer", clean: Prompts, corrupted: Prompts) -> list[Pairs]:
    """Pairs by their length; senders are patched at all positions, so both prompts of a pair have the same."""
    groups = read_pairs(model, clean, corrupted, ())
    if not all(one.aligned for one in groups):
        read_pairs(model, clean, corrupted, ("pos",))  # raises, and says where they part
    check_prompts_differ(groups)
    return groups


def _sweep(
    model,
    pairs: Pairs,
    metric: Any,
    senders: tuple[Sender, ...],
    receivers: tuple[Receiver, ...],
    *,
    semantics: str,
    value: str,
) -> tuple[Outcome, Tensor]:
    """All senders of the pairs of one length, and the metric of the run that is not patched."""
    into, other = (pairs.corrupted, pairs.clean) if value == "clean" else (pairs.clean, pairs.corrupted)
    made = plan_paths(model, into, other=other, senders=senders, receivers=receivers, semantics=semantics)
    outcome = execute_paths(made, pairs.of(metric))
    found = Reader(model, pairs.of(metric), made.new.streams[model.cfg.n_layers]).base
    # the same prompt twice is the same number, not one to rounding
    return outcome, torch.where((into == other).all(1), outcome.base, found)


def _reaches(model: "HookedTransformer", senders: tuple[Sender, ...], receivers: tuple[Receiver, ...]) -> Tensor:
    order = Order(model)
    last = max(order.reads_at(receiver) for receiver in receivers)
    return torch.tensor([order.feeds_from(sender) <= last for sender in senders])


def demo(model: "HookedTransformer") -> PathSweep:
    """Who talks to the query and value of the last layer's first head; with one layer, to the logits."""
    clean, corrupted, *_ = demo_pairs(model, 2)
    last = model.cfg.n_layers - 1
    receivers = [("q", last, 0), ("v", last, 0)] if last else "final"

    def logit(logits: Tensor) -> Tensor:
        return logits[:, -1, 0] - logits[:, -1, 1 % logits.shape[2]]

    return path_patch(model, clean, corrupted, logit, receivers=receivers)

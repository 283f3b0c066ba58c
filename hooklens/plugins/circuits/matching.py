"""A one-to-one matching of the nodes of two models, by label and causal effect."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.plugins.circuits.carry import Carrier, Maps
from hooklens.plugins.circuits.roles import Roles
from hooklens.plugins.heads.taxonomy import UNLABELLED
from hooklens.results.result import Result, Table

_TIE = 0.01  # effects first: attention and depth decide between heads of almost equal effect
_STARTS = (0.0, 0.3, 1.0, 3.0)  # weights of depth; with 0 an assignment that no edge constrains is the best one
_SLACK = 1e-9
Costs = Float[Tensor, "chosen target_or_none"]


@dataclass(frozen=True, eq=False)
class Matching(Result):
    """The counterpart in the target of each node of the circuit, with the label and the effect of both.

    `distance` is between effects, in shares of the metric. A node without a counterpart has target "" and NaN. `lost`
    are the circuit's edges without a counterpart in the target, for all or for one of the heads that read them.
    """

    ranked_by = "how much the task needs the node in the source"

    source: list[str]
    source_label: list[str]
    source_effect: Float[Tensor, "node"]
    target: list[str]
    target_label: list[str]
    target_effect: Float[Tensor, "node"]
    lost: list[str]
    n_edges: int

    @property
    def distance(self) -> Float[Tensor, "node"]:
        return (self.source_effect - self.target_effect).abs()

    @property
    def same_label(self) -> int:
        """How many heads were matched to one of their own label, where they have one."""
        labels = zip(self.source_label, self.target_label, strict=True)
        return sum(label == other and _is_label(label) for label, other in labels)

    @property
    def labelled(self) -> int:
        """How many of the circuit's heads have a label: the others are matched by effect alone."""
        return sum(map(_is_label, self.source_label))

    def table(self, n: int | None = 20) -> Table:
        """One row a node of the circuit, the largest effect in the source first."""
        effects = torch.stack((self.source_effect, self.target_effect, self.distance), 1).tolist()
        rows: list[tuple] = []
        for i in self.source_effect.abs().argsort(descending=True, stable=True).tolist()[:n]:
            (here, there, distance), target = effects[i], self.target[i]
            known = (there, distance) if target else (None, None)
            rows.append((self.source[i], self.source_label[i], here, target or "none", self.target_label[i], *known))
        return Table(("source", "label", "effect", "target", "its label", "its effect", "distance"), rows)

    def figure(self) -> Any:
        """Effect in the source against effect in the target, a point a node."""
        from hooklens.viz.curves import scatter

        known = [i for i, name in enumerate(self.target) if name]
        names = [f"{self.source[i]} ({self.source_label[i]}) to {self.target[i]}" for i in known]
        title = f"{len(known)} nodes matched, {len(self.lost)} of {self.n_edges} edges lost"
        here, there = self.source_effect[known], self.target_effect[known]
        return scatter(here, there, names, title, x_title="effect in the source", y_title="effect in the target")


def _is_label(label: str) -> bool:
    return label not in ("MLP", UNLABELLED)


def match(carrier: Carrier, source: Roles, target: Roles) -> Int[Tensor, "node"]:
    """The target's node for every node of the circuit: equal labels first, then near effects and edges that can exist.

    As many heads as possible get one of their own label; a head with two labels half matches one with either, and one
    without a label half matches any. Then the differences between effects, and the edges that the target cannot have
    (each by its share of the circuit's scores), are minimised together: from optimal assignments by labels, effects and
    a growing weight of relative depth, nodes are moved and exchanged as long as that helps, and the best result is
    taken. Between almost equal effects, attention and relative depth decide. MLPs are matched to MLPs.

    Reference: Kuhn (1955), "The Hungarian Method for the Assignment Problem".
    """
    deep = (_depth(source)[carrier.nodes, None] - _depth(target)).abs()
    costs = _costs(carrier, source, target, deep)
    to_none = deep.new_zeros(len(deep), 1)
    starts = [_assigned(carrier, costs + weight * torch.cat((deep, to_none), 1)) for weight in _STARTS]

    def total(maps: Maps) -> Float[Tensor, "map"]:
        return costs[torch.arange(len(carrier.nodes)), maps[:, carrier.nodes]].sum(1) + carrier.lost(maps)

    ends = [_improved(carrier, total, start, source) for start in starts]
    return ends[int(total(torch.stack(ends)).argmin())]


def measure_matching(carrier: Carrier, matched: Int[Tensor, "node"], source: Roles, target: Roles) -> Matching:
    """The map with its labels and effects, as a result."""
    nodes = carrier.nodes
    to = matched[nodes].tolist()
    names, target_names = source.graph.source_names, target.graph.source_names
    gone = carrier.edge[carrier.edges(matched[None])[0] < 0].unique().tolist()
    # one more entry for -1: a node that is matched to none
    effects = torch.cat([target.effect, target.effect.new_tensor([torch.nan])])
    target_names, target_labels = [*target_names, ""], [*target.labels, ""]
    return Matching(
        source=[names[i] for i in nodes],
        source_label=[source.labels[i] for i in nodes],
        source_effect=source.effect[nodes],
        target=[target_names[t] for t in to],
        target_label=[target_labels[t] for t in to],
        target_effect=effects[to].to(source.effect),
        lost=[source.graph.name(edge) for edge in gone],
        n_edges=len(carrier.edge.unique()),
    )


def _costs(carrier: Carrier, source: Roles, target: Roles, deep: Float[Tensor, "chosen target"]) -> Costs:
    """The cost of matching each node to each node of the target, infinite between kinds; last column: to none."""
    nodes, n = carrier.nodes, target.graph.n_sources
    apart = (source.effect[nodes].double()[:, None] - target.effect.double()).abs()
    looks = torch.cdist(source.attention[nodes].double(), target.attention.double(), p=1)
    heads = torch.tensor([source.graph.is_head(node) for node in nodes])
    target_heads = torch.tensor([target.graph.is_head(node) for node in range(n)])
    # convex: sums of mere distances are often equal for two pairings, of which only one keeps the order of effects
    cost = apart + apart.square() + torch.where(heads[:, None], _TIE * (looks + deep), deep)
    cost[:, 0] = torch.inf
    cost.masked_fill_(heads[:, None] != target_heads, torch.inf)
    labels = torch.tensor([[_differ(source.labels[i], target.labels[j]) for j in range(n)] for i in nodes])
    # no sum of distances, and no loss of edges, outweighs half a label
    least = 2 * (1 + cost.masked_fill(cost.isinf(), 0).amax(1).sum())
    cost = cost + least * torch.where(heads[:, None] & target_heads, labels, 0.0)
    unmatched = source.effect[nodes].double().abs() + 1
    return torch.cat((cost, unmatched[:, None]), 1)


def _differ(label: str, other: str) -> float:
    """0 for the same labels, 1 for none in common; half where some are, or where one head has none."""
    labels, others = set(label.split(", ")), set(other.split(", "))
    if labels != others and {UNLABELLED} in (labels, others):
        return 0.5
    return 1 - len(labels & others) / len(labels | others)


def _depth(roles: Roles) -> Float[Tensor, "source"]:
    """From 0 in the first layer to 1 in the last."""
    graph = roles.graph
    layers = [0, *(graph.place(node)[0] for node in range(1, graph.n_sources))]
    return torch.tensor(layers, dtype=torch.float64) / max(graph.n_layers - 1, 1)


def _assigned(carrier: Carrier, costs: Costs) -> Int[Tensor, "node"]:
    """The cheapest one-to-one assignment, heads and MLPs each on their own."""
    from scipy.optimize import linear_sum_assignment

    matched = carrier.fixed()
    for kind in (True, False):
        rows = [i for i, node in enumerate(carrier.nodes) if carrier.source.is_head(node) == kind]
        open_to = _peers(carrier, kind)
        if not rows:
            continue
        spare = max(0, len(rows) - len(open_to))
        table = torch.cat((costs[rows][:, open_to], costs[rows, -1:].expand(-1, spare)), 1)
        chosen, where = linear_sum_assignment(table.numpy())
        for i, j in zip(chosen.tolist(), where.tolist(), strict=True):
            matched[carrier.nodes[rows[i]]] = open_to[j] if j < len(open_to) else -1
    return matched


def _peers(carrier: Carrier, heads: bool) -> list[int]:
    graph = carrier.target
    return [node for node in range(1, graph.n_sources) if graph.is_head(node) == heads]


def _improved(
    carrier: Carrier, total: Callable[[Maps], Tensor], matched: Int[Tensor, "node"], source: Roles
) -> Int[Tensor, "node"]:
    """Move a node, or exchange two, as long as that is cheaper."""
    # the largest effect first: the numbering of heads must not matter
    order = sorted(carrier.nodes, key=lambda node: -abs(float(source.effect[node])))
    best, before = float(total(matched[None])), float("inf")
    while best < before - _SLACK:
        before = best
        for node in order:
            options = _moves(matched, node, _peers(carrier, carrier.source.is_head(node)))
            values = total(options)
            least = int(values.argmin()) if len(values) else 0
            if len(values) and float(values[least]) < best - _SLACK:
                matched, best = options[least], float(values[least])
    return matched


def _moves(matched: Int[Tensor, "node"], node: int, to: list[int]) -> Maps:
    """The node put in each of these places, exchanged with the node that is there."""
    there = torch.tensor(to, dtype=torch.long)[:, None]
    maps = torch.where(matched == there, matched[node], matched)
    maps[:, node] = there[:, 0]
    return maps

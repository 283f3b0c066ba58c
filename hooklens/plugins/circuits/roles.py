"""The role of each node of a model: a head's label and where it attends, and what a task loses without the node."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.graph import CircuitGraph
from hooklens.plugins.circuits.run import Bench
from hooklens.plugins.heads.head_scores import KINDS
from hooklens.plugins.heads.taxonomy import Taxonomy
from hooklens.results.result import Result, Table
from hooklens.sweeps.execution import execute
from hooklens.sweeps.planning import Patch, plan, points_of
from hooklens.sweeps.replacement import Value, targets_of
from hooklens.sweeps.site_patches import SitePatches


@dataclass(frozen=True, eq=False)
class Roles(Result):
    """The role of every node: `labels` of heads, where they attend, and the `effect` of each node on one task.

    `effect` is what the metric loses when the node alone carries the ablated run, as a share of what it loses when all
    do; NaN where it was not measured. `attention` is the share of attention above an even spread that a head pays to
    the kinds of key of `head_scores`, on repeated random tokens; 0 for nodes that are no heads.
    """

    ranked_by = "how much the task needs the node"

    graph: CircuitGraph
    labels: list[str]
    attention: Float[Tensor, "source kind"]
    effect: Float[Tensor, "source"]
    replacement: str
    n_pairs: int

    def table(self, n: int | None = 20) -> Table:
        """One row a node, the largest effect first."""
        order = self.effect.nan_to_num().abs().argsort(descending=True, stable=True).tolist()[:n]
        names = self.graph.source_names
        rows = [(names[i], self.labels[i], float(self.effect[i]), *self.attention[i].tolist()) for i in order]
        return Table(("node", "label", f"effect ({self.replacement})", *KINDS), rows)

    def figure(self) -> Any:
        """The effect of every node, layer by layer."""
        title = f"What the task loses without each node ({self.replacement} ablation)"
        return self.graph.heatmap(self.effect, title, "share of the metric")


def roles_of(
    model: HookedTransformer,
    pairs: PromptPairs,
    evidence: Taxonomy,
    *,
    value: Value = "corrupted",
    nodes: Bool[Tensor, "source"] | None = None,
) -> Roles:
    """The role of each node: its label in a taxonomy and what the task loses without it.

    >>> from hooklens.plugins.heads.taxonomy import classify_heads
    >>> from hooklens.testing import induction_model
    >>> model = induction_model()
    >>> pairs = PromptPairs([[3, 1, 4, 3]], [[3, 1, 4, 5]], lambda logits: logits[:, -1, 1])
    >>> print(roles_of(model, pairs, classify_heads(model)).table(3).rows[0][:3])
    ('L1H1', 'induction', 1.0)

    `nodes` says which effects to measure (all of them by default). Effects are exact, one node at a time.
    """
    bench = Bench(model, pairs, value)
    graph = bench.graph
    labels = evidence.labels()
    if (len(labels), len(labels[0])) != (graph.n_layers, graph.n_heads):
        raise InputError(
            f"the taxonomy has {len(labels)} layers of {len(labels[0])} heads, and {model.cfg.model_name!r} has "
            f"{graph.n_layers} of {graph.n_heads}; give classify_heads(model) of this very model"
        )
    wanted = torch.ones(graph.n_sources, dtype=torch.bool) if nodes is None else nodes.clone()
    wanted[0] = False
    by_node, attention = ["embedding"], torch.zeros(graph.n_sources, len(KINDS), dtype=model.dtype)
    for layer, row in enumerate(labels):
        by_node += [*row, *(["MLP"] if graph.mlp else [])]
        above = [evidence.scores.mean(kind)[layer] - evidence.scores.uniform[kind] for kind in KINDS]
        attention[graph.heads_at(layer)] = torch.stack(above, 1).nan_to_num().to(attention)
    return Roles(
        graph=graph,
        labels=by_node,
        attention=attention,
        effect=_effects(bench, wanted),
        replacement=str(bench.replacement),
        n_pairs=bench.n_pairs,
    )


def comparable(source: Taxonomy, target: Taxonomy) -> tuple[Taxonomy, Taxonomy]:
    """Both taxonomies, without name movers where one of the two models has no labels of them."""
    if source.names is None or target.names is None:
        return replace(source, names=None), replace(target, names=None)
    return source, target


def _effects(bench: Bench, wanted: Bool[Tensor, "source"]) -> Float[Tensor, "source"]:
    bench.run(torch.zeros(bench.graph.n_edges, dtype=torch.bool))
    gap = (bench.base_per_pair - bench.empty_per_pair).cpu()
    # the mean of sizes, with the sign of the mean: no division by almost nothing where the model does not do the task
    unit = gap.abs().mean() * (-1.0 if float(gap.mean()) < 0 else 1.0)
    # the heads of a sandwich block share a norm, which in the graph is no part of a node; and what is written at z is
    # what is written at a node only if W_O commutes with it
    by_edges = bench.graph.shared_scale or not bench.replacement.linear
    falls = (_by_edges if by_edges else _by_patches)(bench, wanted).cpu()
    effects = torch.full((bench.graph.n_sources,), torch.nan, dtype=falls.dtype)
    effects[wanted] = falls / unit if float(unit) else torch.zeros_like(falls)
    return effects


def _by_edges(bench: Bench, wanted: Bool[Tensor, "source"]) -> Float[Tensor, "wanted"]:
    """The mean fall of the metric without all edges of a node, in the graph itself."""
    sources = bench.graph.ends[0]
    masks = torch.stack([sources != node for node in wanted.nonzero().flatten()])
    return (bench.base_per_pair - bench.run(masks).per_pair).mean(1)


def _by_patches(bench: Bench, wanted: Bool[Tensor, "source"]) -> Float[Tensor, "wanted"]:
    """The same by overwriting the node's output, which the sweep engine does without running the whole graph."""
    graph, model = bench.graph, bench.model
    nodes = wanted.nonzero().flatten().tolist()
    fall = torch.zeros(len(nodes), dtype=model.dtype, device=model.device)
    for site in ("z", "mlp_out"):
        rows = [i for i, node in enumerate(nodes) if graph.is_head(node) == (site == "z")]
        places = [graph.place(nodes[i]) for i in rows]
        patches = [Patch(layer, None, head if site == "z" else None) for layer, head in places]
        if not rows:
            continue
        with torch.no_grad(), packed_linears(rows=1024):
            targets = targets_of(model, bench.groups, points_of(model, site))
            for group, written in zip(bench.groups, bench.replacement.once(targets), strict=True):
                planned = plan(model, group.clean, site, written, patches=patches)
                outcome = execute(SitePatches(planned), group.of(bench.metric))
                fall[rows] += (outcome.base - outcome.values).sum(1).to(fall) / bench.n_pairs
    return fall

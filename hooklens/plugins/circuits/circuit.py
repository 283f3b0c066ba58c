"""A circuit: the kept edges, what the others carry, and how it was found; it runs, draws and saves itself."""

import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.component import Component, layer_name
from hooklens.core.envelope import Schema, read_envelope, write_envelope
from hooklens.core.errors import InputError, WrongType
from hooklens.core.files import reading
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.graph import CircuitGraph, Edges, circuit_graph
from hooklens.plugins.circuits.run import Bench, EdgeRuns, run_edges
from hooklens.results.result import Result, Table
from hooklens.sweeps.replacement import WORDS, Replacement, Value, as_replacement

_SCHEMA = Schema("hooklens.circuit", 1, "a circuit", "Circuit.save_json", as_json=True)
_DRAWN = 400  # edges; the picture of more is a smear


@dataclass(frozen=True, eq=False)
class Circuit(Result):
    """A set of edges of a model's graph, the values that all other edges carry, and the scores of its edges.

    `dropped` counts edges that were chosen but lay on no path. `found_on` holds a digest of each prompt pair that chose
    it.
    """

    ranked_by = "score"

    graph: CircuitGraph
    kept: Bool[Tensor, "edge"]
    scores: Float[Tensor, "edge"]
    method: str
    replacement: Replacement
    model_name: str
    dropped: int = 0
    found_on: list[str] = field(default_factory=list)

    @property
    def n_edges(self) -> int:
        return int(self.kept.sum())

    @property
    def edges(self) -> list[str]:
        """The names of the kept edges, in the order of the forward pass."""
        return [self.graph.name(e) for e in self.kept.nonzero().flatten().tolist()]

    @property
    def nodes(self) -> list[str]:
        """The nodes that a kept edge leaves or enters, in the order of the forward pass; key/value heads first."""
        return self._nodes(self.kept.nonzero().flatten().tolist())

    def _nodes(self, edges: list[int]) -> list[str]:
        sources, receivers = (ends[edges].unique().tolist() for ends in self.graph.ends)
        names = {self.graph.source_names[i] for i in sources}
        names |= {self.graph.receiver_names[i].partition(".")[0] for i in receivers}
        return [name for name in (*self.graph.key_heads, *self.graph.source_names) if name in names]

    @property
    def senders(self) -> list[str]:
        """The nodes that a kept edge leaves, as path patching names senders."""
        sources = self.graph.ends[0][self.kept.cpu()].unique().tolist()
        return [self.graph.source_names[i] for i in sources]

    @property
    def receivers(self) -> list[str]:
        """What kept edges end in, as path patching names receivers."""
        receivers = self.graph.ends[1][self.kept.cpu()].unique().tolist()
        return [self.graph.receiver_names[i] for i in receivers]

    def run(
        self,
        model: HookedTransformer,
        clean: Prompts | PromptPairs,
        corrupted: Prompts | None = None,
        metric: Any = None,
    ) -> EdgeRuns:
        """The metric when only this circuit's edges carry live values, beside that of the model and of no edge."""
        self.check(model)
        return run_edges(model, self.kept, clean, corrupted, metric, value=self.replacement)

    def bench(
        self,
        model: HookedTransformer,
        clean: Prompts | PromptPairs,
        corrupted: Prompts | None = None,
        metric: Any = None,
        *,
        group: Int[Tensor, "pair"] | None = None,
    ) -> Bench:
        """The prompts ready for many runs of this circuit, of its parts and of circuits like it."""
        self.check(model)
        return Bench(model, as_pairs(model, clean, corrupted, metric, group), self.replacement, keep=True)

    def check(self, model: HookedTransformer) -> None:
        """Does the model have this circuit's nodes?"""
        graph = circuit_graph(model)
        if graph.shape != self.graph.shape:
            raise InputError(
                f"this circuit was found on {self.model_name!r} with {_words(self.graph)}; the model "
                f"{model.cfg.model_name!r} has {_words(graph)}, so its edges are others; load a model of that shape"
            )

    def without(self, edges: Edges) -> "Circuit":
        """The circuit with these edges cut."""
        kept = self.kept & ~self.graph.mask(edges).to(self.kept.device)
        return replace(self, kept=kept, scores=torch.where(kept, self.scores, 0.0))

    def order(self) -> list[int]:
        """The kept edges, the largest score first, whatever its sign."""
        chosen = self.kept.nonzero().flatten()
        return chosen[self.scores[chosen].abs().argsort(descending=True, stable=True)].tolist()

    def table(self, n: int | None = 20) -> Table:
        """The kept edges by score."""
        return Table(("edge", "score"), [(self.graph.name(e), float(self.scores[e])) for e in self.order()[:n]])

    def figure(self) -> Any:
        """The circuit, embedding below and logits on top: blue edges raise the metric, orange ones lower it."""
        from hooklens.viz.circuit_drawing import layered_graph

        drawn, names = self.order()[:_DRAWN], self.graph.source_names
        sources, receivers = (ends[drawn].tolist() for ends in self.graph.ends)
        arrows = [
            (names[a], self.graph.receiver_names[b], float(self.scores[e]))
            for a, b, e in zip(sources, receivers, drawn, strict=True)
        ]
        more = f", the {_DRAWN} largest" if self.n_edges > _DRAWN else ""
        title = f"{self.n_edges} of {self.graph.n_edges} edges{more} ({self.method}, {self.replacement} ablation)"
        named = set(self._nodes(drawn))
        # key/value heads, each with the heads that read it
        ties = [(key, names[head]) for key, heads in self.graph.key_heads.items() for head in heads]
        return layered_graph(self._rows(named), arrows, title, ties=[tie for tie in ties if named.issuperset(tie)])

    def _rows(self, named: set[str]) -> dict[str, list[str]]:
        """The named nodes, layer by layer from the embedding up; key/value heads stand under their heads."""
        graph = self.graph
        rows, keyed, n = {"embed": ["embed"]}, list(graph.key_heads), graph.n_kv_heads
        for layer in range(graph.n_layers):
            name, mlp = layer_name(layer), Component("mlp", layer).name
            rows[f"{name} keys, values"] = keyed[n * layer : n * (layer + 1)]
            rows[f"{name} heads"] = graph.source_names[graph.heads_at(layer)]
            rows[mlp] = [mlp]
        chosen = {label: [name for name in names if name in named] for label, names in rows.items()}
        return {label: names for label, names in chosen.items() if names} | {"logits": ["logits"]}

    # -- files

    def save_json(self, path: str | os.PathLike) -> Path:
        """Write the circuit as JSON that other programs can read: edges by name with their scores."""
        content = {
            "model": self.model_name,
            "graph": asdict(self.graph),
            "method": self.method,
            "ablation": str(self.replacement),
            "dropped": self.dropped,
            "found_on": self.found_on,
            "edges": {self.graph.name(e): float(self.scores[e]) for e in self.kept.nonzero().flatten().tolist()},
        }
        write_envelope(path, _SCHEMA, content)
        return Path(path)

    @classmethod
    def load_json(cls, path: str | os.PathLike, *, value: Value | None = None) -> "Circuit":
        """Read a file of `save_json`. A foreign or damaged file is refused; `run` refuses a model of another shape.

        The file has the name of the replacement only: give `value` if that is not a word, as "mean of reference".
        """
        content = read_envelope(path, _SCHEMA).content
        with reading(path, _SCHEMA.what):
            graph = CircuitGraph(*(content["graph"][part.name] for part in fields(CircuitGraph)))
            numbers = graph.numbers(list(content["edges"]))
            if len(set(numbers)) != len(numbers):
                raise ValueError("an edge occurs twice")
            scores = torch.zeros(graph.n_edges, dtype=torch.float64)
            scores[numbers] = torch.tensor([float(score) for score in content["edges"].values()], dtype=torch.float64)
            if not scores.isfinite().all():
                raise ValueError("a score is not finite")
            written = str(content["ablation"])
            if value is None and written not in WORDS:
                raise ValueError(f"its cut edges carry {written!r:.40}, and it has only that name: give value=")
            return cls(
                graph=graph,
                kept=graph.mask(numbers),
                scores=scores,
                method=str(content["method"]),
                replacement=as_replacement(written if value is None else value),
                model_name=str(content["model"]),
                dropped=int(content["dropped"]),
                found_on=[str(mark) for mark in content["found_on"]],
            )


def circuit_of(
    model: HookedTransformer, edges: Edges, *, value: Value = "corrupted", method: str = "by hand"
) -> Circuit:
    """The circuit of exactly these edges, by name, by number or as a mask with True or False for every edge.

    Edges that are not on a path from the embedding to the logits are kept too.

    >>> from hooklens.testing import tiny_model
    >>> circuit_of(tiny_model(), ["embed->L0H1.v", "L0H1->logits"]).nodes
    ['embed', 'L0H1']
    """
    graph = circuit_graph(model)
    kept = graph.mask(edges)
    return Circuit(graph, kept, kept.to(model.dtype), method, as_replacement(value), model_name=model.cfg.model_name)


def whole_circuit(model: HookedTransformer, *, value: Value = "corrupted") -> Circuit:
    """The circuit of every edge of the model, from which pruning starts."""
    graph = circuit_graph(model)
    return circuit_of(model, range(graph.n_edges), value=value, method="all edges")


def need_circuit(circuit: Any, asker: str) -> None:
    """Raise for anything except a Circuit.

    >>> need_circuit(["L0H0->logits"], "pruning")
    Traceback (most recent call last):
    hooklens.core.errors.WrongType: pruning needs a Circuit, got list; circuit_of(model, edges) makes one from ...
    """
    if not isinstance(circuit, Circuit):
        raise WrongType(
            f"{asker} needs a Circuit, got {type(circuit).__name__}; circuit_of(model, edges) makes one from names, "
            "numbers or a mask of edges, and scores.top_edges(n) from scores"
        )


def _words(graph: CircuitGraph) -> str:
    keyed = "" if graph.group == 1 else f" ({graph.n_kv_heads} for keys and values)"
    mlp = "no MLPs"
    if graph.mlp:
        mlp = "parallel MLPs" if graph.parallel else "MLPs"
    return f"{graph.n_layers} layers of {graph.n_heads} heads{keyed}, {mlp}"

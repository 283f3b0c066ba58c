"""How faithful is a circuit, beside random ones of its make, and how does that grow with its size?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.circuit_metrics import LEAST_DRAWS, Faithfulness, check_draws, measured
from hooklens.plugins.circuits.curve import FaithfulnessCurve, curve_of
from hooklens.plugins.circuits.edge_attribution import demo_circuit
from hooklens.plugins.circuits.edge_scores import EdgeScores
from hooklens.plugins.circuits.run import Bench

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def measure_faithfulness(
    model: "HookedTransformer",
    circuit: Circuit,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    group: Int[Tensor, "pair"] | None = None,
    draws: int = LEAST_DRAWS,
    seed: int = 0,
) -> Faithfulness:
    """How much of what the model does is left when only the circuit's edges are live, and how much would be by chance?

    Give prompts that the circuit was not found on. `group` says which pairs share names or a sentence: intervals
    resample whole groups. Random circuits have as many edges between the same layers and kinds, on whole paths.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.random.shape, 0 < found.p <= 1, str(found.replacement)
    (torch.Size([100]), True, 'corrupted')

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 4; Hanna et al. (2024), "Have Faith in
    Faithfulness", section 2 (normalised).
    """
    check_draws(draws)
    circuit.check(model)
    bench = Bench(model, as_pairs(model, clean, corrupted, metric, group), circuit.replacement, keep=True)
    return measured(bench, circuit, draws, seed)


def trace_faithfulness(
    model: "HookedTransformer",
    scores: EdgeScores,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    sizes: Sequence[int] | None = None,
    group: Int[Tensor, "pair"] | None = None,
    draws: int = LEAST_DRAWS,
) -> FaithfulnessCurve:
    """How does faithfulness grow with the number of edges that the scores let in, and what would chance give?

    Circuits of at most these `sizes` are grown from the logits (`scores.greedy_edges`). Without `sizes`: from 0.2 % to
    half of the edges.

    Reference: Hanna et al. (2024), "Have Faith in Faithfulness", section 4; Mueller et al. (2025), "MIB", section 3.
    """
    check_draws(draws)
    wanted = [max(1, round(share * scores.graph.n_edges)) for share in _SHARES] if sizes is None else list(sizes)
    circuits = {circuit.n_edges: circuit for circuit in map(scores.greedy_edges, sorted(wanted)) if circuit.n_edges}
    if not circuits:
        raise InputError(
            f"no circuit of at most {max(wanted)} edges reaches from the embedding to the logits; take larger sizes"
        )
    circuits[next(iter(circuits))].check(model)
    bench = Bench(model, as_pairs(model, clean, corrupted, metric, group), scores.replacement, keep=True)
    return curve_of(bench, scores, [circuits[n] for n in sorted(circuits)], draws)


def demo(model: "HookedTransformer") -> Faithfulness:
    """A few edges found on two short prompt pairs, evaluated on two others; numbers without a tokenizer."""
    pairs = demo_pairs(model, 4)
    return measure_faithfulness(model, demo_circuit(model, pairs[:2]), pairs[2:])

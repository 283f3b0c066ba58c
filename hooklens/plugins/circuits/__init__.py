"""Circuits: which edges between heads, MLPs, embedding and logits carry a behaviour, and how well they do so alone."""

from hooklens.plugins.circuits.circuit import Circuit, circuit_of, whole_circuit
from hooklens.plugins.circuits.circuit_transfer import CircuitTransfer, transfer_circuit
from hooklens.plugins.circuits.completeness import Completeness
from hooklens.plugins.circuits.curve import FaithfulnessCurve, trace_faithfulness
from hooklens.plugins.circuits.discovery import Discovery, acdc, acdc_nodes
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.edge_scores import EdgeScores
from hooklens.plugins.circuits.evaluation import CircuitEvaluation, evaluate_circuit
from hooklens.plugins.circuits.faithfulness import Faithfulness, measure_faithfulness
from hooklens.plugins.circuits.graph import CircuitGraph, circuit_graph
from hooklens.plugins.circuits.integrated_edges import eap_ig, eap_ig_activations, eap_ig_midpoint, eap_ig_own_source
from hooklens.plugins.circuits.matching import Matching
from hooklens.plugins.circuits.minimality import Minimality
from hooklens.plugins.circuits.pruning import Pruning, prune_edges, prune_edges_below, prune_nodes, prune_nodes_below
from hooklens.plugins.circuits.random_draws import random_circuits
from hooklens.plugins.circuits.roles import Roles
from hooklens.plugins.circuits.run import EdgeRuns, run_edges

__all__ = [
    "Circuit",
    "CircuitEvaluation",
    "CircuitGraph",
    "CircuitTransfer",
    "Completeness",
    "Discovery",
    "EdgeRuns",
    "EdgeScores",
    "Faithfulness",
    "FaithfulnessCurve",
    "Matching",
    "Minimality",
    "Pruning",
    "Roles",
    "acdc",
    "acdc_nodes",
    "circuit_graph",
    "circuit_of",
    "eap",
    "eap_ig",
    "eap_ig_activations",
    "eap_ig_midpoint",
    "eap_ig_own_source",
    "evaluate_circuit",
    "measure_faithfulness",
    "prune_edges",
    "prune_edges_below",
    "prune_nodes",
    "prune_nodes_below",
    "random_circuits",
    "run_edges",
    "trace_faithfulness",
    "transfer_circuit",
    "whole_circuit",
]

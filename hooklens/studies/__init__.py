"""Studies: several methods combined on your own prompts, with claims and a report. The command line calls them."""

from hooklens.plugins.algorithmic.cost_table import join_costs
from hooklens.studies.chosen_heads import choose_heads
from hooklens.studies.circuit_study import CircuitStudy, study_circuit
from hooklens.studies.claims import zero_heads
from hooklens.studies.grokking_page import grokking_report, seeds_table
from hooklens.studies.grokking_runs import grok, train_recipe
from hooklens.studies.grokking_study import GrokkingStudy, study_grokked_model, study_grokking
from hooklens.studies.head_study import HeadStudy, study_heads
from hooklens.studies.heads_page import taxonomy_report
from hooklens.studies.icl_errors import ErrorsByLength, measure_errors
from hooklens.studies.icl_runs import study_runs, train_planned
from hooklens.studies.icl_study import ICLStudy, study_in_context
from hooklens.studies.ioi_study import IOIStudy, study_ioi
from hooklens.studies.lens_study import LensStudy, study_lens
from hooklens.studies.pages import transfer_report
from hooklens.studies.pair_study import PairStudy, study_pair
from hooklens.studies.parsimony_study import Parsimony, compare_parsimony, sweep_parsimony
from hooklens.studies.probe_page import probe_report
from hooklens.studies.result_claims import causal_claims, mover_claims, steering_claims, taxonomy_claims

__all__ = [
    "CircuitStudy",
    "ErrorsByLength",
    "GrokkingStudy",
    "HeadStudy",
    "ICLStudy",
    "IOIStudy",
    "LensStudy",
    "PairStudy",
    "Parsimony",
    "causal_claims",
    "choose_heads",
    "compare_parsimony",
    "grok",
    "grokking_report",
    "join_costs",
    "measure_errors",
    "mover_claims",
    "probe_report",
    "seeds_table",
    "steering_claims",
    "study_circuit",
    "study_grokked_model",
    "study_grokking",
    "study_heads",
    "study_in_context",
    "study_ioi",
    "study_lens",
    "study_pair",
    "study_runs",
    "sweep_parsimony",
    "taxonomy_claims",
    "taxonomy_report",
    "train_planned",
    "train_recipe",
    "transfer_report",
    "zero_heads",
]

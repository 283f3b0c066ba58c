"""Attention heads: where each attends, what it writes, its causal effect, and the labels that the evidence supports."""

from hooklens.plugins.heads.composition import Composition, score_composition
from hooklens.plugins.heads.copy_suppression import CopySuppression, score_copy_suppression
from hooklens.plugins.heads.copying import Copying, score_copying
from hooklens.plugins.heads.head_scores import HeadScores, score_heads
from hooklens.plugins.heads.induction import InductionHeads, find_induction_heads
from hooklens.plugins.heads.knockout import Knockout, knock_out_keys
from hooklens.plugins.heads.mediation import Mediation, measure_mediation
from hooklens.plugins.heads.mover_result import Criteria, NameMovers
from hooklens.plugins.heads.name_movers import find_name_movers
from hooklens.plugins.heads.previous_token import PositionScores, score_positions
from hooklens.plugins.heads.redundancy import Redundancy, measure_redundancy
from hooklens.plugins.heads.taxonomy import Taxonomy, classify_heads

__all__ = [
    "Composition",
    "CopySuppression",
    "Copying",
    "Criteria",
    "HeadScores",
    "InductionHeads",
    "Knockout",
    "Mediation",
    "NameMovers",
    "PositionScores",
    "Redundancy",
    "Taxonomy",
    "classify_heads",
    "find_induction_heads",
    "find_name_movers",
    "knock_out_keys",
    "measure_mediation",
    "measure_redundancy",
    "score_composition",
    "score_copy_suppression",
    "score_copying",
    "score_heads",
    "score_positions",
]

"""Attention heads: where each attends, what it writes, its causal effect, and the labels that the evidence supports."""

from hooklens.plugins.heads.composition import Composition, composition
from hooklens.plugins.heads.copy_suppression import CopySuppression, copy_suppression
from hooklens.plugins.heads.copying import Copying, copying
from hooklens.plugins.heads.induction import InductionHeads, induction_heads
from hooklens.plugins.heads.knockout import Knockout, knockout
from hooklens.plugins.heads.mediation import Mediation, mediation
from hooklens.plugins.heads.mover_result import Criteria, NameMovers
from hooklens.plugins.heads.name_movers import name_movers
from hooklens.plugins.heads.previous_token import PositionScores, position_scores
from hooklens.plugins.heads.redundancy import Redundancy, redundancy
from hooklens.plugins.heads.scores import HeadScores, head_scores
from hooklens.plugins.heads.taxonomy import Taxonomy, taxonomy

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
    "composition",
    "copy_suppression",
    "copying",
    "head_scores",
    "induction_heads",
    "knockout",
    "mediation",
    "name_movers",
    "position_scores",
    "redundancy",
    "taxonomy",
]

"""Attention heads: what each looks at, what it writes, what it does, and the labels that evidence allows."""

from hooklens.plugins.heads.composition import Composition, composition
from hooklens.plugins.heads.copy_suppression import CopySuppression, copy_suppression
from hooklens.plugins.heads.copying import Copying, copying
from hooklens.plugins.heads.head_study import HeadStudy, head_study
from hooklens.plugins.heads.induction import InductionHeads, induction_heads
from hooklens.plugins.heads.knockout import Knockout, knockout
from hooklens.plugins.heads.mediation import Mediation, mediation
from hooklens.plugins.heads.previous_token import PositionScores, position_scores
from hooklens.plugins.heads.redundancy import Redundancy, redundancy
from hooklens.plugins.heads.scores import HeadScores, head_scores
from hooklens.plugins.heads.taxonomy import Taxonomy, taxonomy

__all__ = [
    "Composition",
    "CopySuppression",
    "Copying",
    "HeadScores",
    "HeadStudy",
    "InductionHeads",
    "Knockout",
    "Mediation",
    "PositionScores",
    "Redundancy",
    "Taxonomy",
    "composition",
    "copy_suppression",
    "copying",
    "head_scores",
    "head_study",
    "induction_heads",
    "knockout",
    "mediation",
    "position_scores",
    "redundancy",
    "taxonomy",
]

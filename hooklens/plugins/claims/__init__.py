"""What was seen, what was changed, what happened beside a control: claims that say how much they may say."""

from hooklens.plugins.claims.claim import Claim, claim
from hooklens.plugins.claims.family import ClaimFamily, family, plans_met
from hooklens.plugins.claims.held_out import HeldOutEffects, held_out_top
from hooklens.plugins.claims.measured import Measured, metric_name
from hooklens.plugins.claims.registration import Registration, read_plans

__all__ = [
    "Claim",
    "ClaimFamily",
    "HeldOutEffects",
    "Measured",
    "Registration",
    "claim",
    "family",
    "held_out_top",
    "metric_name",
    "plans_met",
    "read_plans",
]

"""Claims: an observation, an intervention and its control, and a verdict on what they show."""

from hooklens.results.claims.claim_family import ClaimFamily, check_plans, family, plans_met
from hooklens.results.claims.held_out import HeldOutEffects, held_out_top
from hooklens.results.claims.measured import Measured, metric_name
from hooklens.results.claims.registration import Registration, read_plans
from hooklens.results.claims.single_claim import Claim, claim

__all__ = [
    "Claim",
    "ClaimFamily",
    "HeldOutEffects",
    "Measured",
    "Registration",
    "check_plans",
    "claim",
    "family",
    "held_out_top",
    "metric_name",
    "plans_met",
    "read_plans",
]

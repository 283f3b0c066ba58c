"""Claims of name movers: named on one half of the pairs, measured on the other."""

import pytest

from hooklens.core.errors import InputError
from hooklens.plugins.patching.mover_claims import demo_movers, mover_claims, of_pairs
from hooklens.testing import tiny_model


def test_a_planted_mover_is_claimed_on_pairs_that_did_not_name_it():
    movers = demo_movers(16)
    claims = mover_claims(tiny_model(), movers)
    (found,) = claims.claims
    assert found.statement.startswith("L0H0 moves") and found.causal and found.status == "exploratory"
    assert len(found.intervention.per_prompt) == 8
    assert 0.25 < found.intervention.mean < 0.35 and abs(found.control.mean) < 0.05


def test_no_mover_no_claim_and_too_few_groups_are_refused():
    movers = demo_movers(16)
    movers.margin.zero_()
    assert mover_claims(tiny_model(), movers) is None
    with pytest.raises(InputError, match="4 groups of pairs, got 3"):
        mover_claims(tiny_model(), demo_movers(3))


def test_some_pairs_keep_the_measurements_of_the_model():
    part = of_pairs(demo_movers(8), demo_movers(8).group[:3])
    assert part.direct.shape[0] == len(part.group) == 3 and part.rank.shape[0] == 3

"""Claims of name movers: named on one half of the pairs, measured on the other."""

from dataclasses import replace

import pytest
import torch
from planted_movers import demo_movers

from hooklens.core.errors import InputError
from hooklens.plugins.heads.mover_result import of_pairs
from hooklens.plugins.heads.name_movers import _of_other_names, demo
from hooklens.studies.result_claims import mover_claims
from hooklens.testing import tiny_model


def test_a_planted_mover_is_claimed_on_pairs_that_did_not_name_it():
    movers = demo_movers(16)
    assert movers.name_movers == [(0, 0)]
    claims = mover_claims(tiny_model(), movers)
    (found,) = claims.claims
    assert found.statement.startswith("L0H0 moves") and found.causal and found.status == "exploratory"
    assert len(found.intervention.per_prompt) == 8
    assert 0.25 < found.intervention.mean < 0.35 and abs(found.control.mean) < 0.05


def test_no_mover_no_claim_and_too_few_groups_are_refused():
    movers = demo_movers(16)
    movers.margin.zero_()
    assert mover_claims(tiny_model(), movers) is None
    with pytest.raises(InputError, match="two halves of 6 groups of pairs need 12, got 11"):
        mover_claims(tiny_model(), demo_movers(11))


def test_some_pairs_keep_the_measurements_of_the_model():
    part = of_pairs(demo_movers(8), demo_movers(8).group[:3])
    assert part.direct.shape[0] == len(part.group) == 3 and part.rank.shape[0] == 3


def test_heads_are_called_by_the_names_of_their_own_half():
    """The copying criterion once held the names of both halves, so that those that report had a say in the choice."""
    movers = demo_movers(6)
    movers.rank[2] = 90  # the name of pairs 2 and 5 is not copied
    part = of_pairs(movers, torch.tensor([2, 5]))
    assert part.name.tolist() == [0, 0] and part.rank.shape[0] == 1 and part.written.shape == (1, 1, 2, 1)
    assert float(part.copying[0, 0]) == 0 and float(of_pairs(movers, torch.tensor([0, 1])).copying[0, 0]) == 1


def test_a_head_that_does_as_much_with_another_pairs_output_is_not_causal():
    """Against the mean of other heads, about 0, any head with a direct effect would pass."""
    movers = demo_movers(16)
    same = replace(movers, placebo=movers.direct.clone())
    (found,) = mover_claims(tiny_model(), same).claims
    assert not found.causal and "does not exceed the control's" in " ".join(found.lacks)


def test_the_placebo_is_the_heads_output_of_a_pair_with_other_names():
    names = torch.tensor([[1, 2], [2, 1], [3, 4], [4, 1]])
    other = _of_other_names(*names.T)
    assert other[:2].tolist() == [2, 2] and int(other[2]) in (0, 1) and int(other[3]) == 3  # none without 4 and 1
    found = demo(tiny_model(dtype=torch.float64, d_vocab=24))
    assert found.placebo.shape == found.direct.shape and bool(found.placebo.isfinite().all())
    assert not torch.allclose(found.placebo, found.direct)

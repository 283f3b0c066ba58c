"""Many edits in one batch are those edits one by one, and a few of them are checked."""

import pytest
import torch

import hooklens as hl
from hooklens.core.errors import CheckFailed, InputError
from hooklens.sweeps.many_edits import Edits, run_edits
from hooklens.sweeps.settings import engine
from hooklens.testing import tiny_model

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
SHIFTS = torch.tensor([0.0, 0.5, -1.0, 2.0, 3.0], dtype=torch.float64)


def added(index, shifts=SHIFTS):
    return [(("resid_post", 0), lambda act, hook: act + shifts[index][:, None, None] * act.sin())]


def values_under(model, hooks, metric):
    return run_edits(model, [(Edits(len(SHIFTS), hooks, 0), TOKENS, metric)], title="edits")[0].values


def own(logits):
    return logits.log_softmax(-1)[:, :, 3].mean(1)


@pytest.mark.parametrize("memory", [1, 2**28])
@pytest.mark.parametrize("reads", [True, False])
def test_they_are_the_edits_one_by_one(memory, reads):
    model = tiny_model(n_layers=3, dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4) if reads else own
    with engine(memory=memory):
        values = values_under(model, added, metric)
    for number, row in enumerate(values):
        hooks = added(torch.full((2,), number))
        with torch.no_grad():
            assert torch.allclose(row, metric(model.run_with_hooks(TOKENS, fwd_hooks=hooks)), rtol=1e-12)


def test_hooks_that_depend_on_the_batch_are_noticed():
    model = tiny_model(dtype=torch.float64)

    def crowded(index):
        return [(("resid_post", 0), lambda act, hook: act + len(index) * act.sin())]

    with pytest.raises(CheckFailed, match=r"edit [0-4].* differs by"):
        values_under(model, crowded, own)


def test_an_edit_that_leaves_no_finite_metric_is_refused():
    model = tiny_model(dtype=torch.float64)
    with pytest.raises(InputError, match="NaN under an edit"):
        values_under(model, lambda index: added(index, torch.full((5,), torch.inf)), own)

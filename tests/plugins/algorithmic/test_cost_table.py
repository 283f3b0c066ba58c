"""FLOPs: the formula, torch's counter, and counts by hand."""

import pytest
import torch
from model.zoo import ZOO, vector_model, zoo_model
from refused import refused
from torch import nn

from hooklens.core.errors import HooklensError
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.cost_table import CostTable, MeasuredModel, compare_costs, count_flops
from hooklens.plugins.algorithmic.icl.constructions import construct_descent
from hooklens.plugins.algorithmic.icl.learners import GradientDescent
from hooklens.testing import tiny_model

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


def measured(model, inputs=TOKENS, **changes):
    parts = {"name": "m", "model": model, "inputs": inputs, "measure": "MSE", "value": 0.5, "implements": "a sum"}
    return MeasuredModel(**parts | changes)


def test_one_step_of_descent_counted_by_hand():
    """d_in = d_model = d_head = 3, n = 6: embedding, q k v o, scores, z, and one output."""
    model, vectors = construct_descent(GradientDescent(1.0), 2, 5), torch.zeros(4, 6, 3)
    (cost,) = compare_costs([measured(model, vectors)]).costs
    by_hand = 5 * 2 * 6 * 3 * 3 + 2 * 2 * 6 * 6 * 3 + 2 * 6 * 3
    assert cost.flops == cost.counted == cost.written_out == by_hand and cost.difference == ""


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_formula_is_torchs_count_with_attention_written_out(name):
    (cost,) = compare_costs([measured(zoo_model(name))]).costs
    assert cost.written_out == cost.flops and cost.counted in (cost.flops, cost.flops - cost.attention)
    assert bool(cost.difference) == (cost.counted != cost.flops)


def test_other_modules_have_a_count_alone_and_the_table_keeps(tmp_path):
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    rows = [measured(net, torch.zeros(3, 5)), measured(vector_model(), torch.zeros(1, 4, 3), measure="accuracy")]
    table = compare_costs(rows)
    assert table.costs[0].counted == 2 * (5 * 7 + 7 * 2) and table.costs[0].flops is None
    assert "HookedTransformer" in table.costs[0].difference and len(table.formulas()) == 2 and table.figure().data
    table.save(tmp_path / "costs")
    assert CostTable.load(tmp_path / "costs").table().rows == table.table().rows


def test_what_the_counter_sees_beyond_the_formula_is_said():
    class Twice(HookedTransformer):
        def forward(self, tokens):
            return super().forward(super().forward(tokens).argmax(-1))

    (cost,) = compare_costs([measured(Twice(tiny_model().cfg))]).costs
    assert cost.difference == f"{cost.flops} operations more than the formula, also unfused"


def test_bad_rows_are_refused():
    for rows, message in (
        ([], "at least one MeasuredModel"),
        ([("a", tiny_model())], r"takes MeasuredModel\(name, model"),
        ([measured(tiny_model(), measure="loss")], "no measure named 'loss'"),
        ([measured(tiny_model(), value=float("nan"))], "value is a finite number"),
    ):
        with refused(HooklensError, message):
            compare_costs(rows)
    assert count_flops(nn.Linear(2, 2, bias=False), torch.zeros(1, 2)) == 8


def test_inputs_without_rows_or_positions_failed_at_an_index():
    for inputs in (TOKENS[0], TOKENS.tolist(), TOKENS[:0]):
        with refused(HooklensError, r"at least one row, \[batch pos"):
            compare_costs([measured(tiny_model(), inputs)])
    assert len(compare_costs(measured(tiny_model())).costs) == 1


def test_counting_drew_from_the_global_generator():
    net, state = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5).eval()), torch.get_rng_state()
    net[0].train()
    count_flops(nn.Dropout(0.5), torch.zeros(1, 3))
    compare_costs([measured(net, torch.zeros(1, 3))])
    assert torch.equal(state, torch.get_rng_state()) and net[0].training and not net[1].training

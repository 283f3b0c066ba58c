"""A study of one's own pairs: what is found on one half is judged on the other, in full where asked."""

import pytest
import torch

from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.results.statistics import halves
from hooklens.studies.circuit_study import CircuitStudy, study_circuit
from hooklens.testing import tiny_model


@pytest.fixture(scope="module")
def studies():
    model = tiny_model(dtype=torch.float64)
    pairs = demo_pairs(model, 8)
    with torch.no_grad():
        raised = (model(pairs.clean) - model(pairs.corrupted))[:, -1]
    answers = {"answer": raised.argmax(1), "wrong_answer": raised.argmin(1)}
    pairs = PromptPairs(pairs.clean, pairs.corrupted, group=torch.arange(8) // 2, **answers)
    return study_circuit(model, pairs, edges=16), study_circuit(model, pairs, edges=16, full=True)


@pytest.mark.slow
def test_a_full_study_judges_the_same_circuit_on_the_same_pairs(studies):
    short, full = studies
    assert short.evaluation is None and short.curve is None
    assert full.circuit.edges == short.circuit.edges and full.faithfulness.value == short.faithfulness.value
    assert full.faithfulness.p == short.faithfulness.p
    curve = full.curve
    at = curve.sizes.tolist().index(full.circuit.n_edges)  # the study's circuit is a point of its curve
    assert float(curve.values[at]) == pytest.approx(full.faithfulness.value)
    assert curve.n_seen == full.faithfulness.n_seen == 0 and full.held_out
    assert curve.sizes.tolist() == sorted(curve.sizes.tolist()) and int(curve.sizes[-1]) > full.circuit.n_edges


def test_a_full_study_s_table_and_page_hold_completeness_minimality_and_the_area(studies):
    short, full = studies
    rows, others = dict(full.table().rows), dict(short.table().rows)
    assert rows[f"area under the curve, up to {int(full.curve.sizes[-1])} edges"] == full.curve.area
    assert rows["area: p"] == full.curve.p and rows["completeness: p"] == full.evaluation.completeness.p
    assert "edges that may be worth nothing" in rows and not {"area: p", "completeness: p"} & others.keys()
    assert others.items() <= rows.items()
    full_page, short_page = full.report().to_html(), short.report().to_html()
    for heading in ("By size", "Completeness", "Minimality"):
        assert heading in full_page and heading not in short_page


def test_a_full_study_loads_back(studies, tmp_path):
    for study in studies:
        study.save(tmp_path / "study.safetensors")
        back = CircuitStudy.load(tmp_path / "study.safetensors")
        assert dict(back.table().rows).items() == dict(study.table().rows).items()


def test_where_the_pairs_show_no_difference_a_full_study_says_so():
    model = tiny_model()
    pairs = demo_pairs(model, 4)
    clean, other = pairs.clean, pairs.corrupted
    answers = {"answer": [1, 2, 3, 4], "wrong_answer": [5, 6, 7, 8]}
    with pytest.raises(InputError, match="clean and corrupted are the same tokens"):
        study_circuit(model, PromptPairs(clean, clean, **answers), edges=9)
    searched = set(halves(4, group=torch.arange(4), seed=0)[0].tolist())
    corrupted = [other[i] if i in searched else clean[i] for i in range(4)]  # no difference where it is tested
    pairs = PromptPairs(clean, corrupted, **answers)
    found = study_circuit(model, pairs, full=True, edges=9)
    rows = dict(found.table().rows)
    assert not found.faithfulness.defined and rows["area: p"] != rows["area: p"]
    assert rows["edges that may be worth nothing"] is None
    assert len(found.report().to_html()) > 0 and len(str(found.table())) > 0

"""Lenses on prompts of one's own: everything that they say is what the methods say one by one."""

import torch

from hooklens.plugins.lens import direct_logit_attribution, logit_lens, trace_predictions
from hooklens.studies import study_lens
from hooklens.testing import induction_model, tiny_model

PROMPTS = [[3, 1, 4, 3], [5, 2, 6, 5], [7, 9, 8, 7], [1, 3, 2, 5, 1]]
ANSWERS = [1, 2, 9, 3]


def test_its_parts_are_the_methods_and_groups_reach_their_intervals():
    model, group = tiny_model(), torch.tensor([4, 4, 2, 1])
    study = study_lens(model, PROMPTS, answer=ANSWERS, wrong_answer=5, group=group, shown=2)
    parts = direct_logit_attribution(model, PROMPTS, answer=ANSWERS, wrong_answer=5, group=group)
    assert torch.equal(study.attribution.components, parts.components)
    assert torch.equal(study.trajectory.rank, trace_predictions(model, PROMPTS, answer=ANSWERS, wrong_answer=5).rank)
    assert torch.equal(study.lenses[1].rank, logit_lens(model, PROMPTS[1:2]).rank) and len(study.lenses) == 2
    plain = direct_logit_attribution(model, PROMPTS, answer=ANSWERS, wrong_answer=5)
    for one, other in zip(parts.interval(parts.components), plain.interval(plain.components), strict=True):
        assert not torch.equal(one, other)
    assert "the first 2 of 4 prompts" in study.report().to_html()


def test_components_are_reported_on_prompts_that_did_not_choose_them():
    study = study_lens(tiny_model(), PROMPTS, answer=ANSWERS, group=torch.tensor([0, 0, 1, 2]))
    chosen, reported = (set(x.tolist()) for x in (study.held_out.chosen_on, study.held_out.reported_on))
    assert chosen | reported == {0, 1, 2, 3} and not chosen & reported and len({0, 1} & chosen) != 1
    name, told = study.table(1).rows[0][:2]
    at = study.attribution.labels.index(name)
    assert abs(told - float(study.attribution.components[sorted(reported), at].mean())) < 1e-5


def test_one_group_of_several_prompts_has_no_interval():
    study = study_lens(tiny_model(), PROMPTS, answer=ANSWERS, group=torch.zeros(4, dtype=torch.long))
    assert study.held_out is None and "95% low" not in study.table().columns
    assert "the first rows are biased upwards." in study.report().to_html()


def test_without_answers_each_prompt_has_its_own():
    study = study_lens(induction_model(), PROMPTS)
    assert study.trajectory.answer == [str(answer) for answer in ANSWERS]
    assert [row[-1] for row in study.prompt_table().rows] == ["final_post"] * 4

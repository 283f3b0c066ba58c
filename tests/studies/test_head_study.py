"""Heads on pairs of one's own: held to plain hooked runs, chosen on one half and reported on the other."""

import torch

import hooklens as hl
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.studies import study_heads
from hooklens.testing import induction_model, tiny_model

CLEAN = [[3, 1, 4, 3], [5, 2, 6, 5], [7, 9, 8, 7], [6, 3, 2, 6, 3, 6]]
CORRUPTED = [[0, *row[1:]] for row in CLEAN]
PAIRS = PromptPairs(CLEAN, CORRUPTED, answer=[1, 2, 9, 3], wrong_answer=[4, 6, 8, 2], group=["a", "a", "b", "c"])


def test_a_fall_is_that_of_a_plain_hooked_run():
    model = tiny_model(dtype=torch.float64)
    found = study_heads(model, PAIRS)
    for i, (clean, corrupted) in enumerate(zip(PAIRS.clean, PAIRS.corrupted, strict=True)):
        metric = hl.logit_diff(model, answer=PAIRS.answer[i], wrong_answer=PAIRS.wrong_answer[i])
        whole, (_, cache) = metric(model([clean])), model.run_with_cache([corrupted], "z")
        for layer in range(2):
            for head in range(2):

                def write(z, hook, head=head, other=cache["z", layer]):
                    z[:, :, head] = other[:, :, head]
                    return z

                fall = whole - metric(model.run_with_hooks([clean], fwd_hooks=[(("z", layer), write)]))
                torch.testing.assert_close(found.fall[i, layer, head], fall[0], atol=1e-10, rtol=0)


def test_heads_are_reported_on_pairs_that_did_not_choose_them():
    found = study_heads(induction_model(), PAIRS)
    chosen, reported = (set(x.tolist()) for x in (found.held_out.chosen_on, found.held_out.reported_on))
    assert chosen | reported == {0, 1, 2, 3} and not chosen & reported and len({0, 1} & chosen) != 1
    told = dict(zip(found.held_out.names, found.held_out.mean[0].tolist(), strict=True))
    assert abs(told["L1H1"] - float(found.fall[sorted(reported), 1, 1].mean())) < 1e-5
    assert found.to_answer[:3, 1, 1].tolist() == [1.0] * 3 and float(found.to_wrong[:3, 1, 1].max()) == 0.0


def test_one_group_is_measured_where_it_was_chosen_and_says_so():
    found = study_heads(induction_model(), PAIRS[0])
    assert found.held_out is None and "q" not in found.table().columns
    assert "the largest falls are biased upwards." in found.report().to_html()


def test_an_answer_that_is_not_in_the_prompt_has_no_attention():
    pairs = PromptPairs([3, 1, 4, 3], [0, 1, 4, 3], answer=8, wrong_answer=1)
    found = study_heads(induction_model(), pairs)
    assert bool(found.to_answer.isnan().all()) and float(found.to_wrong[0, 1, 1]) == 1.0

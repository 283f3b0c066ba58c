"""What people pass to steering methods: prompt pairs, and values that cannot be used."""

import pytest
import torch

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.plugins.steering import (
    SweepSettings,
    ablate_direction,
    find_direction,
    measure_direction_ablation,
    steer,
    sweep_coefficients,
)
from hooklens.testing import tiny_model

REFUSED = (InputError, TypeError)  # the type check answers first where it is on, with the argument's name
SITE = ("resid_post", 0)
CLEAN, CORRUPTED = [[i, 1, 5] for i in range(6)], [[i, 2, 5] for i in range(6)]
GROUP = torch.tensor([0, 0, 1, 1, 2, 2])


def test_prompt_pairs_give_what_their_prompts_give():
    model, v = tiny_model(dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    pairs = hl.PromptPairs(CLEAN, CORRUPTED, answer=3, wrong_answer=4, group=GROUP)
    few = SweepSettings(controls=2, written=1, new_tokens=2)
    grouped = SweepSettings(controls=2, written=1, new_tokens=2, group=GROUP)
    for ours, theirs in (
        (find_direction(model, pairs, draws=5), find_direction(model, CLEAN, CORRUPTED, group=GROUP, draws=5)),
        (
            measure_direction_ablation(model, pairs, v, controls=2),
            measure_direction_ablation(model, hl.PromptPairs(CLEAN, None, metric, group=GROUP), v, controls=2),
        ),
        (
            sweep_coefficients(model, pairs, v, [1.0], site=SITE, settings=few),
            sweep_coefficients(model, CLEAN, v, [1.0], metric, site=SITE, settings=grouped),
        ),
    ):
        assert str(ours.table()) == str(theirs.table())
        assert torch.equal(getattr(ours, "group", GROUP), getattr(theirs, "group", GROUP))


def test_what_prompt_pairs_hold_is_not_given_twice():
    pairs = hl.PromptPairs(CLEAN, CORRUPTED)
    with pytest.raises(InputError, match=r"leave negative out"):
        find_direction(tiny_model(), pairs, CORRUPTED)
    for given in (CLEAN, hl.PromptPairs(CLEAN, None)):
        with pytest.raises(InputError, match=r"negative prompts are missing"):
            find_direction(tiny_model(), given)
    with pytest.raises(InputError, match=r"metric is missing"):
        measure_direction_ablation(tiny_model(), pairs, torch.ones(8))


@pytest.mark.parametrize("positions", [[1.7], [0, "a"], torch.tensor([True, False, True]), [True]], ids=str)
def test_positions_that_are_no_numbers_were_cut_to_some(positions):
    with pytest.raises(REFUSED, match=r"numbers or a slice|'positions'"):
        steer(tiny_model(), torch.ones(8), site=SITE, positions=positions)


def test_a_position_in_a_tensor_is_a_position():
    model, v = tiny_model(), torch.ones(8)
    with steer(model, v, site=SITE, positions=torch.tensor(1)):
        one = model([[1, 2, 3]])
    with steer(model, v, site=SITE, positions=1):
        assert torch.equal(model([[1, 2, 3]]), one)


def test_a_site_of_no_points_and_a_coefficient_that_is_no_number_were_raw_errors():
    with pytest.raises(InputError, match=r"selects no point"):
        steer(tiny_model(), torch.ones(8), site=[])
    with pytest.raises(REFUSED, match=r"coefficient is a number|'coefficient'"):
        steer(tiny_model(), torch.ones(8), "strong", site=SITE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"draws": 2.5}, "draws is a whole number|'draws'"),
        ({"pos": True}, "pos is a whole number|'pos'"),
        ({"pos": 0.5}, "pos is a whole number|'pos'"),
        ({"site": "blocks.0.hook_resid_post"}, "at every layer"),  # it was every layer's
        ({"site": "normalized"}, "at every layer"),  # several a layer
    ],
)
def test_a_contrast_that_cannot_be_made_is_refused_with_a_reason(change, said):
    with pytest.raises(REFUSED, match=said):
        find_direction(tiny_model(), CLEAN, CORRUPTED, **change)


def test_sweeps_of_no_numbers_are_refused_with_a_reason():
    model, metric = tiny_model(), lambda logits: logits[:, -1, 3]
    for coefficients in (1.0, ["a"]):
        with pytest.raises(REFUSED, match=r"coefficient"):
            sweep_coefficients(model, CLEAN, torch.ones(8), coefficients, metric, site=SITE)
    with pytest.raises(InputError, match=r"written is a whole number of at least 0"):
        sweep_coefficients(
            model, CLEAN, torch.ones(8), [1.0], metric, site=SITE, settings=SweepSettings(controls=2, written=-1)
        )
    with pytest.raises(REFUSED, match=r"settings is a SweepSettings|'settings'"):
        sweep_coefficients(model, CLEAN, torch.ones(8), [1.0], metric, site=SITE, settings={"controls": 2})
    with pytest.raises(REFUSED, match=r"float tensor|'direction'"):
        measure_direction_ablation(model, CLEAN, [1.0] * 8, metric)


def test_groups_may_be_words():
    words, numbers = (find_direction(tiny_model(), CLEAN, CORRUPTED, group=g, draws=5) for g in (list("aabbcc"), GROUP))
    assert torch.equal(words.null, numbers.null)


def test_layers_and_prompts_that_do_not_exist_are_refused_with_those_that_do():
    model = tiny_model()
    directions = find_direction(model, CLEAN, CORRUPTED, draws=2)
    with pytest.raises(InputError, match=r"layer is from 0 to 1, got 2"):
        directions.at(2)
    few, metric = SweepSettings(controls=2, written=1, new_tokens=2), lambda logits: logits[:, -1, 3]
    sweep = sweep_coefficients(model, CLEAN[:2], torch.ones(8), [1.0], metric, site=SITE, settings=few)
    with pytest.raises(InputError, match=r"prompt is from 0 to 1, got 5"):
        sweep.samples(5)


def test_the_best_layer_leads_the_table():
    directions = find_direction(tiny_model(), CLEAN, [[i, 5, 2] for i in range(6)], site="mlp_out", pos=1, draws=3)
    column = [row[1] for row in directions.table().rows]
    assert column == sorted(column, reverse=True) and directions.top(1).rows[0][0] == f"L{directions.best}"


@pytest.mark.parametrize("positions", [[9], -7, [0, 5], slice(4, None)])
def test_a_position_that_no_prompt_has_is_not_an_effect_of_zero(positions):
    model, settings = tiny_model(), SweepSettings(controls=1, written=1, new_tokens=1, positions=positions)
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    with pytest.raises(REFUSED, match=r"no prompt has .* 2 tokens"):
        sweep_coefficients(model, [[1, 2]], torch.ones(8), [1.0], metric, site=SITE, settings=settings)


@pytest.mark.parametrize("one", [-1, 0])
def test_one_position_is_a_list_of_one_in_a_sweep(one):
    model, tables = tiny_model(), []
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    for positions in (one, [one]):
        settings = SweepSettings(controls=1, written=1, new_tokens=1, positions=positions)
        sweep = sweep_coefficients(model, [[1, 2], [3]], torch.ones(8), [1.0], metric, site=SITE, settings=settings)
        tables.append(str(sweep.table()))
    assert tables[0] == tables[1]


def test_an_edit_at_a_position_before_the_first_token_did_nothing():
    model, v = tiny_model(), torch.ones(8)
    for edit in (steer(model, v, site=SITE, positions=[-3]), ablate_direction(model, v, positions=-3)):
        with edit, pytest.raises(InputError, match="positions has -3, and the longest prompt has 2 tokens"):
            model([[1, 2]])
        with edit:
            assert not torch.equal(model([[1, 2, 3]]), tiny_model()([[1, 2, 3]]))


@pytest.mark.parametrize("positions", [[9], 2, slice(4, None)])
def test_an_edit_at_a_position_behind_the_prompt_did_nothing(positions):
    model, v = tiny_model(), torch.ones(8)
    first = positions.start if isinstance(positions, slice) else torch.tensor(positions).view(-1)[0].item()
    for edit in (steer(model, v, site=SITE, positions=positions), ablate_direction(model, v, positions=positions)):
        with edit, pytest.raises(InputError, match=f"positions has {first}, and the longest prompt has 2 tokens"):
            model([[1, 2]])
        with edit, pytest.raises(InputError, match="2 tokens, and at most" if first > 2 else "2 tokens"):
            model.generate([1, 2], first - 1, stop=())
        with edit:
            assert len(model.generate([1, 2], first, stop=()).tokens[0]) == first + 2
            assert model([[1, 2]], kv_cache=hl.KVCache()).isfinite().all()  # whoever gives a cache may go on with it

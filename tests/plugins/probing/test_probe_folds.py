"""Folds split no group, shuffles keep what labels must keep, control tasks can be memorised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.core.errors import InputError
from hooklens.plugins.probing.control import control_labels, control_types
from hooklens.plugins.probing.folds import make_folds, shuffled, split
from hooklens.plugins.probing.probes import Logistic
from hooklens.plugins.probing.scoring import Trainer
from hooklens.plugins.probing.task import components, read_task
from hooklens.testing import tiny_model


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 7)), min_size=12, max_size=40), st.integers(0, 3))
def test_no_group_stands_on_both_sides(pairs, seed):
    label, group = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    try:
        made = make_folds(label, group, folds=3, inner=2, seed=seed)
    except InputError:
        spread = [len(group[label == one].unique()) for one in label.unique()]
        assert min(spread) < 5 or len(spread) < 2  # enough groups of each class always give folds
        return
    tested = sorted(row for fold in made for row in fold.test.tolist())
    assert tested == list(range(len(pairs)))
    for fold in made:
        assert not set(group[fold.train].tolist()) & set(group[fold.test].tolist())
        assert set(label[fold.train].tolist()) == set(label.tolist())
        for train, test in fold.inner:
            assert not set(group[train].tolist()) & set(group[test].tolist())
            assert sorted([*train, *test]) == sorted(fold.train.tolist())


def test_folds_exist_where_the_most_stratified_split_leaves_too_few_groups_to_choose_in():
    pairs = [(0, 0), (0, 0), (0, 2), (0, 3), (0, 4), (0, 4), (0, 4), (0, 6), (0, 6)]
    pairs += [(1, 0), (1, 0), (1, 0), (1, 1), (1, 1), (1, 1), (1, 2), (1, 5), (1, 6), (1, 6)]
    label, group = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    for fold in make_folds(label, group, folds=3, inner=2, seed=0):
        assert len(fold.inner) == 2
        assert all(label[train].unique().tolist() == [0, 1] for train, _ in fold.inner)


def test_folds_are_stratified():
    label, group = torch.tensor([0, 0, 0, 1] * 25), torch.arange(100)
    for fold in make_folds(label, group):
        assert label[fold.test].sum() == 5


def test_too_few_groups_are_an_error_that_counts_them():
    with pytest.raises(InputError, match=r"classes occur in \[1, 3\] groups"):
        split(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 2, 3]), 5, 0)


def test_components_are_those_of_a_graph_search():
    generator = torch.Generator().manual_seed(0)
    keys = [[int(k) for k in torch.randint(30, (2,), generator=generator)] for _ in range(20)]
    reached = list(range(20))
    for _ in range(20):  # spread the smallest number along shared keys until nothing changes
        reached = [min(reached[j] for j in range(20) if set(keys[i]) & set(keys[j])) for i in range(20)]
    found = components(keys).tolist()
    assert all((found[i] == found[j]) == (reached[i] == reached[j]) for i in range(20) for j in range(20))


def test_prompts_of_the_same_tokens_are_one_group():
    task = read_task(tiny_model(), [[1, 2], [3, 4], [1, 2]], [0, 1, 0])
    assert task.group.tolist() == [0, 1, 0] == task.text_numbers().tolist()
    linked = read_task(tiny_model(), [[1, 2], [3, 4], [5, 6]], [0, 1, 0], group=["a", "b", "b"])
    assert linked.group.tolist() == [0, 1, 1] and linked.text_numbers().tolist() == [0, 1, 2]


def entities(n: int = 30, each: int = 8, d: int = 80, seed: int = 0):
    """Rows that hold who they are about and nothing else; the label belongs to who."""
    generator = torch.Generator().manual_seed(seed)
    who = torch.randn(n, d, generator=generator, dtype=torch.float64).repeat_interleave(each, 0)
    x = who + 0.1 * torch.randn(n * each, d, generator=generator, dtype=torch.float64)
    label = torch.randperm(n, generator=generator).repeat_interleave(each) % 2
    return x, label, torch.arange(n).repeat_interleave(each)


@pytest.mark.slow
def test_where_only_the_entity_tells_grouped_folds_are_at_chance_and_naive_ones_are_not():
    grouped, naive = [], []
    for seed in range(5):
        x, label, group = entities(seed=seed)
        for folds, into in ((make_folds(label, group), grouped), (make_folds(label, torch.arange(len(label))), naive)):
            into.append(float(Trainer(Logistic(c=1.0), 2).correct(x.numpy(), label[None], folds)[0].mean()))
    assert min(naive) > 0.99
    assert abs(sum(grouped) / 5 - 0.5) < 0.12  # 150 entities: a standard error of 0.04


def test_labels_that_belong_to_a_group_are_shuffled_with_it():
    label, group = torch.arange(12).repeat_interleave(5) % 3, torch.arange(12).repeat_interleave(5)
    seen = set()
    for seed in range(20):
        drawn = shuffled(label, group, torch.Generator().manual_seed(seed))
        assert all(len(drawn[group == one].unique()) == 1 for one in range(12))
        assert torch.equal(torch.bincount(drawn), torch.bincount(label))
        seen.add(tuple(drawn.tolist()))
    assert len(seen) > 15


def test_labels_that_vary_in_a_group_change_places_within_it():
    generator = torch.Generator().manual_seed(1)
    label, group = torch.randint(2, (60,), generator=generator), torch.arange(60) // 6
    drawn = shuffled(label, group, generator)
    assert not torch.equal(drawn, label)
    for one in range(10):
        if len(label[group == one].unique()) == 2:
            assert drawn[group == one].sum() == label[group == one].sum()


def test_single_examples_are_shuffled_freely():
    label, drawn = torch.arange(40) % 2, []
    for seed in range(200):
        drawn.append(shuffled(label, torch.arange(40), torch.Generator().manual_seed(seed)))
    share = torch.stack(drawn).double().mean(0)
    assert bool((share - 0.5).abs().max() < 0.15)


def test_a_control_task_gives_a_type_one_label_in_the_shares_of_the_classes():
    types = torch.arange(200) % 20
    label = control_labels(types, [0.25, 0.75], torch.Generator().manual_seed(0))
    assert all(len(label[types == one].unique()) == 1 for one in range(20))
    assert float(label.double().mean()) == 0.75


def test_what_a_control_task_labels():
    prompt, many = torch.arange(40), torch.arange(40) % 10
    assert control_types(many, prompt, prompt)[1] == "token"
    assert control_types(torch.zeros_like(prompt), prompt, many)[1] == "group"  # one token is no set of types
    assert control_types(prompt, prompt, prompt)[0] is None  # nothing comes back
    assert control_types(many, many, many)[0] is None  # a type comes back in its own prompt only

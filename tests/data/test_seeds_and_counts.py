"""Counts of a split and numbers of a seed that were not what they should be."""

import itertools

import pytest
import torch

import hooklens as hl
from hooklens.data.pronouns import MEN, WOMEN
from hooklens.pretrained.tokenizer import tiny_tokenizer

SEEDS = (0, 1, -1, 2**32, 2**32 + 1, 2**32 - 1, -(2**63), 2**64 - 1)


def test_thirty_percent_of_the_pairs_modulo_113_were_3831_where_the_paper_has_3830():
    assert [len(pairs) for pairs in hl.data.modular_arithmetic().pairs] == [3830, 12_769 - 3830]


@pytest.mark.parametrize(
    ("p", "fraction", "count"), [(10, 0.29, 29), (3, 1 / 3, 3), (5, 0.5, 12), (10, 0.999, 99), (5, 1.0, 25)]
)
def test_a_fraction_of_all_pairs_is_rounded_down_but_not_below_a_whole_number_that_floats_miss(p, fraction, count):
    assert len(hl.data.modular_arithmetic(p, fraction=fraction).pairs[0]) == count


def year_pairs(seed):
    words = [*(f"Ġ{century}" for century in range(11, 18)), *(f"{year:02d}" for year in range(100))]
    return hl.data.greater_than(tiny_tokenizer(" ".join(words)), 16, seed=seed).clean


def pronoun_pairs(seed):
    tokenizer = tiny_tokenizer(" ".join(f"Ġ{word}" for word in (*WOMEN, *MEN, "he", "she")))
    return hl.data.gendered_pronouns(tokenizer, 16, seed=seed).clean


def ioi_pairs(seed):
    return hl.data.ioi(tiny_tokenizer(" ".join(f"Ġ{word}" for word in (*WOMEN, *MEN))), 16, seed=seed).clean


DRAWN = {
    "modular split": lambda seed: hl.data.modular_arithmetic(11, seed=seed).pairs[0].tolist(),
    "repeated tokens": lambda seed: hl.data.repeated_tokens(40, 8, seed=seed).tokens.tolist(),
    "decimals": lambda seed: hl.data.decimal_arithmetic(3, seed=seed).batch(0, 8).inputs.tolist(),
    "stories": lambda seed: hl.data.tiny_stories(seed=seed).batch(0, 2).inputs.tolist(),
    "regression": lambda seed: hl.data.in_context_regression(2, 3, seed=seed).batch(0, 2).inputs.tolist(),
    "markov": lambda seed: hl.data.markov_source(seed=seed).batch(0, 4).inputs.tolist(),
    "years": year_pairs,
    "pronouns": pronoun_pairs,
    "ioi": ioi_pairs,
}


@pytest.mark.parametrize("name", DRAWN)
def test_seeds_that_differ_by_their_sign_or_by_2_to_the_32_gave_the_same_data(name):
    drawn = {seed: DRAWN[name](seed) for seed in SEEDS}
    assert [(a, b) for a, b in itertools.combinations(SEEDS, 2) if drawn[a] == drawn[b]] == []
    assert drawn[0] == DRAWN[name](0)


def test_seeds_that_differ_by_2_to_the_32_gave_the_same_weights():
    cfg = hl.HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=4, n_heads=1, d_vocab=5)
    first, second = (hl.HookedTransformer(cfg, seed=seed).W_E for seed in (0, 2**32))
    assert not torch.equal(first, second)

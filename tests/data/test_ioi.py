"""Indirect-object pairs: balanced by construction, of one length, single tokens, the same for the same seed."""

import string
from collections import Counter

import pytest
import tokenizers
import torch

from hooklens.core.errors import InputError
from hooklens.data.indirect_object import NAMES, TEMPLATES, ioi
from hooklens.pretrained.tokenizer import Tokenizer, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(" ".join(f"Ġ{name}" for name in NAMES))


def ids_of(tokenizer, pairs):
    """Token ids of clean and corrupted prompts, of answers and wrong answers."""
    prompts = (
        torch.stack([tokenizer.to_tokens(text)[0] for text in texts]) for texts in (pairs.clean, pairs.corrupted)
    )
    names = (torch.tensor([tokenizer.to_single_token(name) for name in n]) for n in (pairs.answer, pairs.wrong_answer))
    return *prompts, *names


@pytest.mark.parametrize("n", [4, 64, 120])
def test_names_orders_and_sentences_are_balanced(tokenizer, n):
    pairs = ioi(tokenizer, n)
    assert len(pairs) == n
    roles = Counter()
    for io, subject, order in zip(pairs.answer, pairs.wrong_answer, pairs["order"], strict=True):
        roles[io, "io", order] += 1
        roles[subject, "subject", order] += 1
    for name in {*pairs.answer, *pairs.wrong_answer}:
        assert len({roles[name, role, order] for role in ("io", "subject") for order in ("ABBA", "BABA")}) == 1
    assert Counter(pairs["order"]) == {"ABBA": n // 2, "BABA": n // 2}
    by_sentence = Counter((template, order) for template, order in zip(pairs["template"], pairs["order"], strict=True))
    assert all(by_sentence[t, "ABBA"] == by_sentence[t, "BABA"] for t in pairs["template"])


def test_tokenizers_that_put_a_space_in_front_of_every_text_have_names_too():
    """' Mary' alone is two tokens of Llama 2's, and all names were left out."""
    pieces, merges = ["▁", *sorted({*"".join(string.printable.split())})], []
    for name in NAMES:
        for end in range(1, len(name) + 1):
            if f"▁{name[:end]}" not in pieces:
                pieces.append(f"▁{name[:end]}")
                merges.append((f"▁{name[: end - 1]}", name[end - 1]))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    spaces = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    backend.normalizer = tokenizers.normalizers.Sequence(spaces)
    backend.decoder = tokenizers.decoders.Metaspace()
    pairs = ioi(Tokenizer(backend), 8)
    clean, _, answer, _ = ids_of(Tokenizer(backend), pairs)
    for row, name in zip(clean, answer, strict=True):
        assert int((row == name).sum()) == 1
    assert [backend.id_to_token(i) for i in answer] == [name.replace(" ", "▁") for name in pairs.answer]


def test_all_prompts_are_equally_long_and_names_are_single_tokens(tokenizer):
    pairs = ioi(tokenizer, 32)
    lengths = {len(tokenizer.encode(text)) for text in pairs.clean + pairs.corrupted}
    assert lengths == {int(pairs["end"][0]) + 1}
    assert all(len(tokenizer.encode(name)) == 1 and name.startswith(" ") for name in pairs.answer + pairs.wrong_answer)


def test_positions_point_at_the_names(tokenizer):
    pairs = ioi(tokenizer, 16)
    row, (clean, _, answer, wrong) = torch.arange(16), ids_of(tokenizer, pairs)
    assert torch.equal(clean[row, pairs["io"]], answer)
    for where in (pairs["s1"], pairs["s2"]):
        assert torch.equal(clean[row, where], wrong)
    assert bool((pairs["s1"] < pairs["s2"]).all() and (pairs["s2"] < pairs["end"]).all())
    assert [("ABBA" if io < s1 else "BABA") for io, s1 in zip(pairs["io"], pairs["s1"], strict=True)] == pairs["order"]


def test_the_corrupted_prompt_differs_only_in_the_second_subject_and_turns_the_answer(tokenizer):
    pairs = ioi(tokenizer, 16)
    row, (clean, corrupted, answer, _) = torch.arange(16), ids_of(tokenizer, pairs)
    differs = clean != corrupted
    assert torch.equal(differs.sum(1), torch.ones(16).long())
    assert bool(differs[row, pairs["s2"]].all())
    assert torch.equal(corrupted[row, pairs["s2"]], answer)
    assert sorted(pairs.clean) == sorted(pairs.corrupted)  # each corrupted prompt is another pair's clean one


def test_groups_share_names_and_sentence(tokenizer):
    pairs = ioi(tokenizer, 16)
    for group in range(4):
        rows = [i for i in range(16) if int(pairs.group[i]) == group]
        assert len({frozenset((pairs.answer[i], pairs.wrong_answer[i])) for i in rows}) == 1
        assert len({pairs["template"][i] for i in rows}) == 1 and len(rows) == 4


def test_the_same_seed_gives_the_same_pairs_and_leaves_the_global_generator_alone(tokenizer):
    before = torch.random.get_rng_state()
    assert ioi(tokenizer, 16, seed=3).clean == ioi(tokenizer, 16, seed=3).clean
    assert ioi(tokenizer, 16, seed=3).clean != ioi(tokenizer, 16, seed=4).clean
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_be_balanced_is_refused(tokenizer):
    for n in (0, 6):
        with pytest.raises(InputError, match="multiple of 4"):
            ioi(tokenizer, n)
    with pytest.raises(InputError, match="tokenizer has 0"):
        ioi(tiny_tokenizer(), 4)
    from hooklens.testing import tiny_model

    with pytest.raises(InputError, match="no tokenizer"):
        ioi(tiny_model(), 4)


@pytest.mark.slow
def test_smollm2_knows_all_names_and_every_sentence():
    from hooklens import load

    model = load("smollm2-135m-instruct")
    pairs = ioi(model, 64)
    assert pairs.tokens(model)[0].shape == (64, 14)
    assert len(set(pairs["template"])) == len(TEMPLATES)

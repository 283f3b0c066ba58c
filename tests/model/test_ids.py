"""Token ids in every form that people write them in, everywhere they are read."""

import numpy as np
import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError, InputError, WrongType
from hooklens.model.ids import as_ids
from hooklens.plugins.probing import gather
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model

MODEL = tiny_model(d_vocab=256)
MODEL.tokenizer = tiny_tokenizer()
IDS = [[1, 2, 3]]
OTHERS = [[1, 4, 3]]

READERS = {
    "model": lambda ids: MODEL(ids),
    "run_with_cache": lambda ids: MODEL.run_with_cache(ids, "z")[1]["z", 0],
    "generate": lambda ids: MODEL.generate(ids, 2).new_tokens[0],
    "to_string": lambda ids: MODEL.to_string(ids),
    "to_str_tokens": lambda ids: MODEL.to_str_tokens(ids),
    "tokens_to_residual_directions": lambda ids: MODEL.tokens_to_residual_directions(ids),
    "logits_at": lambda ids: MODEL([[1, 2, 3, 4]] * 3, logits_at=ids[0]),
    "answer": lambda ids: hl.prob(MODEL, answer=ids[0]).answer,
    "pos": lambda ids: hl.prob(MODEL, answer=1, pos=ids[0]).pos,
    "loss": lambda ids: hl.loss(MODEL, ids).tokens,
    "kl": lambda ids: hl.kl(MODEL, ids).log_probs,
    "patch": lambda ids: hl.patch(MODEL, ids, OTHERS, hl.prob(MODEL, answer=1), by="layer").values,
    "gather": lambda ids: gather(MODEL, ids).x,
}
MANY = {"generate", "to_string", "patch", "gather"}  # rows there may differ in length
NUMBERS = {"answer", "pos", "logits_at"}  # one number a row


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"])
def test_ids_of_every_integer_type_ended_in_torchs_own_error(reader, dtype):
    read, wanted = READERS[reader], READERS[reader](torch.tensor(IDS))
    got = read(torch.tensor(IDS, dtype=getattr(torch, dtype)))
    assert got == wanted if isinstance(wanted, str | list) else torch.equal(got, wanted)
    assert as_ids(np.array(IDS, dtype=dtype)).tolist() == IDS


@pytest.mark.parametrize("reader", sorted(set(READERS) - NUMBERS - MANY - {"to_str_tokens"}))
@pytest.mark.parametrize("ids", [[[1, 2], [3]], [torch.tensor([1, 2]), torch.tensor([3])]])
def test_rows_of_different_length_ended_in_torchs_own_error(reader, ids):
    with refused(InputError, "got rows of 2 and 1; pad them and give an attention_mask"):
        READERS[reader](ids)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ids", [[[1.5, 2.0]], [[None]], [[2**70]], [[b"a"]], [[1, [2]]]])
def test_what_is_no_id_is_refused_in_our_words(reader, ids):
    with refused(HooklensError, ""):
        READERS[reader](ids)


def test_lists_of_tensors_are_rows():
    rows = [torch.tensor([1, 2], dtype=torch.int8), torch.tensor([3, 4])]
    assert as_ids(rows).tolist() == [[1, 2], [3, 4]] and as_ids([torch.tensor(5), 6]).tolist() == [5, 6]
    assert MODEL(rows).shape[:2] == (2, 2) and MODEL.to_string([torch.tensor(65), torch.tensor(66)]) == "bc"
    with refused(WrongType, "integers"):
        as_ids(torch.tensor([True]))


def test_logits_at_of_another_number_of_rows_says_so():
    with refused(InputError, "one position for all rows or one per row, got 2 for 3"):
        MODEL(IDS * 3, logits_at=[0, 1])

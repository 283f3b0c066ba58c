"""Tokenizers as GGUF files describe them, small and made here."""

import json
from functools import lru_cache

from odd_strings import PIECES, odd_strings
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from hooklens.pretrained.tokenizer import byte_values

# What transformers' classes add of themselves when the vocabulary lacks it.
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<bos>", "<eos>", "<pad>", "<mask>"]


@lru_cache
def trained() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary and its merges, learned on the odd strings, digits not split."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(byte_values())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, max_token_length=6
    )
    backend.train_from_iterator(odd_strings(300, seed=7), trainer)
    vocab = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(backend.to_str())["model"]["merges"]
    return [token for token, _ in vocab], [" ".join(pair) for pair in merges]


def byte_level(pre: str | None, **more) -> dict:
    """Metadata of a byte-level tokenizer."""
    tokens, merges = trained()
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return metadata | ({} if pre is None else {"tokenizer.ggml.pre": pre}) | more


def sentencepiece(architecture: str = "llama", **more) -> dict:
    """Metadata of a SentencePiece tokenizer: the bytes, the characters of the odd strings, and frequent pieces."""
    text = " ".join(odd_strings(300, seed=7)).replace(" ", "▁")
    characters = sorted(set("".join(PIECES)) - set("𝔘𝔫你 "))[:200]  # some characters must fall back to bytes
    grams = {text[i : i + n] for n in (2, 3, 4) for i in range(0, len(text) - n)}
    frequent = sorted((g for g in grams if text.count(g) > 12), key=lambda g: (-text.count(g), g))[:300]
    pieces = [piece for piece in dict.fromkeys(["▁", *characters, *frequent]) if piece not in SPECIAL]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i % 97) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 4,
        **more,
    }

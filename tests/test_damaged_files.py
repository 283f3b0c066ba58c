"""Every file that can be read, damaged at random: it is refused in words or read, and what was read gives numbers."""

import json
import random
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import (
    damaged_bytes,
    damaged_content,
    damaged_header,
    damaged_json,
    damaged_lines,
    damaged_metadata,
    damaged_numbers,
)
from safetensors.torch import save_file

from hooklens.core.cache import ActivationCache
from hooklens.core.envelope import write_envelope
from hooklens.core.errors import HooklensError
from hooklens.data.jsonl import read_pairs_file
from hooklens.plugins.circuits.circuit import Circuit, circuit_of
from hooklens.plugins.lens.translators import LENS_SCHEMA, TunedLens
from hooklens.plugins.probing.store import Files
from hooklens.pretrained.checkpoint import save
from hooklens.pretrained.loading import load
from hooklens.pretrained.tokenizer import Tokenizer, tiny_tokenizer
from hooklens.results.claims.registration import Registration
from hooklens.results.result import Result
from hooklens.sweeps import resume
from hooklens.sweeps.resume import Progressed, Resume
from hooklens.testing import tiny_model

EACH = 50  # mutations of a format in the default run
Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Format:
    """How a file of a kind is made, damaged and read; `file` is what is damaged where `make` gives a folder."""

    make: Callable[[Path], None]
    file: str
    damage: tuple[Damage, ...]
    read: Callable[[Path], None]


def finite(model) -> None:
    """A configuration may not turn weights of ordinary size into NaN logits; a flipped bit of a weight may."""
    logits = model([[1, 2, 3]])
    if all(weight.abs().max() < 100 for weight in model.parameters()):
        assert logits.isfinite().all()


def used(tokenizer: Tokenizer) -> None:
    ids = tokenizer.to_tokens("Two words, 1984 é", prepend_bos=False)
    tokenizer.to_string(ids)
    tokenizer.to_str_tokens(ids)
    assert tokenizer.special_ids is not None


def hub_folder(folder: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 6, "vocab_size": 7, "hidden_act": "silu"}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    config |= {"max_position_embeddings": 16, "rope_theta": 1e4, "architectures": ["LlamaForCausalLM"]}
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": rope, "tie_word_embeddings": True}))
    names = {"embed_tokens": (7, 8), "norm": 8, "layers.0.input_layernorm": 8, "layers.0.post_attention_layernorm": 8}
    names |= {f"layers.0.self_attn.{p}_proj": (4 if p in "kv" else 8, 8) for p in "qkvo"}
    names |= {f"layers.0.mlp.{p}_proj": (8, 6) if p == "down" else (6, 8) for p in ("gate", "up", "down")}
    torch.manual_seed(0)
    save_file(
        {f"model.{name}.weight": torch.rand(shape) for name, shape in names.items()}, folder / "model.safetensors"
    )


def tokenizer_folder(folder: Path) -> None:
    from tokenizers import normalizers, pre_tokenizers, processors

    tokenizer = tiny_tokenizer("the cat", extra=("<bos>", "<eos>"))
    backend = tokenizer.backend
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("'", "’")])
    cut = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tokenizer.bos_id)])
    backend.enable_truncation(10, stride=2)
    backend.enable_padding(length=12)
    replace(tokenizer, eos_id=tokenizer.vocab_size - 1, chat_template="{{ 1 }}").save(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": 0}')


def unigram_folder(folder: Path) -> None:
    """A tokenizer that needs its unknown token: it raises, or panics, only once it meets a character it lacks."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((letter, -2.0) for letter in "▁Twordsc,"), ("▁Two", -1.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    Tokenizer(backend, bos_id=1, unk_id=0).save(folder)


def gguf(folder: Path) -> None:
    """A llama of one block whose tokenizer is SentencePiece's, from which merges are derived."""
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "m.gguf", "llama")
    add = [writer.add_block_count, writer.add_context_length, writer.add_embedding_length, writer.add_head_count]
    for write, number in zip(add, (1, 16, 8, 2), strict=True):
        write(number)
    writer.add_feed_forward_length(6)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcd", "▁a", "ab", "cd", "abcd"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    draw = np.random.default_rng(0)
    names = {"token_embd": (len(tokens), 8), "output_norm": 8, "blk.0.attn_norm": 8, "blk.0.ffn_norm": 8}
    names |= {f"blk.0.attn_{part}": (8, 8) for part in ("q", "k", "v", "output")}
    names |= {f"blk.0.ffn_{part}": (8, 6) if part == "down" else (6, 8) for part in ("gate", "up", "down")}
    for name, shape in names.items():
        writer.add_tensor(f"{name}.weight", draw.random(shape, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


def checkpoint(folder: Path) -> None:
    model = tiny_model(n_layers=1, positional_embedding_type="rotary", normalization_type="RMS")
    model.tokenizer = tiny_tokenizer("the", extra=("<bos>",))
    save(model, folder / "m.safetensors")


def read_checkpoint(path: Path) -> None:
    model = load(path)
    finite(model)
    if model.tokenizer is not None:
        used(model.tokenizer)


def sweep(path: Path) -> Progressed:
    return Progressed(Resume(path), "key", torch.ones(4, dtype=torch.float64), torch.zeros(6, 2), "linear")


def store(folder: Path) -> Files:
    return Files(folder, {"a": (4, 3)}, torch.float32, "key", [[0, 1], [2, 3]])


def plan(path: Path) -> None:
    Registration("L1H0 moves names", "logit_diff", "random heads", threshold=0.1, n=8).write(path)


def a_result() -> Result:
    return circuit_of(tiny_model(), ["embed->L0H1.v", "L0H1->logits"])


GGUF = (damaged_bytes, damaged_numbers, damaged_metadata, damaged_metadata)
JSON = (damaged_bytes, damaged_json, damaged_json)
HEADER = (damaged_bytes, damaged_header, damaged_header)
# A digest stops most damage at once: what stands behind it is damaged too, and the digest set right.
SEALED_JSON, SEALED = (*JSON, damaged_content, damaged_content), (*HEADER, damaged_content, damaged_content)
FORMATS = {
    "config": Format(hub_folder, "config.json", JSON, lambda path: finite(load(path.parent))),
    "weights": Format(hub_folder, "model.safetensors", HEADER, lambda path: finite(load(path.parent))),
    "tokenizer": Format(tokenizer_folder, "tokenizer.json", JSON, lambda p: used(Tokenizer.from_folder(p.parent))),
    "unigram": Format(unigram_folder, "tokenizer.json", JSON, lambda p: used(Tokenizer.from_folder(p.parent))),
    "tokenizer settings": Format(
        tokenizer_folder, "tokenizer_config.json", JSON, lambda p: used(Tokenizer.from_folder(p.parent))
    ),
    "generation settings": Format(
        tokenizer_folder, "generation_config.json", JSON, lambda p: used(Tokenizer.from_folder(p.parent))
    ),
    "gguf": Format(
        gguf, "m.gguf", (damaged_bytes, damaged_numbers, damaged_metadata, damaged_metadata), read_checkpoint
    ),
    "checkpoint": Format(checkpoint, "m.safetensors", SEALED, read_checkpoint),
    "tuned lens": Format(
        lambda folder: TunedLens(2, 4).save(folder / "lens"), "lens", SEALED, lambda path: TunedLens.load(path)
    ),
    "sweep in progress": Format(lambda folder: sweep(folder / "s").save([1, 2]), "s", SEALED, sweep),
    "activations": Format(
        lambda folder: tiny_model().run_with_cache([[1, 2]])[1].save(folder / "c"), "c", SEALED, ActivationCache.load
    ),
    "stored activations": Format(
        lambda folder: store(folder).write(torch.tensor([0, 1]), {"a": torch.ones(2, 3)}),
        "activations.json",
        SEALED_JSON,
        lambda path: store(path.parent),
    ),
    "array of stored activations": Format(
        lambda folder: store(folder).write(torch.tensor([0, 1]), {"a": torch.ones(2, 3)}),
        "a.npy.part",
        (damaged_bytes,),
        lambda path: store(path.parent),
    ),
    "result": Format(lambda folder: a_result().save(folder / "r"), "r", SEALED, Result.load),
    "circuit": Format(lambda folder: a_result().save_json(folder / "c.json"), "c.json", SEALED_JSON, Circuit.load_json),
    "plan": Format(lambda folder: plan(folder / "p.json"), "p.json", SEALED_JSON, Registration.read),
    "prompts": Format(
        lambda folder: (folder / "p.jsonl").write_text(
            json.dumps({"clean": "a b", "corrupted": "a c", "answer": " d", "wrong_answer": " e", "group": 1}) + "\n"
        ),
        "p.jsonl",
        (damaged_bytes, damaged_lines),
        read_pairs_file,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutations", [EACH, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_refused_in_words_or_read(name, mutations, tmp_path):
    kind = FORMATS[name]
    (tmp_path / "whole").mkdir()
    kind.make(tmp_path / "whole")
    content = (tmp_path / "whole" / kind.file).read_bytes()
    kind.read(tmp_path / "whole" / kind.file)
    draw = random.Random(zlib.crc32(name.encode()) + mutations)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    refused = 0
    for number in range(mutations):
        bad = draw.choice(kind.damage)(content, draw)
        (tmp_path / "damaged" / kind.file).write_bytes(bad)
        began = time.process_time()
        try:
            kind.read(tmp_path / "damaged" / kind.file)
        except HooklensError as error:
            refused += 1
            assert str(error)
        except BaseException as error:
            raise AssertionError(f"mutation {number} of {name} raised {type(error).__name__}: {error}") from error
        assert time.process_time() - began < 5, f"mutation {number} of {name}"
    assert refused > mutations // 4


ODD = [
    torch.ones(3),
    torch.ones(2, 4, 1),
    torch.ones(2, 4, 4, dtype=torch.int64),
    torch.ones(0, 4, 4),
    torch.tensor(1.0),
]


@pytest.mark.parametrize("odd", ODD, ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}")
def test_tensors_of_another_shape_are_refused_although_their_digest_is_right(odd, tmp_path):
    for weight, bias in ((odd, torch.zeros(2, 4)), (torch.zeros(2, 4, 4), odd)):
        write_envelope(tmp_path / "lens", LENS_SCHEMA, None, {"weight": weight, "bias": bias})
        with pytest.raises(HooklensError):
            TunedLens.load(tmp_path / "lens")
    for name in ("done", "values", "sketch"):
        progress = sweep(tmp_path / "none")
        setattr(progress, name, odd)
        held = {"done": progress.done, "values": progress.values, "sketch": progress.sketch}
        write_envelope(tmp_path / "s", resume._SCHEMA, {"key": "key", "kernel": "linear"}, held)
        with pytest.raises(HooklensError):
            sweep(tmp_path / "s")

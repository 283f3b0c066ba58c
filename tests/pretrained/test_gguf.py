"""GGUF files: damage is refused before any tensor is used; what is read is what was written."""

import struct
from pathlib import Path

import gguf
import pytest
import torch
from test_dequantize import random_blocks
from tiny_gguf import finish, hf_model, write_gguf

from hooklens.core.errors import FileRefused, InputError
from hooklens.pretrained.gguf import read_gguf
from hooklens.pretrained.gguf_to_hf import hf_config, hf_tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", "llama", hf_model("llama"))


def header(
    path: Path, *keys: tuple[str, int, bytes], version: int = 3, tensors: bytes = b"", n_tensors: int = 0
) -> Path:
    """A GGUF file written byte by byte: (key, type, value) triples, then tensor descriptions."""
    body = b"".join(struct.pack("<Q", len(k)) + k.encode() + struct.pack("<I", t) + v for k, t, v in keys)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, n_tensors, len(keys)) + body + tensors)
    return path


def described(name: str, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    start = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
    return start + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def test_metadata_is_plain_python(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int64("a.i64", -(1 << 40))
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve 🙂")
    writer.add_array("a.ints", [1, 2, 3])
    writer.add_array("a.floats", [0.5, -1.0])
    writer.add_array("a.words", ["", "x", "ĠThe"])
    finish(writer)
    seen = read_gguf(tmp_path / "m.gguf").metadata
    expected = {"a.u8": 200, "a.i64": -(1 << 40), "a.f32": 0.5, "a.bool": True, "a.text": "naïve 🙂"}
    expected |= {"a.ints": [1, 2, 3], "a.floats": [0.5, -1.0], "a.words": ["", "x", "ĠThe"]}
    assert {key: seen[key] for key in expected} == expected
    assert type(seen["a.bool"]) is bool and type(seen["a.u8"]) is int


def test_the_same_as_the_gguf_packages_own_reader(llama):
    theirs, ours = gguf.GGUFReader(llama), read_gguf(llama)
    fields = {key: value for key, value in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: value.contents() for key, value in fields.items()} == ours.metadata
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.offset, info.nbytes, info.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name)
        assert torch.equal(ours.tensor(tensor.name), torch.from_numpy(tensor.data.copy()))


def test_every_way_of_cutting_the_file_short_is_refused(llama, tmp_path):
    """Cut in the magic, the counts, the metadata, the tensor descriptions, the last tensor."""
    whole = llama.read_bytes()
    data_start = min(tensor.offset for tensor in read_gguf(llama).tensors.values())
    for length in [*range(0, data_start, 61), data_start, len(whole) // 2, len(whole) - 1]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(FileRefused, match=r"is cut short|begins with"):
            read_gguf(cut)


def test_the_message_for_a_short_file_names_the_tensor_and_the_sizes(llama, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(llama.read_bytes()[:-100])
    with pytest.raises(
        FileRefused, match=r"cut\.gguf is cut short: the tensor '.*' should end at byte [\d,]+, the file has"
    ):
        read_gguf(cut)


def test_other_formats_and_missing_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(FileRefused, match=r"begins with .*, but a GGUF file begins with b'GGUF'"):
        read_gguf(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"none.gguf': there is no such file"):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(("version", "why"), [(1, "version 1;"), (4, "version 4;"), (3 << 24, "big-endian")])
def test_other_versions(tmp_path, version, why):
    with pytest.raises(FileRefused, match=why):
        read_gguf(header(tmp_path / "v.gguf", version=version))


@pytest.mark.parametrize(
    ("keys", "tensors", "why"),
    [
        ([("a", 0, b"\1"), ("a", 0, b"\1")], b"", "the metadata key 'a' occurs twice"),
        ([("a", 99, b"")], b"", "unknown metadata type 99"),
        ([("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")], b"", "is not UTF-8 text"),
        ([("a", 8, struct.pack("<Q", 1 << 60))], b"", "cut short: its header runs past the end"),
        ([("a", 9, struct.pack("<IQ", 4, 1 << 60))], b"", "cut short: its header runs past the end"),
        ([("a", 9, struct.pack("<IQ", 9, 1))], b"", "unknown array type 9"),
        ([("general.alignment", 4, struct.pack("<I", 0))], b"", "general.alignment is 0"),
        ([], described("w", 1, kind=999), "type number 999, which the installed gguf package does not know"),
        ([], described("w", 33, kind=8), "rows of 33 values, but Q8_0 needs a multiple of 32"),
        ([], described("w", *[1] * 9), "claims 9 dimensions"),
        ([], described("w", 1 << 40), "is cut short: the tensor 'w' should end at byte"),
        ([], described("w", 0) + described("w", 0), "the tensor 'w' occurs twice"),
    ],
)
def test_damaged_headers(tmp_path, keys, tensors, why):
    path = header(tmp_path / "bad.gguf", *keys, tensors=tensors, n_tensors=tensors.count(b"w"))
    with pytest.raises(FileRefused, match=why):
        read_gguf(path)


def test_a_small_file_does_not_stand_for_a_large_model_by_tensors_that_overlap(tmp_path):
    tensors = b"".join(described(f"w{i}", 1 << 12) for i in range(100))
    path = header(tmp_path / "m.gguf", tensors=tensors, n_tensors=100)
    path.write_bytes(path.read_bytes() + bytes(1 << 15))
    with pytest.raises(FileRefused, match=r"its tensors overlap: they need 1,638,400 bytes, the file has"):
        read_gguf(path)


def test_a_type_that_cannot_be_read_is_named_before_any_tensor(tmp_path):
    tensors = described("token_embd.weight", 4, 4) + described("output_norm.weight", 4, kind=26, offset=64)
    arch = ("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
    path = header(tmp_path / "int.gguf", arch, tensors=tensors, n_tensors=2)
    path.write_bytes(path.read_bytes() + b"\0" * 256)
    file = read_gguf(path)
    assert torch.equal(file.tensor("token_embd.weight"), torch.zeros(4, 4))
    with pytest.raises(FileRefused, match=r"'output_norm.weight' has the unreadable type I32.*F32, F16"):
        file.tensor("output_norm.weight")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_types_survive_the_file(tmp_path, kind):
    """The tensors of a file of each type are what the gguf package makes of them."""
    path = write_gguf(tmp_path / "q.gguf", "qwen2", hf_model("qwen2"), kind)
    file = read_gguf(path)
    assert {info.kind for info in file.tensors.values()} == {"F32", kind}
    for tensor in gguf.GGUFReader(path).tensors:
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(file.tensor(tensor.name), expected.view(file.tensors[tensor.name].shape))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_block_types_of_256_survive_the_file(tmp_path, kind):
    """These are wider than a tiny model's rows: random blocks in a file of one tensor."""
    quantised = gguf.GGMLQuantizationType[kind]
    raw = random_blocks(kind, 12).reshape(6, 2 * gguf.GGML_QUANT_SIZES[quantised][1])
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = read_gguf(tmp_path / "k.gguf").tensor("blk.0.attn_q.weight")
    expected = torch.from_numpy(gguf.dequantize(raw, quantised)).view(6, 512)
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))  # bits: random blocks hold NaN


def test_tensors_larger_than_a_chunk(tmp_path, monkeypatch):
    from hooklens.pretrained import gguf as reader

    path = write_gguf(tmp_path / "q.gguf", "qwen2", hf_model("qwen2"), "Q8_0")
    whole = dict(hf_tensors(read_gguf(path)))
    monkeypatch.setattr(reader, "_CHUNK", 96)
    for name, weight in hf_tensors(read_gguf(path)):
        assert torch.equal(weight, whole[name])


def test_dtype_is_a_cast_of_the_float32_values(llama):
    half = dict(hf_tensors(read_gguf(llama), torch.bfloat16))
    for name, weight in hf_tensors(read_gguf(llama)):
        assert torch.equal(half[name], weight.to(torch.bfloat16))


@pytest.mark.slow
def test_smollm2_equals_transformers_dequantisation():
    """A few tensors of the real file, against the gguf package and against transformers' loading."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from hooklens.pretrained.assets import fetch

    path = fetch("smollm2-135m-instruct")
    file = read_gguf(path)
    config = hf_config(file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    seen = 0
    for name, weight in hf_tensors(file):
        assert torch.equal(weight, theirs[name]), name
        seen += 1
    assert seen == len(theirs) == 272

"""Every file has a schema, a version and one digest; a changed byte is refused; the same content is the same bytes."""

import ast
import importlib
import json
import pkgutil
import random
from pathlib import Path

import pytest
import torch
from mutations import resealed
from safetensors.torch import load_file

import hooklens
from hooklens.core.cache import ActivationCache
from hooklens.core.envelope import Schema, read_envelope, write_envelope
from hooklens.core.errors import FileRefused, HooklensError
from hooklens.core.safetensors_file import read_header
from hooklens.pretrained.checkpoint import load_checkpoint, save
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.results.result import Result
from hooklens.testing import tiny_model

TOKENS = torch.tensor([[1, 2, 3]])
ROOT = Path(hooklens.__file__).parent


def cache_file(path):
    tiny_model().run_with_cache(TOKENS, names="z")[1].save(path)
    return lambda: ActivationCache.load(path)


def checkpoint_file(path):
    model = tiny_model()
    model.tokenizer = tiny_tokenizer("Ġa Ġb")
    save(model, path)
    return lambda: load_checkpoint(path)


def result_file(path):
    from hooklens.plugins.patching.activation import demo

    demo(tiny_model()).save(path)
    return lambda: Result.load(path)


def lens_file(path):
    from hooklens.plugins.lens.translators import TunedLens

    TunedLens(2, 8).save(path)
    return lambda: TunedLens.load(path)


def sweep_file(path):
    from hooklens.sweeps.resume import Progressed, Resume

    load = lambda: Progressed(Resume(path), "key", torch.ones(4), torch.zeros(6, 2), "linear")  # noqa: E731
    load().save([1, 2])
    return load


def circuit_file(path):
    from hooklens.plugins.circuits.circuit import Circuit, circuit_of

    circuit_of(tiny_model(), ["embed->L0H1.v", "L0H1->logits"]).save_json(path)
    return lambda: Circuit.load_json(path)


def plan_file(path):
    from hooklens.results.claims import Registration

    Registration("L5H1 moves names", "logit_diff", "random heads", threshold=0.05, n=64).write(path)
    return lambda: Registration.read(path)


def probe_manifest(path):
    from hooklens.plugins.probing.store import Files

    load = lambda: Files(path.parent, {"a": (4, 3)}, torch.float32, "key", [[0, 1], [2, 3]])  # noqa: E731
    load().write(torch.tensor([0, 1]), {"a": torch.ones(2, 3)})
    return load


def asset_record(path):
    """Read where it is believed or not: what it records is hashed again where it is no such file."""
    from hooklens.pretrained.assets import _RECORD

    write_envelope(path, _RECORD, {"content": "0" * 64, "files": {"weights.bin": [10, 1_700_000_000_000_000_000]}})
    return lambda: read_envelope(path, _RECORD)


def run_file(path):
    from hooklens.training.run_folder import RunFolder

    RunFolder(path.parent).begin({"steps": 3, "layers": ["embed"]})
    return RunFolder(path.parent).identity


def diverged_file(path):
    from hooklens.training.run_folder import RunFolder

    RunFolder(path.parent).note_divergence("training diverged in step 2", 2)
    return RunFolder(path.parent).noted_divergence


def state_file(path):
    from hooklens.training.run_folder import RunFolder

    RunFolder(path.parent).save_state({"step": 2, "first_loss": 1.5}, {"values": torch.arange(6.0)})
    return RunFolder(path.parent).load_state


FORMATS = {
    "cache.safetensors": cache_file,
    "checkpoint.safetensors": checkpoint_file,
    "result.safetensors": result_file,
    "lens.safetensors": lens_file,
    "sweep": sweep_file,
    "circuit.json": circuit_file,
    "plan.json": plan_file,
    "activations.json": probe_manifest,
    "verified.json": asset_record,
    "run.json": run_file,
    "diverged.json": diverged_file,
    "state.safetensors": state_file,
}
#: Who else writes files, and what: none of these is a format of ours that is read again.
OTHERS = {
    "core/files.py": "the renaming itself",
    "core/envelope.py": "the envelope",
    "data/jsonl.py": "pairs as text, a line each, which people write too",
    "viz/report.py": "pages, and their tables for other programs",
    "pretrained/tokenizer.py": "the tokenizers library's files",
    "pretrained/checkpoint.py": "a tokenizer's files, to hand them to that library",
    "pretrained/assets.py": "what pip prints, and what is unpacked under a pin",
    "plugins/probing/store.py": "arrays, whose bytes the manifest covers",
    "data/story_files.py": "a temporary copy of a file of stories, for the datasets library",
    "training/row_file.py": "rows that others read while they are written, each with a checksum",
    "training/run_folder.py": "the lock of a run, without content",
    "training/run_recipe.py": "settings as TOML, which people write too",
}


def fields_of(path):
    raw = path.read_bytes()
    return json.loads(raw if path.suffix == ".json" else read_header(path).metadata["hooklens"])


def test_every_writer_of_the_library_is_here():
    """No file is written but through the envelope, and every schema has a file below."""
    writing = ("write_text", "write_bytes", "write_atomically", "open_memmap")
    for path in ROOT.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {getattr(call.func, "id", getattr(call.func, "attr", "")) for call in calls}
        opened = [ast.unparse(call) for call in calls if getattr(call.func, "id", "") == "open"]
        writes = names.intersection(writing) or [call for call in opened if "'w" in call or "'a" in call or "+" in call]
        assert not writes or path.relative_to(ROOT).as_posix() in OTHERS, path
    found = set()
    for module in pkgutil.walk_packages([str(ROOT)], "hooklens."):
        values = vars(importlib.import_module(module.name)).values()
        found |= {value for value in values if isinstance(value, Schema)}
    assert len(found) == len({schema.name for schema in found}) == len(FORMATS)


@pytest.mark.parametrize(("name", "make"), FORMATS.items(), ids=list(FORMATS))
def test_a_file_says_its_schema_version_and_digest_and_no_flipped_byte_is_read(name, make, tmp_path):
    """Of a cache's data bits, 749 of 750 were read; a checkpoint's configuration could be changed at will."""
    path = tmp_path / name
    load = make(path)
    load()
    fields = fields_of(path)
    assert fields["schema"].startswith("hooklens.") and int(fields["version"]) >= 1 and len(fields["digest"]) == 64
    whole = path.read_bytes()
    draw = random.Random(0)
    places = {0, len(whole) - 1, *draw.sample(range(len(whole)), 40)}
    for at in places:
        flipped = bytearray(whole)
        flipped[at] ^= draw.randrange(1, 256)
        path.write_bytes(flipped)
        with pytest.raises(HooklensError):
            load()
    path.write_bytes(whole)
    load()


@pytest.mark.parametrize("name", ["a.npy", "a.npy.part"])
def test_no_flipped_byte_of_a_stored_array_is_read(name, tmp_path):
    from hooklens.plugins.probing.store import Files

    def store():
        return Files(tmp_path, {"a": (4, 3)}, torch.float32, "key", [[0, 1], [2, 3]])

    filled = store()
    for rows in ([0, 1], [2, 3]):
        filled.write(torch.tensor(rows), {"a": torch.rand(2, 3)})
    if name == "a.npy":
        filled.finish()
    whole = (tmp_path / name).read_bytes()
    for at in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x09 or 1]) + whole[at + 1 :])
        with pytest.raises(HooklensError):
            store()
    (tmp_path / name).write_bytes(whole)
    assert store().done == 2


@pytest.mark.parametrize("name", FORMATS)
def test_another_kind_of_file_and_another_version_are_refused_in_words(name, tmp_path):
    path = tmp_path / name
    load = FORMATS[name](path)
    whole = path.read_bytes()
    quote, space = ('"', " ") if path.suffix == ".json" else ('\\"', "")
    version, schema = f"{quote}version{quote}:{space}", f"{quote}schema{quote}:{space}{quote}hooklen"
    for old, new, said in (
        (f"{schema}s.", f"{schema}z.", "cannot read .* another file.* write one with"),
        (f"{version}1", f"{version}0", "it has version 0 of .* reads version 1; write it again with"),
        (f"{version}1", f"{version}2", "it has version 2 of .* reads version 1; install a newer one"),
    ):
        assert whole.count(old.encode()) == 1
        path.write_bytes(whole.replace(old.encode(), new.encode()))
        with pytest.raises(FileRefused, match=said):
            load()


def test_a_changed_word_of_a_checkpoints_configuration_or_tokenizer_is_refused(tmp_path):
    load = checkpoint_file(tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    for old, new in ((b'\\"gelu_new\\"', b'\\"gelu\\"    '), (b"\\\\u0120a", b"\\\\u0120c")):
        assert old in whole
        (tmp_path / "m.safetensors").write_bytes(whole.replace(old, new))
        with pytest.raises(FileRefused, match="its content is not what its digest says"):
            load()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_exchanged_beside_a_checkpoint_is_refused(name, tmp_path):
    load = checkpoint_file(tmp_path / "m")
    assert load().tokenizer.vocab_size
    file = tmp_path / "m" / name
    file.write_text(file.read_text() + " ")
    with pytest.raises(FileRefused, match="differs from the file that was saved with the model"):
        load()
    load_checkpoint(tmp_path / "m", tokenizer=tiny_tokenizer("Ġa Ġb"))
    file.unlink()
    with pytest.raises(FileRefused, match="differs from the file that was saved with the model"):
        load()


TINY = Schema("tiny", 1, "a tiny file", "write_envelope")
TINY_JSON = Schema("tiny", 1, "a tiny file", "write_envelope", as_json=True)


def test_the_same_content_is_the_same_bytes_in_any_order_of_its_tensors(tmp_path):
    tensors = {"a": torch.ones(1).half(), "b": torch.ones(2)}
    write_envelope(tmp_path / "0", TINY, {"n": 1}, tensors)
    write_envelope(tmp_path / "1", TINY, {"n": 1}, dict(reversed(tensors.items())))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


@pytest.mark.parametrize("name", ["cache.safetensors", "checkpoint.safetensors", "result.safetensors", "circuit.json"])
def test_saving_twice_gives_the_same_bytes(name, tmp_path):
    written = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        FORMATS[name](tmp_path / folder / name)
        written.append((tmp_path / folder / name).read_bytes())
    assert written[0] == written[1]


def test_a_header_in_another_layout_or_with_more_in_it_is_refused(tmp_path):
    write_envelope(tmp_path / "a", TINY, {"n": 1}, {"x": torch.ones(2)})
    whole = (tmp_path / "a").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length], whole[8 + length :]
    assert header.endswith(b" ") and header.startswith(b'{"__metadata__":{')
    twice = header.rstrip()[:-1] + b"," + header.rstrip().rpartition(b"},")[2]
    more = header.replace(b'{"__metadata__":{', b'{"__metadata__":{"other":"1",')
    for other in (header[:-1] + b"\t", header + b" " * 8, header.replace(b",", b", ", 1), more, twice):
        (tmp_path / "a").write_bytes(len(other).to_bytes(8, "little") + other + data)
        with pytest.raises(FileRefused, match="its content is not what its digest says"):
            read_envelope(tmp_path / "a", TINY)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.uint16, torch.float8_e4m3fn],
)
def test_any_safetensors_reader_reads_the_file(dtype, tmp_path):
    tensors = {
        "scalar": torch.tensor(1).to(dtype),
        "none": torch.zeros(0, 3).to(dtype),
        "view": torch.arange(12).view(3, 4).T[1:].to(dtype),
        "wide": torch.tensor([1.5, -2.0], dtype=torch.float64),
        "odd": torch.tensor([True]),
    }
    write_envelope(tmp_path / "a", TINY, None, tensors)
    for read in (load_file(tmp_path / "a"), dict(read_envelope(tmp_path / "a", TINY).tensors())):
        assert set(read) == set(tensors)
        for name, one in tensors.items():
            assert read[name].dtype == one.dtype and read[name].shape == one.shape
            assert torch.equal(read[name].double(), one.double())


def test_a_dtype_that_no_file_holds_is_said(tmp_path):
    with pytest.raises(HooklensError, match=r"x is torch\.complex128, which a file cannot hold"):
        write_envelope(tmp_path / "a", TINY, None, {"x": torch.ones(1, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def test_a_content_that_no_reader_would_take_is_not_written(tmp_path):
    with pytest.raises(HooklensError, match=r"cannot save a tiny file: .* keep long lists"):
        write_envelope(tmp_path / "a", TINY, '"' * 26_000_000)  # four bytes each in a JSON string of a JSON text
    assert not list(tmp_path.iterdir())


def test_json_that_was_edited_is_refused(tmp_path):
    """An edit, another layout, a key twice: the file is what would be written for what it says, or it is refused."""
    path = tmp_path / "it.json"
    write_envelope(path, TINY_JSON, {"n": 1, "names": ["é", "\u202e"]})
    text = path.read_text()
    assert read_envelope(path, TINY_JSON).content == {"n": 1, "names": ["é", "\u202e"]}
    path.write_bytes(text.replace("\n", "\r\n").encode())  # as a checkout on Windows has it
    assert read_envelope(path, TINY_JSON).content["n"] == 1
    twice = text.replace('"n": 1', '"n": 2,\n  "n": 1')
    for edited in (text.replace('"n": 1', '"n": 3'), text.replace("  ", " "), twice, text + "\n", text[:-1]):
        path.write_text(edited)
        with pytest.raises(FileRefused, match="its content is not what its digest says"):
            read_envelope(path, TINY_JSON)
    for other in ("[]", "{", "[" * 10**5, '{"n": 1}', text.replace("digest", "digset")):
        path.write_text(other)
        with pytest.raises(FileRefused, match="cannot read a tiny file"):
            read_envelope(path, TINY_JSON)


def test_what_the_digest_covers_is_everything(tmp_path):
    """Schema, content, names, dtypes, shapes and bytes: each alone gives another digest."""
    path, one = tmp_path / "a", {"x": torch.zeros(2, 3)}
    digests = set()
    for schema, content, tensors in (
        (TINY, 1, one),
        (Schema("other", 1, "", ""), 1, one),
        (Schema("tiny", 2, "", ""), 1, one),
        (TINY, 2, one),
        (TINY, 1, {"y": one["x"]}),
        (TINY, 1, {"x": torch.zeros(3, 2)}),
        (TINY, 1, {"x": torch.zeros(2, 3, dtype=torch.int32)}),
        (TINY, 1, {"x": torch.ones(2, 3)}),
    ):
        write_envelope(path, schema, content, tensors)
        digests.add(fields_of(path)["digest"])
    assert len(digests) == 8
    raw = path.read_bytes()
    assert resealed(raw, lambda content: content) == raw

"""What hooklens writes knows whether it is whole: no flipped bit is read; the same content is the same bytes."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from hooklens.core.cache import ActivationCache
from hooklens.core.checksum import load_tensors, save_tensors, sealed_json, unsealed
from hooklens.core.errors import FileRefused, HooklensError
from hooklens.core.files import read_json, reading
from hooklens.pretrained.checkpoint import load_checkpoint, save
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.results.result import Result
from hooklens.testing import tiny_model

TOKENS = torch.tensor([[1, 2, 3]])


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
    import hooklens as hl

    model = tiny_model()
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    run = lambda: hl.patch(model, [[1, 2, 3]], [[1, 4, 3]], metric, resume=path)  # noqa: E731
    run()
    return run


def circuit_file(path):
    from hooklens.plugins.circuits.circuit import Circuit, circuit_of

    circuit_of(tiny_model(), ["embed->L0H1.v", "L0H1->logits"]).save_json(path)
    return lambda: Circuit.load_json(path)


def plan_file(path):
    from hooklens.results.claims import Registration

    Registration("L5H1 moves names", "logit_diff", "random heads", threshold=0.05, n=64).write(path)
    return lambda: Registration.read(path)


def probe_manifest(path):
    from hooklens.plugins.probing.gather import gather

    run = lambda: gather(tiny_model(), [[1, 2, 3], [4, 5]], folder=path.parent)  # noqa: E731
    run()
    return run


FORMATS = {
    "cache.safetensors": cache_file,
    "checkpoint.safetensors": checkpoint_file,
    "result.safetensors": result_file,
    "lens.safetensors": lens_file,
    "sweep": sweep_file,
    "circuit.json": circuit_file,
    "plan.json": plan_file,
    "activations.json": probe_manifest,
}


def content_of(path):
    """What a file says, however it is spelled."""
    raw = path.read_bytes()
    if path.suffix == ".json":
        return json.loads(raw)
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


@pytest.mark.parametrize(("name", "make"), FORMATS.items(), ids=list(FORMATS))
def test_no_flipped_bit_is_read(name, make, tmp_path):
    """Of a cache's data bits, 749 of 750 were; a checkpoint's configuration and tokenizer could be changed at will."""
    path = tmp_path / name
    load = make(path)
    load()
    whole, content = path.read_bytes(), content_of(path)
    draw = random.Random(0)
    for at in (*draw.sample(range(len(whole)), 40), len(whole) - 2, len(whole) // 2):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            if content_of(path) == content:  # an "e" in a number may be an "E"
                continue
        except ValueError:
            pass
        with pytest.raises((HooklensError, UnicodeDecodeError)):
            load()
    path.write_bytes(whole)
    load()


def test_a_changed_word_of_a_checkpoints_configuration_or_tokenizer_is_refused(tmp_path):
    load = checkpoint_file(tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    for old, new in ((b'\\"gelu_new\\"', b'\\"gelu\\"    '), (b"\\u0120a", b"\\u0120c")):
        assert old in whole
        (tmp_path / "m.safetensors").write_bytes(whole.replace(old, new))
        with pytest.raises(FileRefused, match=r"damaged: its content does not match"):
            load()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_exchanged_beside_a_checkpoint_is_refused(name, tmp_path):
    load = checkpoint_file(tmp_path / "m")
    assert load().tokenizer.vocab_size
    file = tmp_path / "m" / name
    file.write_text(file.read_text() + " ")
    with pytest.raises(FileRefused, match="from the file that was saved with the model;"):
        load()
    load_checkpoint(tmp_path / "m", tokenizer=tiny_tokenizer("Ġa Ġb"))
    file.unlink()
    with pytest.raises(FileRefused, match="from the file that was saved with the model;"):
        load()


def test_the_same_content_is_the_same_bytes_in_any_order(tmp_path):
    metadata = {name: name * 9 for name in "uvwxyz"}
    for i in range(3):
        save_tensors(tmp_path / str(i), {"a": torch.ones(1).half(), "b": torch.ones(2)}, metadata)
    turned = {name: metadata[name] for name in "zyxwvu"}
    save_tensors(tmp_path / "3", {"b": torch.ones(2), "a": torch.ones(1).half()}, turned)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(4)}) == 1


@pytest.mark.parametrize("name", ["cache.safetensors", "checkpoint.safetensors", "result.safetensors", "circuit.json"])
def test_saving_twice_gives_the_same_bytes(name, tmp_path):
    written = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        FORMATS[name](tmp_path / folder / name)
        written.append((tmp_path / folder / name).read_bytes())
    assert written[0] == written[1]


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
    save_tensors(tmp_path / "a", tensors, {"format": "x"})
    for read in (load_file(tmp_path / "a"), load_tensors(tmp_path / "a", "x", "a file")[0]):
        assert set(read) == set(tensors)
        for name, one in tensors.items():
            assert read[name].dtype == one.dtype and read[name].shape == one.shape
            assert torch.equal(read[name].double(), one.double())


def test_a_dtype_that_no_file_holds_is_said(tmp_path):
    with pytest.raises(HooklensError, match=r"x is torch\.complex128, which a file cannot hold"):
        save_tensors(tmp_path / "a", {"x": torch.ones(1, dtype=torch.complex128)}, {})
    assert not list(tmp_path.iterdir())


def test_json_that_was_edited_is_refused(tmp_path):
    path, text = tmp_path / "it.json", sealed_json({"n": 1, "names": ["é", "\u202e"]})
    assert unsealed(json.loads(text)) == {"n": 1, "names": ["é", "\u202e"]}
    for edited in (text.replace("1", "2", 1), text.replace("sha256", "sha257"), "[]", "{", "[" * 10**5, '{"n": 1}'):
        path.write_text(edited)
        with pytest.raises(FileRefused, match="it was to be read"), reading(path, "it"):
            unsealed(read_json(path, "it"))

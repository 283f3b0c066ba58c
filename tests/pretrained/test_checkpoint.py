"""Our own checkpoints: what was saved comes back, bit for bit; what is damaged or foreign does not come at all."""

import json
import stat

import pytest
import torch
from families import FAMILIES, tiny, tiny_tokens
from mutations import resealed
from refused import refused
from safetensors.torch import load_file, save_file

from hooklens.core.envelope import read_envelope, write_envelope
from hooklens.core.errors import FileRefused, InputError, Unavailable, WrongType
from hooklens.core.safetensors_file import read_header
from hooklens.model.config import HookedTransformerConfig, LinearScore, Rotary, VectorEmbed
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.checkpoint import SCHEMA, load_checkpoint, save
from hooklens.pretrained.folding import fold_ln
from hooklens.pretrained.loading import load
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model


def equal(one: HookedTransformer, other: HookedTransformer) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return one.cfg == other.cfg and mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["tiny.safetensors", "folder"])
def test_a_model_comes_back_bit_for_bit(name, form, tmp_path):
    model = tiny(name)
    save(model, tmp_path / form)
    again = load(tmp_path / form)
    assert equal(again, model)
    assert torch.equal(again(tiny_tokens()), model(tiny_tokens()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_is_kept_unless_another_is_asked_for(dtype, tmp_path):
    save(tiny("llama").to(dtype), tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").dtype == dtype
    assert load(tmp_path / "m.safetensors", dtype="float32").dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"block": "post", "positional_embedding_type": "sinusoidal"},
        {"attn_only": True, "normalization_type": None, "score_fn": LinearScore(), "mask": "none"},
        {"embed": VectorEmbed(d_in=3), "d_vocab_out": 1},
        {"positional_embedding_type": (Rotary(10.0), Rotary(20.0, interleaved=True))},
    ],
    ids=["post", "attn_only", "vectors", "by layer"],
)
def test_every_part_of_a_configuration_comes_back(changes, tmp_path):
    model = tiny_model(**changes)
    save(model, tmp_path / "m.safetensors")
    assert equal(load(tmp_path / "m.safetensors"), model)


def test_foldings_are_remembered(tmp_path):
    model = fold_ln(tiny("gpt2"))
    save(model, tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").cfg.folded == ("fold_ln",)


@pytest.mark.parametrize("form", ["m.safetensors", "folder"])
def test_the_tokenizer_is_saved_along(form, tmp_path):
    model = tiny("llama")
    model.tokenizer = tiny_tokenizer("he llo", extra=("<s>",))
    save(model, tmp_path / form)
    again = load(tmp_path / form).tokenizer
    assert again.to_tokens("hello", prepend_bos=True).equal(model.tokenizer.to_tokens("hello", prepend_bos=True))


def test_names_of_the_state_dict_are_the_format_and_a_tied_weight_is_stored_once(tmp_path):
    save(tiny("mistral"), tmp_path / "m.safetensors")
    file = read_header(tmp_path / "m.safetensors")
    assert "blocks.0.attn.q.weight" in file.entries and "unembed.linear.weight" not in file.entries
    config = json.loads(file.metadata["hooklens"])["content"]["config"]
    assert HookedTransformerConfig.from_json(config) == tiny("mistral").cfg


def test_a_saved_file_is_readable_as_any_other(tmp_path):
    save(tiny("llama"), tmp_path / "m.safetensors")
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) & 0o444
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def damaged(path, how) -> None:
    path.write_bytes(how(bytearray(path.read_bytes()), 8 + len(read_header(path).header)))


def flip(content: bytearray, start: int) -> bytes:
    content[start + 100] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda content, start: bytes(content[:-10]), "cut short"),
        (lambda content, start: bytes(content[:40]), "cut short"),
        (flip, "not what its digest says"),
        (lambda content, start: bytes(content).replace(b"n_layers", b"n_lawyer", 1), "not what its digest says"),
    ],
    ids=["truncated", "header truncated", "one bit", "configuration"],
)
def test_a_damaged_checkpoint_is_refused(how, said, tmp_path):
    path = tmp_path / "m.safetensors"
    save(tiny("llama"), path)
    damaged(path, how)
    with pytest.raises(FileRefused, match=said):
        load(path)


def test_a_checkpoint_whose_weights_were_exchanged_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save(tiny("llama"), path)
    config, weights = read_envelope(path, SCHEMA).content, load_file(path)
    write_envelope(path, SCHEMA, config, {k: v for k, v in weights.items() if "ln_final" not in k})
    with pytest.raises(FileRefused, match=r"lacks 1 of the weights of its own configuration: ln_final.weight"):
        load(path)
    write_envelope(path, SCHEMA, config, weights | {"ln_final.weight": torch.ones(3)})
    with pytest.raises(FileRefused, match=r"ln_final.weight is \[3\] instead of \[32\]"):
        load(path)


def rewritten(path, config) -> None:
    """The checkpoint with another configuration, its weights as they were."""
    path.write_bytes(resealed(path.read_bytes(), lambda content: content | {"config": content["config"] | config}))


def test_a_configuration_of_a_billion_layers_is_refused_before_any_is_made(tmp_path):
    save(tiny("llama"), tmp_path / "m.safetensors")
    rewritten(tmp_path / "m.safetensors", {"n_layers": 10**9})
    with pytest.raises(FileRefused, match=r"its configuration says 1,000,000,000 layers"):
        load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("eps", [-1.0, "1e-5", None, True])
def test_an_eps_that_gives_nan_logits_is_refused(eps, tmp_path):
    save(tiny("llama"), tmp_path / "m.safetensors")
    norm = {"part": "RMS", "eps": eps, "affine": True, "weight_offset": 0.0}
    rewritten(tmp_path / "m.safetensors", {"normalization_type": norm})
    with pytest.raises(FileRefused, match=r"eps is .*; a finite number of at least 0 is needed|TypeCheckError"):
        load(tmp_path / "m.safetensors")


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be made"):
        save(tiny("llama"), tmp_path / "file" / "model")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(
        FileRefused, match=r"another file: its schema is None and not 'hooklens.model'.*config.json included"
    ):
        load_checkpoint(tmp_path / "m.safetensors")


def test_a_model_with_adapters_is_not_saved(tmp_path):
    model = tiny("llama")
    model.blocks[0].attn.q = torch.nn.Sequential(model.blocks[0].attn.q)
    with pytest.raises(InputError, match=r"blocks.0.attn.q.0.weight.*merge adapters"):
        save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_hooks_are_not_saved(tmp_path):
    model = tiny("llama")
    model.add_hook(("z", 0), lambda act, hook: act * 0)
    save(model, tmp_path / "m.safetensors")
    assert not torch.equal(load(tmp_path / "m.safetensors")(tiny_tokens()), model(tiny_tokens()))


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save(tiny("llama"), path)
    before = path.read_bytes()
    monkeypatch.setattr("hooklens.core.files._flush", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tiny("gpt2"), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hooklens.core.files._flush", full)
    with pytest.raises(Unavailable, match="the disk is full"):
        save(tiny("llama"), tmp_path / "m.safetensors")


@pytest.mark.parametrize("given", [None, torch.nn.Linear(2, 2), "gpt2"])
def test_what_is_no_model_is_not_saved(given, tmp_path):
    with refused(WrongType, "save needs a HookedTransformer, got"):
        save(given, tmp_path / "x.safetensors")

"""Every command, with names that would act on a terminal: in models, files, prompts and arguments."""

import json

import gguf
import pytest
import torch
from core.test_terminal import EVIL, harmless
from safetensors.torch import save_file
from test_cli import CLEAN, CORRUPTED, invoke
from test_cli_methods import pairs_file  # noqa: F401  a fixture

from hooklens import cli
from hooklens.data.indirect_object import NAMES
from hooklens.pretrained import loading
from hooklens.pretrained.checkpoint import save
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model

FILE = EVIL.replace("/", "")
ONE = ["--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong-answer", " John"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A checkpoint whose name, file and tokens are hostile; most of what it says next is such a token."""
    words = "When ĠMary ĠJohn Ġand Ġwent Ġto Ġthe Ġstore Ġgave Ġa Ġdrink " + " ".join(f"Ġ{name}" for name in NAMES)
    tokenizer = tiny_tokenizer(words)
    model = tiny_model(d_vocab=tokenizer.vocab_size, n_ctx=256, model_name=EVIL)
    model.tokenizer = tokenizer
    path = tmp_path_factory.mktemp(FILE) / FILE
    save(model, path)
    return str(path)


def told(done, code=0) -> str:
    assert done.exit_code == code, done.output
    assert harmless(done.output), done.output
    return done.output


def refused(*arguments) -> str:
    text = told(invoke(*arguments), cli.BAD_INPUT)
    assert "owned" in text
    return text


def page_of(out) -> str:
    """What a page says; its scripts, Plotly among them, follow."""
    return out.read_text().partition("<script")[0]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_commands_about_a_hostile_model(hostile, tmp_path, more):
    out = tmp_path / f"{FILE}.html"
    told(invoke("patch", "--model", hostile, *ONE, "--site", "z", "--out", out, *more))
    assert harmless(page_of(out))
    told(invoke("check", hostile, *more))
    told(invoke("models", *more))
    told(invoke("plugins", *more))
    told(invoke("run", "logit_lens", "--model", hostile, "--out", out, *more))
    assert "<title>" in page_of(out) and harmless(page_of(out))
    told(invoke("generate", "--model", hostile, CLEAN + EVIL, "--max-new-tokens", 8, "--temperature", 3, *more))
    told(invoke("lens", CLEAN + EVIL, "--model", hostile, "--out", out, *more))
    assert harmless(page_of(out))
    plan = tmp_path / f"{FILE}{len(more)}.json"
    told(invoke("register", plan, "--hypothesis", EVIL, "--control", EVIL, "--n", 8, "--model", EVIL, *more))


@pytest.mark.slow
def test_studies_of_a_hostile_model(hostile, tmp_path, pairs_file):  # noqa: F811
    out = tmp_path / f"{FILE}.html"
    asked = ["--model", hostile, "--out", out]
    told(invoke("heads", "--sequences", "6", "--ioi", "0", *asked))
    told(invoke("circuit", "--pairs", pairs_file, "--edges", "12", "--draws", "100", *asked))
    told(invoke("demo", "--pairs", 8, *asked))
    texts = tmp_path / f"{FILE}.jsonl"
    words = ["Mary", "John", "Anna", "Paul", "Tom", "Sarah", "Kate", "Emma", "Jack", "Bob"]
    rows = [
        {"text": f"{word} went to the {place}", "label": EVIL + place, "group": word + EVIL}
        for word in words
        for place in ("store", "drink")
    ]
    texts.write_text("\n".join(map(json.dumps, rows)))
    told(invoke("probe", texts, "--site", "resid_pre", *asked))
    assert harmless(page_of(out))


def test_hostile_arguments_are_refused_in_plain_characters(hostile, tmp_path):
    out = tmp_path / "a.html"
    for arguments in (
        [EVIL],
        [f"--{EVIL}"],
        ["check", EVIL],
        ["check", hostile, f"--{EVIL}"],
        ["check", hostile, "--dtype", EVIL],
        ["check", hostile, "--device", EVIL],
        ["check", hostile, "--seed", EVIL],
        ["run", EVIL],
        ["generate", "--model", EVIL, "a"],
        ["patch", "--model", hostile, *ONE, "--site", EVIL, "--out", out],
        ["patch", "--model", hostile, *ONE, "--by", EVIL, "--out", out],
        ["patch", "--model", hostile, *ONE[:-1], EVIL, "--out", out],
        ["patch", "--model", hostile, *ONE, "--out", tmp_path / FILE / "a.html"],
        ["lens", "a", "--pairs", EVIL],
        ["lens", "--pairs", tmp_path / FILE],
        ["heads", "--model", hostile, "--registered", tmp_path / FILE],
        ["probe", tmp_path / FILE, "--model", hostile],
    ):
        done = invoke(*arguments)
        assert done.exit_code != 0 and harmless(done.output), (arguments, done.output)


def test_hostile_files_are_refused_in_plain_characters(hostile, tmp_path):
    save_file({f"w{EVIL}": torch.ones(1)}, tmp_path / "a.safetensors", {"hooklens": json.dumps({"schema": EVIL})})
    refused("check", tmp_path / "a.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": EVIL, EVIL: 1, "architectures": [EVIL]}))
    save_file({f"w{EVIL}": torch.ones(1)}, folder / "model.safetensors")
    refused("check", folder)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", EVIL)
    writer.add_string(f"key{EVIL}", EVIL)
    writer.add_tensor(f"t{EVIL}", torch.ones(2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused("check", tmp_path / "a.gguf")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"clean": EVIL, EVIL: EVIL}))
    refused("lens", "--pairs", tmp_path / "pairs.jsonl", "--model", hostile, "--out", tmp_path / "a.html")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": EVIL, EVIL: EVIL}))
    refused("probe", tmp_path / "texts.jsonl", "--model", hostile, "--out", tmp_path / "a.html")
    plan = tmp_path / "plan.json"
    told(invoke("register", plan, "--hypothesis", "a", "--control", "b", "--n", 8))
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"digest": EVIL}))
    out = tmp_path / "a.html"
    text = invoke("heads", "--model", hostile, "--registered", plan, "--out", out)
    assert text.exit_code == cli.BAD_INPUT and harmless(text.output)


def test_something_unexpected_is_told_in_plain_characters(hostile, monkeypatch):
    def raising(*args, **options):
        error = RuntimeError(EVIL)
        error.add_note(EVIL)
        raise error

    monkeypatch.setattr(loading, "load", raising)
    for debug in ([], ["--debug"]):
        text = told(invoke(*debug, "check", hostile), cli.FAILED)
        assert text.count("owned") >= 2


def test_a_failed_check_of_numbers_ends_with_1(hostile, monkeypatch):
    from hooklens.core.errors import CheckFailed

    failing = (_ for _ in ()).throw
    monkeypatch.setattr(loading, "load", lambda *args, **options: failing(CheckFailed("z at layer 0 differs")))
    assert "z at layer 0 differs" in told(invoke("check", hostile), cli.FAILED)

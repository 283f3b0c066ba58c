"""`hooklens grok`: a small run, resumed; runs and models that are there; settings that are refused."""

import json
import shutil

import pytest
from test_cli import invoke

import hooklens as hl
from hooklens import cli
from hooklens.model.config import VectorEmbed
from hooklens.testing import tiny_model

SMALL = ["--p", 5, "--fraction", 0.6, "--steps", 3]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grok")
    done = invoke("grok", *SMALL, "--runs", folder / "runs", "--out", folder / "page.html", "--json")
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


def test_a_run_writes_a_page_and_says_that_it_did_not_grok(made):
    folder, told = made
    assert "did not grok" in told["seed 0"] and told["rows"][0] == {
        "what": "verdict",
        "seed 0": "did not grok: never memorised",
    }
    assert "did not grok" in (folder / "page.html").read_text()
    held = json.loads((folder / "page.json").read_text())["data"]
    assert [study["class"] for study in held] == ["GrokkingStudy"]


def findings(done):
    """What a command printed before the names of its files."""
    return done.stdout.partition("\nreport")[0]


@pytest.mark.slow
def test_the_same_command_goes_on_and_the_run_and_its_model_are_analysed(made, tmp_path):
    folder, told = made
    again = invoke("grok", *SMALL, "--runs", folder / "runs", "--out", tmp_path / "a.html", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["rows"] == told["rows"]
    run = folder / "runs" / "p5_fraction0.6_decay1_seed0" / "run"
    analysed = invoke("grok", "--run", run, "--out", tmp_path / "b.html", "--json")
    assert analysed.exit_code == 0 and json.loads(analysed.stdout)["rows"] == told["rows"]
    model = sorted((run / "checkpoints").iterdir())[-1]
    alone = invoke("grok", "--model", model, *SMALL[:4], "--out", tmp_path / "c.html")
    assert alone.exit_code == 0 and "held-out accuracy" in alone.stdout and "verdict" not in alone.stdout
    beside = invoke("grok", "--model", model, "--out", tmp_path / "e.html")  # its run says which pairs
    assert beside.exit_code == 0 and findings(beside) == findings(alone)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(model.read_bytes())
    elsewhere = invoke("grok", "--model", moved, *SMALL[:4], "--seed", 0, "--out", tmp_path / "f.html")
    unsaid = invoke("grok", "--model", moved, "--p", 5, "--out", tmp_path / "g.html")  # it took a split of its own
    fast = invoke("grok", "--model", moved, "--fast", "--out", tmp_path / "g.html")
    assert fast.exit_code == cli.BAD_INPUT and "pairs it was trained; give --seed too" in fast.stderr.replace("\n", " ")
    assert unsaid.exit_code == cli.BAD_INPUT and "give --fraction, --seed too" in unsaid.stderr.replace("\n", " ")
    assert elsewhere.exit_code == 0 and findings(elsewhere) == findings(alone)
    seeded = invoke("grok", "--model", model, "--seed", 3, "--out", tmp_path / "d.html")
    assert seeded.exit_code == cli.BAD_INPUT and "trained on seed = 0, and --seed 3 is asked for" in seeded.stderr
    small = invoke("grok", "--model", model, "--fast", "--out", tmp_path / "d.html")
    assert small.exit_code == cli.BAD_INPUT and "so --fast would have no effect" in small.stderr.replace("\n", " ")
    above = invoke("grok", "--run", folder / "runs" / "p5_fraction0.6_decay1_seed0", "--out", tmp_path / "d.html")
    assert above.exit_code == cli.BAD_INPUT and f"such as {str(run)!r}" in above.stderr.replace("\n", "")
    assert "\nfinding 1: " in alone.stdout and "\nfinding 2: " in alone.stdout
    other = invoke("grok", "--run", run, "--p", 7, "--out", tmp_path / "d.html")
    assert other.exit_code == cli.BAD_INPUT and "was trained on p = 5, and --p 7 is asked for" in other.stderr
    wrong = invoke("grok", "--model", model, "--p", 7, "--out", tmp_path / "d.html")
    assert wrong.exit_code == cli.BAD_INPUT and "trained on" in wrong.stderr
    both = invoke("grok", "--model", model, "--run", run, "--out", tmp_path / "d.html")
    assert both.exit_code == cli.BAD_INPUT and "give one of them" in both.stderr
    assert not (tmp_path / "d.html").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--p", 12], "--p is a prime of at least 5 here, got 12; the closest are 11 and 13"),
        (["--p", 5, "--fraction", 1], "--fraction 1.0 leaves no pair of 25 to test on"),
        (["--seeds", 0], "--seeds is how many runs"),
        (["--weight-decay", -1], "--weight-decay is a finite number of at least 0"),
        (["--steps", 0], "error: --steps is a whole number of at least 1"),
        (["--run", "nowhere"], "'nowhere' holds no run"),
        (["--run", "r", "--fast", "--seeds", 2], "--run trains nothing, so --fast, --seeds would have no effect"),
        (["--model", "m", "--weight-decay", 2], "--model trains nothing, so --weight-decay would have no effect"),
        (["--run", "r", "--device", "cpu"], "--run trains nothing, so --device would have no effect"),
        (["--p", 1009], "--p is at most 997 here, got 1009"),
        (["--seed", 2**32 - 1, "--seeds", 2], "--seeds count from --seed 4294967295 up to 2**32 - 1; got 2"),
        (["--run", "r", "--controls"], "--run trains nothing, so --controls would have no effect"),
        (["--run", "r", "--fast", "--controls", "--runs", "z"], "nothing, so --fast, --controls, --runs would have no"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "holds shapes and no numbers"),
        (["--weight-decay", "1e30"], "--weight-decay is below 1000 at the rate 0.001, got 1e+30"),
        (["--weight-decay", 400, "--fast"], "--weight-decay is below 333.3 at the rate 0.003, got 400"),
        (["--runs", ""], "Invalid value for --runs: it is empty"),
        (["-m", ""], "Invalid value for -m: it is empty"),
        (["--out="], "Invalid value for --out: it is empty"),
    ],
)
def test_settings_are_refused_before_anything_is_written(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("grok", *options)
    assert done.exit_code == cli.BAD_INPUT and says in done.stderr.replace("\n", " "), done.output
    assert not list(tmp_path.iterdir())


def test_help_has_an_example():
    done = invoke("grok", "--help")
    assert done.exit_code == 0 and "hooklens grok --fast" in done.output


def test_a_model_that_reads_vectors_was_told_what_to_call_in_python(tmp_path):
    vectors = tiny_model(embed=VectorEmbed(3), d_vocab=1, d_vocab_out=1)
    hl.save(vectors, tmp_path / "model.safetensors")
    done = invoke(
        "grok", "--model", tmp_path / "model.safetensors", *SMALL[:4], "--seed", 0, "--out", tmp_path / "p.html"
    )
    assert done.exit_code == cli.BAD_INPUT and "--model needs a model of 'a b ='" in done.stderr.replace("\n", " ")


def test_the_folders_of_all_seeds_are_looked_at_before_the_first_is_trained(made, tmp_path):
    kept = tmp_path / "runs" / "p5_fraction0.6_decay1_seed1" / "run"
    shutil.copytree(made[0] / "runs" / "p5_fraction0.6_decay1_seed0" / "run", kept)
    done = invoke("grok", *SMALL, "--seeds", 2, "--runs", tmp_path / "runs", "--out", tmp_path / "p.html")
    assert done.exit_code == cli.BAD_INPUT and "has other settings: data.seed was 0 and is 1" in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["p5_fraction0.6_decay1_seed1"]

"""lens, heads, circuit and probe on the command line: what they write, and what they refuse."""

import json

import pytest
from test_cli import CLEAN, CORRUPTED, invoke, model_path  # noqa: F401  a fixture

from hooklens import cli, cli_methods  # noqa: F401  its commands register themselves
from hooklens.plugins.circuits.circuit import Circuit

ONE = ["--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong-answer", " John"]


@pytest.fixture
def pairs_file(tmp_path):
    rows = [
        {"clean": CLEAN, "corrupted": CORRUPTED, "answer": " Mary", "wrong_answer": " John", "group": i // 2}
        for i in range(4)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_help_has_an_example_for_every_method():
    for command in ("lens", "heads", "circuit", "probe"):
        done = invoke(command, "--help")
        assert done.exit_code == 0 and "Example:" in done.output


def test_lens_of_a_prompt_and_of_a_file(model_path, pairs_file, tmp_path):  # noqa: F811
    out = tmp_path / "lens.html"
    asked = ["--model", model_path, "--out", out]
    done = invoke("lens", CLEAN, "--answer", " Mary", "--wrong-answer", " John", "--json", *asked)
    assert done.exit_code == 0, done.output
    held = json.loads(out.with_suffix(".json").read_text())["data"]
    assert set(held) == {"lens", "trajectory", "attribution"} and json.loads(done.stdout)["rows"]
    assert out.read_text().count('class="plot"') == 3
    assert invoke("lens", CLEAN, *asked).exit_code == 0  # the answer is then the model's own
    assert invoke("lens", "--pairs", pairs_file, *asked).exit_code == 0
    for wrong in ([], [CLEAN, "--pairs", pairs_file]):
        done = invoke("lens", *wrong, *asked)
        assert done.exit_code == cli.BAD_INPUT and "one of the two" in done.stderr


def test_heads_write_a_taxonomy(model_path, tmp_path):  # noqa: F811
    out = tmp_path / "heads.html"
    done = invoke("heads", "--model", model_path, "--sequences", "6", "--ioi", "0", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    assert out.exists() and json.loads(out.with_suffix(".json").read_text())["data"]["class"] == "Taxonomy"


def test_a_circuit_is_found_tested_and_kept(model_path, pairs_file, tmp_path):  # noqa: F811
    out = tmp_path / "c.html"
    asked = ["--model", model_path, "--edges", "12", "--draws", "5", "--out", out]
    done = invoke("circuit", "--pairs", pairs_file, "--json", *asked)
    assert done.exit_code == 0, done.output
    assert Circuit.load_json(json.loads(done.stdout)["circuit"]).n_edges <= 12
    held = json.loads(out.with_suffix(".json").read_text())["data"]
    assert held["held_out"] is True and held["n_found_on"] == held["n_tested_on"] == 2
    done = invoke("circuit", *ONE, *asked)
    assert done.exit_code == 0 and "the same as in the search" in done.stdout


def test_half_a_pair_and_a_pair_beside_a_file_are_refused(model_path, pairs_file, tmp_path):  # noqa: F811
    asked = ["--model", model_path, "--out", tmp_path / "c.html"]
    done = invoke("circuit", *ONE[:4], *asked)
    assert done.exit_code == cli.BAD_INPUT and "missing: --answer, --wrong-answer" in done.stderr
    done = invoke("circuit", "--pairs", pairs_file, *ONE[:2], *asked)
    assert done.exit_code == cli.BAD_INPUT and "--clean cannot be given too" in done.stderr


def test_every_bad_line_of_a_file_is_told(model_path, tmp_path):  # noqa: F811
    path = tmp_path / "bad.jsonl"
    path.write_text('{"clean": "a"}\n{"text": "good", "label": 1}\n[]\n')
    for command in (["circuit", "--pairs", path], ["probe", path]):
        done = invoke(*command, "--model", model_path, "--out", tmp_path / "o.html")
        assert done.exit_code == cli.BAD_INPUT and "line 1:" in done.stderr and "line 3:" in done.stderr


def test_a_probe_of_labelled_texts(model_path, tmp_path):  # noqa: F811
    path, out = tmp_path / "texts.jsonl", tmp_path / "probe.html"
    words = ["Mary", "John", "Anna", "Paul", "Tom", "Sarah", "Kate", "Emma", "Jack", "Bob"]
    rows = [{"text": f"{word} went to the {place}", "label": place == "store", "group": word}
            for word in words for place in ("store", "drink")]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    done = invoke("probe", path, "--site", "resid_pre", "--model", model_path, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    told = {row[next(iter(row))]: row for row in json.loads(done.stdout)["rows"]}
    assert told and json.loads(out.with_suffix(".json").read_text())["data"]["class"] == "ProbeStudy"

"""lens, heads, circuit and probe on the command line: what they write, and what they refuse."""

import json
import re

import pytest
from test_cli import CLEAN, CORRUPTED, invoke, model_path  # noqa: F401  a fixture

from hooklens import cli
from hooklens.model.transformer import HookedTransformer
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
    assert held["class"] == "LensStudy" and json.loads(done.stdout)["rows"]
    assert out.read_text().count('class="plot"') == 3
    assert invoke("lens", CLEAN, "--seed", 3, *asked).exit_code == 0  # the answer is then the model's own
    for wrong in ([], [CLEAN, "--pairs", pairs_file]):
        done = invoke("lens", *wrong, *asked)
        assert done.exit_code == cli.BAD_INPUT and "file.jsonl" in done.stderr


def test_lens_shows_every_line_and_says_what_it_does_not_read(model_path, pairs_file, tmp_path):  # noqa: F811
    """The picture was of the first line only, and corrupted prompts and groups fell away without a word."""
    out = tmp_path / "lens.html"
    done = invoke("lens", "--pairs", pairs_file, "--model", model_path, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    told, page = json.loads(done.stdout), out.read_text()
    assert told["read"] == "the clean prompts of all 4 lines; a lens does not read the corrupted ones"
    assert told["read"] in page and page.count('class="plot"') == 2 + 4
    held = json.loads(out.with_suffix(".json").read_text())
    assert [row[0] for row in held["tables"][0]["rows"]] == [f"line {i}" for i in (1, 2, 3, 4)]
    assert held["data"]["group"] == [0, 0, 1, 1]
    assert sorted(held["data"]["held_out"]["chosen_on"] + held["data"]["held_out"]["reported_on"]) == [0, 1, 2, 3]
    assert {"q", "where chosen"} <= set(told["rows"][0]) and "Chosen by size on 2 prompts, measured on 2 others" in page


def test_a_plan_is_registered_held_against_what_is_found_and_never_dropped(model_path, pairs_file, tmp_path):  # noqa: F811
    plan, other, out = (tmp_path / name for name in ("plan.json", "other.json", "circuit.html"))
    asked = ["--control", "what random circuits keep, 97.5 % edge of 100", "--n", 2, "--threshold", 0.5, "--json"]
    run = ["circuit", "--pairs", pairs_file, "--edges", 9, "--model", model_path, "--out", out]
    assert invoke(*run).exit_code == 0
    statement = re.search(r"\d+ edges carry the answer", out.read_text()).group()  # fewer than asked for: dead ones go
    done = invoke("register", plan, "--hypothesis", statement, *asked)
    assert done.exit_code == 0, done.output
    digest = json.loads(done.stdout)["digest"]
    assert json.loads(plan.read_text())["digest"] == digest
    again = invoke("register", plan, "--hypothesis", "another", *asked)
    assert again.exit_code == cli.BAD_INPUT and "exists" in again.stderr
    assert json.loads(plan.read_text())["digest"] == digest
    absent = "8 edges carry the answer" if statement[0] != "8" else "7 edges carry the answer"
    assert invoke("register", other, "--hypothesis", absent, *asked).exit_code == 0
    done = invoke(*run, "--registered", plan, "--registered", other, "--digest", digest)
    assert done.exit_code == 0, done.output
    page = out.read_text()
    assert re.search(f"registered [^ ]*Z as {digest[:8]}", page) and "(exploratory" not in page
    assert "Plan self-dated 20" in page  # the other one: no published digest witnesses its time
    assert "no result supports it, as no claim says &#x27;" in page
    assert re.search(f"plans: Plan self-dated 20.*no claim says '{absent}'", done.stdout)
    out.unlink()
    for wrong, told in (
        ("", "64 hexadecimal digits"),
        (digest[:8], "64 hexadecimal digits"),
        ("0" * 64, "no plan has the published digest 0000"),
    ):
        done = invoke(*run, "--registered", plan, "--digest", wrong)
        assert done.exit_code in (cli.MISSING, cli.BAD_INPUT) and told in done.stderr and not out.exists()
        assert done.stderr.startswith("error: --digest"), "the error was said to be that of --registered"
    done = invoke(*run, "--registered", "")
    assert done.exit_code == cli.BAD_INPUT and "is empty, so it names no file" in done.stderr
    plan.write_text(plan.read_text().replace("0.5", "0.1"))
    done = invoke(*run, "--registered", plan)
    assert done.exit_code == cli.MISSING or done.exit_code == cli.BAD_INPUT
    assert "it was damaged or edited" in done.stderr and not out.exists()


@pytest.mark.parametrize(
    ("command", "hypothesis", "near"),
    [
        ("circuit", "9 edges carry the anser", "closest: 9 edges carry the answer"),
        ("circuit", "10 edges carry the answer", "no claim of this run named '10 edges"),
        ("heads", "L0H0 is a induction head", "closest: L0H0 is an induction head"),
    ],
)
def test_a_plan_that_no_claim_can_state_was_told_in_the_page_after_the_run(
    command,
    hypothesis,
    near,
    model_path,  # noqa: F811
    pairs_file,
    tmp_path,
    monkeypatch,
):
    plan = tmp_path / "plan.json"
    assert invoke("register", plan, "--hypothesis", hypothesis, "--control", "c", "--n", 2).exit_code == 0
    runs = []
    monkeypatch.setattr(HookedTransformer, "_run", lambda self, *args, **kwargs: runs.append(args))
    out = ["--model", model_path, "--out", tmp_path / "page.html"]
    size = ["--pairs", pairs_file, "--edges", 9] if command == "circuit" else []
    done = invoke(command, *size, *out, "--registered", plan)
    assert done.exit_code == cli.BAD_INPUT and "--registered: no claim of this run" in done.stderr and not runs
    assert near in done.stderr and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("command", ["lens", "heads", "circuit"])
def test_lines_that_the_model_cannot_use_are_all_told_before_anything_runs(
    command,
    model_path,  # noqa: F811
    pairs_file,
    tmp_path,
):
    """One error was shown, of the first of them, without file or line."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    rows[1]["answer"] = " Mary Ann"
    rows[3]["wrong_answer"] = " Mary"
    rows[2]["corrupted"] = rows[2]["corrupted"].replace("Mary gave", "Mary and John gave")
    pairs_file.write_text("\n".join(map(json.dumps, rows)))
    size = ["--edges", 10] if command == "circuit" else []  # so few exist, and a size is told with the lines
    done = invoke(command, "--pairs", pairs_file, *size, "--model", model_path, "--out", tmp_path / "o.html")
    assert done.exit_code == cli.BAD_INPUT and not (tmp_path / "o.html").exists()
    told = [line.strip().split(":")[0] for line in done.stderr.splitlines()[1:]]
    assert told == [f"line {i}" for i in ((2, 4) if command == "lens" else (2, 3, 4))]
    assert f"{pairs_file} has {len(told)} of 4 lines that this model cannot use" in done.stderr


@pytest.mark.slow
def test_heads_on_pairs_of_ones_own(model_path, pairs_file, tmp_path):  # noqa: F811
    """There was no such option: random tokens and built-in names only."""
    out = tmp_path / "heads.html"
    asked = ["heads", "--model", model_path, "--sequences", "6", "--ioi", "0", "--out", out, "--json"]
    done = invoke(*asked, "--pairs", pairs_file)
    assert done.exit_code == 0, done.output
    held = json.loads(out.with_suffix(".json").read_text())["data"]
    assert held["taxonomy"]["class"] == "Taxonomy" and held["pairs"]["class"] == "HeadStudy"
    rows = json.loads(done.stdout)["rows"]
    assert {"head", "fall", "q", "direct", "looks at answer", "on repeated tokens"} <= set(rows[0])
    page = out.read_text()
    assert "on 4 prompt pairs</h1>" in page and "Attention heads by function, on random tokens" in page
    done = invoke(*asked, *ONE)
    assert done.exit_code == 0 and "q" not in json.loads(done.stdout)["rows"][0]  # one pair: nothing to test on
    done = invoke(*asked, *ONE[:2])
    assert done.exit_code == cli.BAD_INPUT and "missing: --corrupted" in done.stderr


def test_heads_write_a_taxonomy(model_path, tmp_path):  # noqa: F811
    out = tmp_path / "heads.html"
    done = invoke("heads", "--model", model_path, "--sequences", "6", "--ioi", "0", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    assert out.exists() and json.loads(out.with_suffix(".json").read_text())["data"]["class"] == "Taxonomy"


def test_a_circuit_is_found_tested_and_kept(model_path, pairs_file, tmp_path):  # noqa: F811
    out = tmp_path / "c.html"
    asked = ["--model", model_path, "--edges", "12", "--draws", "100", "--out", out]
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


def test_texts_that_do_not_fit_the_model_are_all_told(model_path, tmp_path):  # noqa: F811
    path = tmp_path / "texts.jsonl"
    texts = ["When Mary", "When" + " Mary" * 300, "When John", "When" + " John" * 400]
    path.write_text("\n".join(json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)))
    done = invoke("probe", path, "--model", model_path, "--out", tmp_path / "probe.html")
    assert done.exit_code == cli.BAD_INPUT
    assert "line 2: 301 tokens do not fit" in done.stderr and "line 4: 401 tokens" in done.stderr


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


@pytest.mark.slow
def test_lens_printed_components_only_and_no_word_of_what_they_are(model_path, pairs_file, tmp_path):  # noqa: F811
    """Neither what the numbers are nor what the stream says layer by layer, for which there is a lens."""
    for given in (["When Mary and John went", "--answer", " to"], ["--pairs", pairs_file]):
        asked = ["lens", *given, "--model", model_path, "--out", tmp_path / "o.html"]
        told = invoke(*asked).output.splitlines()
        at = [i for i, line in enumerate(told) if line.startswith(("stream ", "component "))]
        assert len(at) == 2, told
        assert "layer" in told[at[0] - 1] and "other positions" in told[at[0] - 1]  # what control is
        assert "component to the answer's logit" in told[at[1] - 1]
        streams = [line.split()[0] for line in told[at[0] + 1 : at[1] - 1]]
        assert streams == ["0_pre", "1_pre", "final_post"]
        assert set(json.loads(invoke(*asked, "--json").output)) >= {"rows", "layers"}


@pytest.mark.parametrize("command", ["heads", "circuit", "patch"])
def test_tables_were_printed_without_a_caption(command, model_path, pairs_file, tmp_path):  # noqa: F811
    given = {
        "heads": ["--pairs", pairs_file, "--sequences", 6, "--ioi", 0],
        "circuit": ["--pairs", pairs_file, "--edges", 10],
        "patch": ["--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong-answer", " John"],
    }[command]
    told = invoke(command, *given, "--model", model_path, "--out", tmp_path / "o.html").output.splitlines()
    assert "logit difference" in told[0] and told[0].endswith("."), told[:3]

"""The command line: what it prints, writes and answers, and the code that it ends with."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import hooklens as hl
from hooklens import cli
from hooklens.cli.output import show
from hooklens.data.indirect_object import NAMES
from hooklens.pretrained.checkpoint import save
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model

CLEAN, CORRUPTED = (f"When Mary and John went to the store, {name} gave a drink to" for name in ("John", "Mary"))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A random model whose tokenizer knows the names, as a checkpoint folder."""
    words = "When ĠMary ĠJohn Ġand Ġwent Ġto Ġthe Ġstore Ġgave Ġa Ġdrink " + " ".join(f"Ġ{name}" for name in NAMES)
    tokenizer = tiny_tokenizer(words)
    model = tiny_model(d_vocab=tokenizer.vocab_size, n_ctx=256)
    model.tokenizer = tokenizer
    path = tmp_path_factory.mktemp("model") / "tiny"
    save(model, path)
    return str(path)


COMMAND = [sys.executable, "-B", "-c", "from hooklens.cli import main; main()"]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def patch_arguments(model_path, out, *more, answer=" Mary"):
    prompts = ["--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", answer, "--wrong-answer", " John"]
    return ["patch", "--model", model_path, *prompts, "--out", out, *more]


def test_help_has_an_example_for_every_command():
    for command in ("demo", "patch", "models", "check", "plugins", "run", "generate"):
        done = invoke(command, "--help")
        assert done.exit_code == 0
        assert "Example:" in done.output


def test_version():
    done = invoke("--version")
    assert (done.exit_code, done.output.split()) == (0, ["hooklens", hl.__version__])


def test_models_and_plugins_as_tables_and_as_json():
    assert "smollm2-135m-instruct" in invoke("models").output
    rows = json.loads(invoke("models", "--json").output)["rows"]
    assert rows[0]["source"] == "smollm2-135m-instruct"
    plugins = {row["plugin"] for row in json.loads(invoke("plugins", "--json").output)["rows"]}
    assert {"patch", "find_name_movers", "study_ioi"} <= plugins


def test_patch_writes_a_report_with_its_numbers_beside_it(model_path, tmp_path):
    out = tmp_path / "ioi.html"
    sites = ["--site", "resid_pre", "--site", "z", "--site", "mlp_out"]
    done = invoke(*patch_arguments(model_path, out, *sites, "--json"))
    assert done.exit_code == 0, done.output
    assert {row["site"] for row in json.loads(done.stdout)["rows"]} == {"resid_pre", "z", "mlp_out"}
    page, numbers = out.read_text(), json.loads(out.with_suffix(".json").read_text())
    assert page.count('class="plot"') == 6  # three sites, two bar charts, the heads' patterns
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ioi.html", "ioi.json"]
    model = hl.load(model_path)
    metric = hl.logit_diff(model, answer=" Mary", wrong_answer=" John")
    sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site="z")
    told = torch.tensor(numbers["data"]["sweeps"]["z"]["per_pair"])
    torch.testing.assert_close(told, sweep.per_pair)


def test_words_of_the_user_are_text_in_the_report(model_path, tmp_path):
    out = tmp_path / "a.html"
    arguments = patch_arguments(model_path, out, "--site", "resid_pre")
    nasty = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    arguments[arguments.index(CLEAN)] = CLEAN + nasty
    arguments[arguments.index(CORRUPTED)] = CORRUPTED + nasty
    assert invoke(*arguments).exit_code == 0
    assert "<script>alert" not in out.read_text() and "<img" not in out.read_text()


def test_an_answer_of_several_tokens_is_shown_and_its_first_offered(model_path, tmp_path):
    done = invoke(*patch_arguments(model_path, tmp_path / "a.html", answer=" Mary Ann"))
    assert done.exit_code == cli.BAD_INPUT
    assert "[' Mary', ' Ann']" in done.stderr or "' Mary', its first" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_prompts_of_different_length_say_where_they_part_and_go_by_layer(model_path, tmp_path):
    arguments = patch_arguments(model_path, tmp_path / "a.html", "--site", "resid_pre")
    arguments[arguments.index(CORRUPTED)] = CORRUPTED.replace("Mary gave", "Mary and John gave")
    done = invoke(*arguments)
    assert done.exit_code == cli.BAD_INPUT
    assert "first difference at" in done.stderr and "by layer" in done.stderr
    done = invoke(*arguments, "--by", "layer")
    assert done.exit_code == 0, done.output


def test_a_grid_is_for_the_sites_that_have_its_axes(model_path, tmp_path):
    out = tmp_path / "a.html"
    arguments = patch_arguments(model_path, out, "--site", "z", "--site", "resid_pre", "--by", "layer x head x pos")
    assert invoke(*arguments).exit_code == 0
    sweeps = json.loads(out.with_suffix(".json").read_text())["data"]["sweeps"]
    assert sweeps["z"]["by"] == ["layer", "head", "pos"] and sweeps["resid_pre"]["by"] == ["layer", "pos"]
    done = invoke(*patch_arguments(model_path, out, "--site", "z", "--by", "nonsense"))
    assert done.exit_code == cli.BAD_INPUT and "z can be swept by layer" in done.stderr


def test_a_demo_as_json_and_a_seed_that_would_do_nothing(model_path):
    done = invoke("run", "patch", "--json")
    assert done.exit_code == 0 and {"resid_pre", "metric"} <= set(json.loads(done.stdout)["rows"][0])
    done = invoke("run", "patch", "--model", model_path, "--seed", "3")
    assert done.exit_code == cli.BAD_INPUT and "leave out one of them" in done.stderr


def test_where_nothing_can_be_written_nothing_is_loaded(tmp_path):
    missing = invoke(*patch_arguments("no/such/model.gguf", tmp_path / "no" / "a.html"))
    assert missing.exit_code == cli.BAD_INPUT and "there is no folder" in missing.stderr
    taken = invoke("demo", "--model", "no/such/model.gguf", "--out", tmp_path / "a.json")
    assert taken.exit_code == cli.BAD_INPUT and "a.html" in taken.stderr
    if os.geteuid() != 0:  # root may write everywhere
        tmp_path.chmod(0o500)
        done = invoke("demo", "--out", tmp_path / "a.html")
        tmp_path.chmod(0o700)
        assert done.exit_code == cli.MISSING and "read-only" in done.stderr


def test_an_unknown_site_plugin_device_or_model_is_bad_input(model_path, tmp_path):
    asked = [
        patch_arguments(model_path, tmp_path / "a.html", "--site", "resid_pos"),
        ["run", "patchin"],
        ["check", model_path, "--device", "warp"],
        ["check", "no/such/file.gguf"],
        ["check", model_path, "--dtype", "int3"],
        ["nonsense"],
    ]
    for arguments in asked:
        done = invoke(*arguments)
        assert done.exit_code == cli.BAD_INPUT, (arguments, done.output)
    assert "resid_post" in invoke(*asked[0]).stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_something_missing(model_path):
    done = invoke("check", model_path, "--device", "cuda")
    assert done.exit_code == cli.MISSING and "the device 'cuda' cannot be used here" in done.stderr


def test_debug_shows_where_an_error_was_raised():
    assert "Traceback" not in invoke("check", "no/such/file.gguf").stderr
    assert "Traceback" in invoke("--debug", "check", "no/such/file.gguf").stderr


def test_something_unexpected_ends_with_1_and_says_how_to_see_more(monkeypatch):
    def broken():
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr("hooklens.pretrained.loading.models", broken)
    done = invoke("models")
    assert done.exit_code == cli.FAILED and "ZeroDivisionError: by nought" in done.stderr and "--debug" in done.stderr


def test_check_ends_with_1_where_something_does_not_hold(model_path, tmp_path):
    assert invoke("check", model_path).exit_code == 0
    broken = hl.load(model_path)
    with torch.no_grad():
        broken.blocks[0].mlp.out.weight[0, 0] = float("nan")
    save(broken, tmp_path / "broken")
    done = invoke("check", tmp_path / "broken", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == cli.FAILED and told["ok"] is False
    assert [row["ok"] for row in told["rows"][:1]] == [False] and told["rows"][0]["measured"] == 1.0


def test_an_interrupted_patch_goes_on_where_it_stopped(model_path, tmp_path, monkeypatch):
    from hooklens.sweeps.resume import Progressed

    arguments, saves = patch_arguments(model_path, tmp_path / "a.html", "--site", "resid_pre"), []
    save = Progressed.save

    def save_and_stop(self, *finished):
        save(self, *finished)
        saves.append(finished)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progressed, "save", save_and_stop)
    done = invoke(*arguments)
    assert done.exit_code == cli.INTERRUPTED
    (part,) = tmp_path.iterdir()
    assert part.name in done.stderr and "continues from there" in done.stderr
    monkeypatch.setattr(Progressed, "save", save)
    done = invoke(*arguments)
    assert done.exit_code == 0 and f"continuing from {part}" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json"]


def test_run_prints_a_plugins_demo_and_writes_its_figure(tmp_path):
    out = tmp_path / "run.html"
    done = invoke("run", "patch", "--out", out, "--dtype", "float64")
    assert done.exit_code == 0, done.output
    assert "recovered" in done.output and str(out) in done.output
    assert out.exists()


def test_generate_prints_text_and_repeats_with_a_seed(model_path):
    arguments = ["generate", "When Mary", "--model", model_path, "--max-new-tokens", 5, "--temperature", 1, "--seed", 3]
    first, second = invoke(*arguments, "--json"), invoke(*arguments, "--json")
    assert first.exit_code == 0 and first.stdout == second.stdout
    assert len(json.loads(first.stdout)["tokens"]) == 5
    assert invoke(*arguments).exit_code == 0
    assert invoke(*arguments, "--chat").exit_code == cli.BAD_INPUT  # no chat template


def test_demo_writes_its_report_for_any_model_with_the_names(model_path, tmp_path):
    out = tmp_path / "demo.html"
    done = invoke("demo", "--model", model_path, "--pairs", 8, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["report"] == str(out)
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert len(numbers["data"]["pairs"]["clean"]) == 8
    assert invoke("demo", "--model", model_path, "--pairs", 6, "--out", out).exit_code == cli.BAD_INPUT


def test_the_installed_command_answers():
    done = subprocess.run([*COMMAND, "check", "no/such/file.gguf"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a process's files")
def test_on_a_full_disk_a_report_ends_with_3_and_leaves_no_half_file(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        done = invoke("run", "patch", "--out", tmp_path / "a.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.exit_code == cli.MISSING and "the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reader_that_has_heard_enough_ends_it_quietly():
    """As in `hooklens models --json | head -1`: it used to report an unexpected BrokenPipeError."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*COMMAND, "models", "--json"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(write)
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")
def test_a_full_standard_error_changes_neither_the_exit_code_nor_raises():
    command = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh", *COMMAND, "generate", "x", "--model", "no/file.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr, "unexpected" in done.stderr) == (2, False, False)


def test_a_table_without_standard_output_is_silent(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python sets it if it was closed before the start
    assert show(hl.Table(("a",), [(1,)]), False, more={"b": 2}) is None


def test_a_bar_without_standard_error_is_silent(monkeypatch):
    from hooklens.core.progress_bar import progress

    monkeypatch.setattr(sys, "stderr", None)  # what Python makes of one that was closed before the start
    with progress("counting", 1) as advance:
        advance()


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--help"], {}, "--install-completion"),
        (["patch", "--help"], {}, "--wrong-answer"),
        (["grok", "--help"], {}, "--weight-decay"),
        ([], {"_HOOKLENS_COMPLETE": "complete_bash", "COMP_WORDS": "hooklens pa", "COMP_CWORD": "1"}, "patch"),
    ],
)
def test_help_and_completion_do_not_wait_for_torch(arguments, environment, says):
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); import hooklens.cli as c; c.main()"
    )
    environment = os.environ | environment
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and says in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.slow
def test_the_whole_demo_on_smollm2(tmp_path, request):
    sys.path.insert(0, str(request.config.rootpath / "tests" / "viz"))
    from browser import open_page

    out = tmp_path / "demo.html"
    done = invoke("demo", "--pairs", 16, "--out", out)
    assert done.exit_code == 0, done.output
    assert "L23H0  name mover" in done.output
    page = open_page(out)
    assert page.console == [] and page.requests == []
    assert page.figures == 6


def test_a_demo_printed_numbers_without_a_word_of_what_they_are():
    """`hooklens run logit_lens` printed eight columns, one of them "control", and nothing else."""
    told = invoke("run", "logit_lens").output
    opening, demo, *_, control = told.splitlines()
    assert opening.startswith("Logit lens: unembed the residual stream before every block")
    assert demo.startswith("A demo. The lens on two short prompts") and "tiny and random" in demo
    assert control.startswith("control: the median rank of the same answer in the streams of other positions")
    assert set(json.loads(invoke("run", "logit_lens", "--json").output)) == {"rows"}


def test_check_printed_counts_with_exponents(model_path, capsys):
    """The largest id of a tokenizer with 49152 tokens came out as 4.92e+04."""
    from hooklens.pretrained.model_check import CheckReport

    texts = CheckReport("m", [("the tokenizer's largest id", 49151.0, 49151.0, True)]).table().rows
    assert texts[0][1:3] == ("49,151", "49,151")
    assert "e+0" not in invoke("check", model_path).output


def test_the_same_folder_was_told_twice(model_path, tmp_path):
    """A long path stood at the end of every command once for the page and once more for its numbers."""
    out = tmp_path / "a" / "ioi.html"
    out.parent.mkdir()
    done = invoke(*patch_arguments(model_path, out, "--site", "resid_pre"))
    assert done.exit_code == 0, done.output
    assert done.output.count(str(out.parent)) == 1
    assert f"report: {out}\nnumbers: ioi.json, beside it\n" in done.output
    as_json = json.loads(invoke(*patch_arguments(model_path, out, "--site", "resid_pre", "--json")).output)
    assert as_json["numbers"] == str(out.with_suffix(".json"))  # whole, for programs


def test_the_list_of_plugins_fits_80_columns_in_a_pipe():
    text = invoke("plugins").output
    assert max(map(len, text.splitlines())) <= 80
    said = " ".join(text.split())
    rows = json.loads(invoke("plugins", "--json").output)["rows"]
    assert all(row["plugin"] in said for row in rows) and "Zero, mean and resample" in said  # wrapped, and not cut

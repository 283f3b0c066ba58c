"""Questions that have no answer are refused before the model runs, and the message names the options given."""

import json
import time

import pytest
import torch
from test_cli import CLEAN, CORRUPTED, invoke, model_path  # noqa: F401  a fixture

import hooklens as hl
from hooklens import cli
from hooklens.cli import estimates
from hooklens.core.errors import ArgumentError, InputError, Unavailable
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.checkpoint import save
from hooklens.testing import tiny_model

PAIR = {"--clean": CLEAN, "--corrupted": CORRUPTED, "--answer": " Mary", "--wrong-answer": " John"}


def pair(**changes):
    given = PAIR | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [part for option in given.items() for part in option]


REFUSED = [
    (["patch", *pair(answer=" John")], ["--answer and --wrong-answer are the same token ' John'"]),
    (["patch", *pair(corrupted=CLEAN)], ["--clean and --corrupted are the same"]),
    (["patch", *pair(answer="zzz")], ["--answer: 'zzz' is 3 tokens"]),
    (["patch", *pair(), "--by", "layer x banana"], ["--by", "'layer x pos'"]),
    (["patch", *pair(), "--out", "."], ["--out '.' is a folder"]),
    (["patch", *pair(corrupted="When Mary")], ["--clean and --corrupted must tokenise", "--by='layer'"]),
    (["lens", CLEAN, "--answer", " Mary", "--wrong-answer", " Mary"], ["--answer and --wrong-answer are the same"]),
    (["heads", "--ioi", "3"], ["--ioi is", "a multiple of 4", "got 3; use 4"]),
    (["heads", "--sequences", "1"], ["--sequences is", "at least 6"]),
    (["heads", *pair(answer=" John")], ["--answer and --wrong-answer are the same"]),
    (["heads", *pair(corrupted=CLEAN)], ["--clean and --corrupted are the same"]),
    (["circuit", *pair(), "--edges", "99999999"], ["--edges is", "at least 1, at most the 46 edges of this model"]),
    (["circuit", *pair(), "--edges", "0"], ["--edges is", "at least 1"]),
    (["circuit", *pair(), "--draws", "99"], ["--draws must be at least 100 random circuits", "got 99"]),
    (["circuit", *pair(answer=" John")], ["--answer and --wrong-answer are the same"]),
    (["circuit", *pair(corrupted=CLEAN)], ["--clean and --corrupted are the same"]),
    (["demo", "--pairs", "6"], ["--pairs is", "a multiple of 4", "got 6; use 4 or 8"]),
    (["generate", "When", "--max-new-tokens", "0"], ["--max-new-tokens is", "at least 1"]),
    (["generate", "When", "--temperature", "-1"], ["--temperature must be 0"]),
    (["generate", "When", "--seed", "-1"], ["--seed"]),
    (["patch", *pair(), "--seed", str(2**70)], ["--seed", "4294967295"]),
    (
        ["lens", CLEAN, "--dtype", "float8"],
        ["error: --dtype is one of float32, float64, bfloat16, float16; got 'float8'"],
    ),
    (["generate", "When", "--seed", "x"], ["--seed': it must be a valid integer"]),
    (["register", "p.json", "--hypothesis", "h", "--control", "c", "--n", "0"], ["--n is", "at least 2"]),
    (
        ["register", "p.json", "--hypothesis", "h", "--control", "c", "--n", "8", "--threshold", "nan"],
        ["--threshold must"],
    ),
]


@pytest.mark.parametrize(("arguments", "told"), REFUSED)
def test_a_degenerate_question_was_answered_or_refused_after_minutes(
    arguments,
    told,
    model_path,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Pages of NaN with exit code 0, a refusal after 499 s in the last line, or one by a name that is no option."""
    runs = []
    monkeypatch.setattr(HookedTransformer, "_run", lambda self, *args, **kwargs: runs.append(args))
    model = [] if arguments[0] == "register" else ["--model", model_path]
    out = [] if arguments[0] in ("register", "generate") or "--out" in arguments else ["--out", tmp_path / "o.html"]
    done = invoke(*arguments, *model, *out)
    said = " ".join(done.stderr.split())
    assert done.exit_code == cli.BAD_INPUT and not runs, said
    assert all(part in said for part in told), said
    assert "Value error" not in said and "Input should" not in said  # the words of typer's validator
    assert not list(tmp_path.glob("o.*"))


def test_a_model_without_a_tokenizer_is_refused_in_words_of_the_command_line(tmp_path):
    save(tiny_model(), tmp_path / "tiny")
    for arguments in (["patch", *pair()], ["demo"], ["lens", "When"], ["circuit", *pair()], ["generate", "When"]):
        done = invoke(*arguments, "--model", tmp_path / "tiny")
        assert done.exit_code == cli.BAD_INPUT and "has no tokenizer, and this command reads text" in done.stderr


def test_in_python_the_arguments_are_named():
    model, metric = tiny_model(), hl.logit_diff(tiny_model(), answer=1, wrong_answer=2)
    with pytest.raises(ArgumentError, match=r"answer and wrong_answer are the same token '3' \(pair 1\), so"):
        hl.logit_diff(model, answer=[1, 3], wrong_answer=[2, 3])
    for value in ("clean", "corrupted"):
        with pytest.raises(ArgumentError, match="clean and corrupted are the same tokens"):
            hl.patch(model, [[1, 2]], [[1, 2]], metric, value=value)
    hl.patch(model, [[1, 2]], [[1, 2]], metric, value="zero")  # which is a question
    with pytest.raises(ArgumentError, match="by is the grid: z can be swept by layer and any of head, pos"):
        hl.patch(model, [[1, 2]], [[1, 3]], metric, site="z", by="layer x neuron")


def test_values_in_a_message_are_not_taken_for_names():
    error = ArgumentError("{answer} is {0!r}, {1}", "{answer}", "{0}")
    assert str(error) == "answer is '{answer}', {0}"
    assert error.told({"answer": "--answer"}) == "--answer is '{answer}', {0}"


def test_an_empty_name_was_the_current_folder():
    for name in ("", "  "):
        with pytest.raises(InputError, match=r"is empty.*hooklens models"):
            hl.load(name)


@pytest.mark.parametrize(
    ("name", "near"), [("smollm2", "closest: smollm2-135m-instruct"), ("gpt2", "smollm2-135m-instruct")]
)
def test_a_name_that_cannot_be_fetched_is_told_what_can_be_loaded(name, near, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Unavailable, match=f"{near}.*`hooklens models` lists all"):
        hl.load(name)


def test_a_device_that_is_not_there_was_torchs_bare_assertion(model_path):  # noqa: F811
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match=r"the device 'cuda' cannot be used here"):
            hl.load(model_path, device="cuda")
    with pytest.raises(InputError, match="'warp' is not a device; use cpu"):
        hl.load(model_path, device="warp")


def test_a_command_of_more_than_a_minute_says_so_first(model_path, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(estimates, "seconds_a_token", lambda model: 10.0)
    out = ["--model", model_path, "--out", tmp_path / "o.html"]

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hooklens.studies.ioi_study.study_ioi", stop)
    monkeypatch.setattr("hooklens.plugins.heads.classify_heads", stop)
    monkeypatch.setattr("hooklens.studies.pair_study.study_pair", stop)
    for arguments in (["patch", *pair()], ["demo", "--pairs", 4], ["heads", "--sequences", 6, "--ioi", 0]):
        done = invoke(*arguments, *out)
        first = done.stderr.splitlines()[0]
        assert done.exit_code == cli.INTERRUPTED and first.startswith("this will take about ") and "Ctrl-C" in first
    monkeypatch.undo()
    assert invoke("patch", *pair(), *out).stderr == ""


def test_no_estimate_was_given_before_check_run_probe_lens_and_generate(model_path, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"a{i}", "label": i % 2}) + "\n" for i in range(20))
    )
    monkeypatch.setattr(estimates, "_seconds_of_a_pass", lambda model, inputs: 1e4)
    out = ["--out", tmp_path / "o.html"]
    commands = [
        ["check", model_path],
        ["run", "patch", "--model", model_path],
        ["lens", CLEAN, "--model", model_path, *out],
        ["generate", "When", "--model", model_path, "--max-new-tokens", 2],
        ["probe", tmp_path / "texts.jsonl", "--model", model_path, *out],
        ["heads", *pair(), "--sequences", 6, "--ioi", 0, "--model", model_path, *out],
    ]
    for command in commands:
        done = invoke(*command)
        assert done.exit_code == 0, done.output
        assert done.stderr.startswith("this will take about "), (command, done.stderr)


def test_the_evaluation_of_a_circuit_was_foretold_as_short_as_its_search(model_path, monkeypatch):  # noqa: F811
    """Its module had been renamed, and the estimate looked for the old name: forty times too short."""
    tokens = []

    def stop(model, n):
        tokens.append(n)
        raise KeyboardInterrupt

    monkeypatch.setattr(estimates, "how_long", stop)
    for plugin in ("eap", "evaluate_circuit", "classify_heads", "patch"):
        assert invoke("run", plugin, "--model", model_path).exit_code == cli.INTERRUPTED
    assert tokens[1] == 40 * tokens[0] and tokens[0] > tokens[2] > tokens[3]


def test_a_check_is_about_as_many_passes_as_are_foretold(model_path, monkeypatch):  # noqa: F811
    from hooklens.pretrained.model_check import check

    model, passes = hl.load(model_path), []
    plain = HookedTransformer._run
    monkeypatch.setattr(HookedTransformer, "_run", lambda self, *a, **k: (passes.append(1), plain(self, *a, **k))[1])
    check(model)
    assert 0.5 < 20 / len(passes) < 2, len(passes)


@pytest.mark.parametrize("by", [("layer", "pos"), ("layer", "head"), ("layer", "head", "pos")])
def test_the_work_that_is_foretold_is_about_what_is_done(by):
    model, n_pos = tiny_model(n_layers=6, n_ctx=32), 20
    clean = [[i % 11 for i in range(n_pos)]]
    corrupted = [[5, *clean[0][1:]]]
    site = "resid_pre" if "head" not in by else "z"
    with hl.engine(verify=0):
        sweep = hl.patch(model, clean, corrupted, hl.logit_diff(model, answer=1, wrong_answer=2), site=site, by=by)
    told = estimates.of_patch(model, n_pos, [by]) - model.cfg.n_layers * n_pos  # without the whole layers
    assert 0.5 < told / (sweep.computed * sweep.values.numel() * n_pos) < 2


def test_the_demo_ends_with_the_full_path_and_what_was_found(model_path, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    done = invoke("demo", "--model", model_path, "--pairs", 4, "--out", "demo.html")
    finding, report, numbers = done.stdout.splitlines()[-3:]
    assert (
        finding.startswith("finding: ")
        and finding.removeprefix("finding: ")[:40] in (tmp_path / "demo.html").read_text()
    )
    assert report == f"report: {tmp_path / 'demo.html'}" and numbers == "numbers: demo.json, beside it"


def test_the_page_of_a_demo_says_what_the_method_is_for_and_that_its_model_is_random(model_path, tmp_path):  # noqa: F811
    out = tmp_path / "o.html"
    assert invoke("run", "patch", "--out", out).exit_code == 0
    page = out.read_text()
    assert "Activation patching: overwrite one site" in page and "tiny and random" in page
    done = invoke("run", "patch", "--out", out, "--model", model_path, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["report"] == str(out)
    assert "tiny and random" not in out.read_text()


ALL_AT_ONCE = [
    (
        ["circuit", "--edges", "0", "--draws", "9", "--pairs", "no.jsonl", "--model", "no.gguf", "--device", "xx"],
        [
            "--pairs",
            "no.jsonl",
            "--edges is",
            "--draws must",
            "--model: 'no.gguf': there is no such file",
            "--device: 'xx'",
        ],
    ),
    (
        ["heads", "--sequences", "1", "--ioi", "3", "--pairs", "no.jsonl", "--registered", "no.json"],
        ["--sequences is", "--ioi is", "--pairs", "--registered", "no.json"],
    ),
    (
        ["patch", *pair(answer=" John", corrupted=CLEAN), "--site", "nope", "--model", "no.gguf"],
        [
            "--answer and --wrong-answer are",
            "--clean and --corrupted are",
            "--site: no site to sweep named 'nope'",
            "z",
        ],
    ),
    (
        ["lens", "--answer", " a", "--wrong-answer", " a"],
        ["give either PROMPT or --pairs", "--answer and --wrong-answer"],
    ),
    (["probe", "no.jsonl", "--site", "nope"], ["TEXTS: ", "no.jsonl", "--site: no site named 'nope'"]),
    (["demo", "--pairs", "3", "--device", "xx"], ["--pairs is", "--device: 'xx' is not a device"]),
    (
        ["run", "nope", "--model", "m.gguf", "--seed", "3"],
        ["PLUGIN: no plugin", "`hooklens plugins`", "--seed 3", "--model: "],
    ),
    (["generate", "hi", "--max-new-tokens", "0", "--temperature", "-1"], ["--max-new-tokens is", "--temperature must"]),
    (["check", "m.gguf", "--device", "xx"], ["MODEL: 'm.gguf': there is no such file", "--device: 'xx'"]),
    (
        ["register", "p.json", "--hypothesis", " ", "--control", "c", "--n", "0", "--threshold", "-1"],
        ["--hypothesis is empty", "--n is", "--threshold must"],
    ),
]


@pytest.mark.parametrize(("arguments", "told"), ALL_AT_ONCE)
def test_of_several_wrong_options_only_the_first_was_told(arguments, told, tmp_path, monkeypatch):
    """`circuit --edges 0 --pairs no.jsonl` spoke of the file only; the number came up in the next try."""
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    said = " ".join(done.stderr.split())
    assert done.exit_code == cli.BAD_INPUT and all(part in said for part in told), said
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_or_site_was_answered_in_words_of_python(model_path, tmp_path, monkeypatch):  # noqa: F811
    """Names of arguments and calls of `hl.` mean nothing to somebody at the command line."""
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"a{i}", "label": i % 2}) + "\n" for i in range(8))
    )
    commands = [["patch", *pair()], ["probe", "texts.jsonl"], ["run", "patch"], ["circuit", *pair()], ["lens", "a"]]
    for command in commands:
        said = invoke(*command, "--model", "nope").stderr
        assert said.startswith("error: --model: there is no asset, file or folder named 'nope' (assets: smollm2"), said
        assert "`hooklens models` lists all" in said and "hl." not in said and "load(" not in said
    for command in commands[:2]:
        for site in ("nope", "blocks.0.attn.hook_nope", "blocks.7.hook_resid_post"):
            said = invoke(*command, "--site", site, "--model", model_path).stderr
            assert said.startswith("error: --site") and not set(said.split()) & {"site=", "hl."}, said
    said = invoke(*commands[0], "--site", "blocks.0.attn.hook_z", "--model", model_path).stderr
    assert said.startswith("error: --site is swept at every layer, and 'blocks.0.attn.hook_z'") and "give 'z'" in said


def test_what_a_post_norm_model_cannot_do_was_told_with_calls_of_python(model_path, tmp_path):  # noqa: F811
    tokenizer = hl.load(model_path).tokenizer
    model = tiny_model(block="post", d_vocab=tokenizer.vocab_size, n_ctx=256)
    model.tokenizer = tokenizer
    save(model, tmp_path / "post")
    for command in (["circuit", *pair()], ["heads", *pair()], ["demo", "--pairs", "4"]):
        done = invoke(*command, "--model", tmp_path / "post", "--out", tmp_path / "o.html")
        assert done.exit_code == cli.BAD_INPUT and "activation patching of z" in done.stderr, done.stderr
        assert "hl." not in done.stderr


def test_an_interrupted_command_named_an_argument_of_python(model_path, tmp_path, monkeypatch):  # noqa: F811
    """`hl.patch(..., resume=path)` is nothing that `hooklens heads` has."""
    from hooklens.plugins.patching import activation

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(activation, "execute", stop)
    done = invoke("heads", *pair(), "--model", model_path, "--out", tmp_path / "o.html")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (cli.INTERRUPTED, "interrupted")


def test_one_disturbed_pass_does_not_make_the_estimate_ten_times_too_long(monkeypatch):
    model, delays = tiny_model(), iter([0.0, 0.5])  # what is made ready first, and a pass that other work holds up
    plain = type(model).forward

    def forward(self, *args, **kwargs):
        time.sleep(next(delays, 0.0))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    assert estimates._seconds_of_a_pass(model, torch.ones(1, 4, dtype=torch.long)) < 0.4

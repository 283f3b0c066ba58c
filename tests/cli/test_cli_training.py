"""`hooklens train` and `dashboard`: a run from a task, a text or a file; it goes on, and its page is written."""

import json
import tomllib

import pytest
from test_cli import invoke

import hooklens as hl
from hooklens import cli
from hooklens.core.errors import Unavailable
from hooklens.testing import tiny_model
from hooklens.training.run_recipe import TASKS, Recipe, read_recipe
from hooklens.training.training_settings import Settings

TINY = ["--layers", 1, "--d-model", 8, "--heads", 2, "--batch", 4, "--steps", 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a text file."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "abc.txt").write_text("abc abd\n" * 100)
    out = folder / "run"
    return invoke("train", folder / "abc.txt", *TINY, "--window", 8, "--tokenizer", "bytes", "--out", out), out


def test_a_text_file_is_trained_on_and_the_next_command_is_told(run):
    done, out = run
    assert done.exit_code == 0, done.output
    opened = hl.open_run(out)
    assert opened.steps_done == 3 and f"after 3 steps: {opened.held_out_loss[-1]:.4f}" in done.stdout
    assert done.stdout.splitlines()[-1] == f"next: hooklens dashboard {out}"
    model = opened.checkpoints()[-1].load()
    assert model.cfg.n_ctx == 8 and model.to_string(model.to_tokens("abd")) == ["abd"]


def test_the_same_command_goes_on_and_another_is_refused_before_it_works(run):
    _, out = run
    before = hl.open_run(out).loss
    done = invoke("train", "--out", out, "--settings", out / "settings.toml", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 3 and (hl.open_run(out).loss == before).all()
    done = invoke("train", out.parent / "abc.txt", "--steps", 4, "--out", out)
    assert done.exit_code == cli.BAD_INPUT and "training.steps was 3 and is 4" in done.stderr


def test_the_settings_beside_a_run_repeat_it(run, tmp_path):
    _, out = run
    done = invoke("train", "--settings", out / "settings.toml", "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert (hl.open_run(tmp_path / "again").loss == hl.open_run(out).loss).all()
    assert (tmp_path / "again" / "settings.toml").read_text() == (out / "settings.toml").read_text()


def test_a_recipe_is_the_same_once_it_was_saved(tmp_path):
    sgd = {"part": "sgd", "lr": 1e-8, "momentum": 0.5}
    recipe = Recipe(
        {"task": "text", "source": 'a "b"\\\n é'}, {"biases": {"mlp": False}}, {"optimizer": sgd, "seed": 3}
    )
    recipe.save(tmp_path / "a.toml")
    assert read_recipe(tmp_path / "a.toml") == recipe
    content = tomllib.loads((tmp_path / "a.toml").read_text())
    assert content["training"]["optimizer"] == sgd and content["data"]["source"] == 'a "b"\\\n é'
    assert recipe.settings().optimizer == hl.training.SGD(lr=1e-8, momentum=0.5)
    assert Recipe({"task": "shakespeare"}, {}, {"steps": 50}).settings().schedule.warmup == 5


def test_the_folder_alone_did_not_say_what_to_go_on_with(run):
    _, out = run
    done = invoke("train", "--out", out)
    assert done.exit_code == 0 and "after 3 steps" in done.stdout, done.output
    assert f"--model of other commands: {hl.open_run(out).checkpoints()[-1].path}" in done.stdout


def test_regression_was_trained_with_a_loss_of_tokens(tmp_path):
    done = invoke("train", "in_context_regression", *TINY, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert hl.open_run(tmp_path / "run").identity["settings"]["loss"] == {"part": "squared_error"}


def test_every_task_of_the_library_is_one_of_the_command():
    pairs = {"gendered_pronouns", "greater_than", "ioi", "repeated_tokens"}
    assert set(TASKS) == {name for name in hl.data.__all__ if name.islower()} - pairs
    recipe = Recipe({"task": "random_repeats", "d_vocab": 9, "length": 9})
    assert recipe.load_model(recipe.load_data()).cfg.d_vocab == 9


def test_vectors_are_read_by_a_model_of_vectors():
    recipe = Recipe({"task": "in_context_regression", "d": 3}, {"d_model": 8, "n_heads": 2, "n_layers": 1})
    model = recipe.load_model(recipe.load_data())
    assert (model.cfg.embed.d_in, model.cfg.d_vocab_out) == (4, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[training]\nstep = 3\n", "needs a task"),
        ('[data]\ntask = "shakespear"\n', "closest: shakespeare"),
        (
            '[data]\ntask = "shakespeare"\nwindows = 3\n',
            "no setting of [data] for shakespeare named 'windows'; closest: window",
        ),
        ('[data]\ntask = "shakespeare"\n[model]\nn_layer = 3\n', "closest: n_layers"),
        ('[data]\ntask = "shakespeare"\n[training]\nstep = 3\n', "closest: steps"),
        ('[data]\ntask = "shakespeare"\n[training.optimizer]\nrate = 3\n', "no field of AdamW named 'rate'"),
        ('[data]\ntask = "shakespeare"\n[trainings]\n', "closest: training"),
        ("[data\n", "is not TOML"),
        ("data = 3\n", "[data] is a table"),
    ],
)
def test_a_file_of_settings_that_says_something_unknown_is_refused_with_the_nearest(tmp_path, text, says):
    (tmp_path / "a.toml").write_text(text)
    done = invoke("train", "--settings", tmp_path / "a.toml", "--out", tmp_path / "run")
    assert done.exit_code == cli.BAD_INPUT and says in done.stderr.replace("\\'", "'")
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["modular_arithmetic"], ["give --out, the folder of the run"]),
        (["--out", "run"], ["give TASK, one of decimal_arithmetic"]),
        (["modular", "--out", "run"], ["TASK: no task named 'modular'; closest: modular_arithmetic", "no text file"]),
        (["modular_arithmetic", "--out", "run", "--window", 4], ["--window is no setting of modular_arithmetic"]),
        (["shakespeare", "--out", "run", "--heads", 3, "--d-model", 8], ["--d-model 8 is not a multiple of --heads 3"]),
        (
            ["shakespeare", "--steps", 0, "--batch", 0, "--lr", -1, "--device", "x"],
            ["5 things are wrong", "--steps is", "--batch is", "--lr is a number above 0", "--device", "give --out"],
        ),
    ],
)
def test_everything_wrong_with_a_call_is_told_at_once_in_its_own_words(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("train", *arguments)
    assert done.exit_code == cli.BAD_INPUT and all(words in done.stderr for words in says), done.stderr
    assert not list(tmp_path.iterdir())


def test_plays_that_are_not_there_and_cannot_be_fetched_are_told(tmp_path, monkeypatch):
    def offline(name):
        raise Unavailable("the asset shakespeare is not on this machine, and there is no network; copy it")

    monkeypatch.setattr("hooklens.pretrained.assets.text", offline)
    done = invoke("train", "shakespeare", "--out", tmp_path / "run")
    assert done.exit_code == cli.MISSING and "there is no network" in done.stderr and not list(tmp_path.iterdir())


def test_the_dashboard_is_written_into_the_run_or_elsewhere(run, tmp_path):
    _, out = run
    done = invoke("dashboard", out)
    assert done.exit_code == 0 and str(out / "page.html") in done.stdout
    assert "3 of 3" in (out / "page.html").read_text()
    done = invoke("dashboard", out, "--watch", "--out", tmp_path / "a.html")
    assert done.exit_code == 0 and "the run is finished" in done.stdout
    assert "location.reload()" not in (tmp_path / "a.html").read_text()
    told = json.loads(invoke("dashboard", out, "--json").stdout)
    assert told == {"page": str(out / "page.html"), "state": "finished"}
    done = invoke("dashboard", tmp_path, "--out", tmp_path)
    assert done.exit_code == cli.BAD_INPUT and "holds no run of hl.train" in done.stderr
    assert "2 things are wrong" in done.stderr


@pytest.mark.parametrize("command", ["train", "dashboard"])
def test_help_fits_80_columns_and_has_an_example(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = invoke(command, "--help")
    assert "Example:" in done.output and max(map(len, done.output.splitlines())) <= 80


@pytest.fixture
def settings_file(tmp_path):
    """Settings of a short run on all pairs of a small task, with a constant schedule."""
    path = tmp_path / "run.toml"
    path.write_text(
        '[data]\ntask = "modular_arithmetic"\np = 5\nfraction = 1.0\n[model]\nn_layers = 1\nd_model = 8\nn_heads = 2\n'
        '[training]\nsteps = 3\nbatch = 4\nschedule = "constant"\n'
    )
    return path


def test_a_run_that_holds_nothing_out_ends_with_its_training_loss(settings_file, tmp_path):
    done = invoke("train", "--settings", settings_file, "--out", tmp_path / "run")
    assert done.exit_code == 0 and "training loss of step 3: " in done.stdout, done.output
    told = json.loads(invoke("train", "--out", tmp_path / "run", "--json").stdout)
    assert told["training_loss"] == hl.open_run(tmp_path / "run").loss[-1] and "held_out_loss" not in told


def test_the_folder_alone_goes_on_and_a_constant_schedule_may_be_given_more_steps(settings_file, tmp_path):
    out = tmp_path / "run"
    invoke("train", "--settings", settings_file, "--out", out)
    done = invoke("train", "--out", out, "--steps", 5)
    assert done.exit_code == 0 and hl.open_run(out).steps_done == 5, done.output
    assert read_recipe(out / "settings.toml").training["steps"] == 5
    done = invoke("train", "--out", out, "--steps", 4)
    assert done.exit_code == cli.BAD_INPUT and "training.steps was 5 and is 4" in done.stderr


def test_settings_that_were_edited_between_two_calls_are_refused(settings_file, tmp_path):
    out = tmp_path / "run"
    invoke("train", "--settings", settings_file, "--out", out)
    kept = (out / "settings.toml").read_text()
    (out / "settings.toml").write_text(kept.replace("batch = 4", "batch = 8"))
    done = invoke("train", "--out", out)
    assert done.exit_code == cli.BAD_INPUT and "settings.batch was 4 and is 8" in done.stderr
    (out / "settings.toml").write_text(kept)
    assert invoke("train", "--out", out).exit_code == 0


def test_a_text_that_was_edited_between_two_calls_is_refused(run, tmp_path):
    (tmp_path / "abc.txt").write_text("abc abd\n" * 100)
    call = ["train", tmp_path / "abc.txt", *TINY, "--window", 8, "--out", tmp_path / "run"]
    assert invoke(*call).exit_code == 0
    (tmp_path / "abc.txt").write_text("abd abc\n" * 100)
    done = invoke(*call)
    assert done.exit_code == cli.BAD_INPUT and "the text, or its tokenizer, was changed" in done.stderr


def test_a_folder_of_other_files_gets_no_settings(settings_file, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    done = invoke("train", "--settings", settings_file, "--out", tmp_path / "thesis")
    assert done.exit_code == cli.BAD_INPUT and "holds other files (thesis.tex) and no run" in done.stderr
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["run.toml/below", "x" * 300])
def test_a_folder_that_cannot_be_made_is_told(settings_file, tmp_path, name):
    done = invoke("train", "--settings", settings_file, "--out", tmp_path / name)
    assert done.exit_code == cli.MISSING and "cannot be made" in done.stderr, done.output


def test_settings_with_a_byte_order_mark_are_read(settings_file):
    settings_file.write_bytes(b"\xef\xbb\xbf" + settings_file.read_bytes())
    assert read_recipe(settings_file).training["steps"] == 3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("p = 5", 'p = "5"', "[data] p is a whole number of at least 2, got '5'"),
        ("fraction = 1.0", "fraction = 1.5", "[data] fraction is the share of all 25 pairs to train on"),
        ("n_layers = 1", 'n_layers = "1"', "[model] the configuration: n_layers is '1'; a whole number above 0"),
        ("n_layers = 1", 'seed = "x"', "[model] seed is a whole number"),
        ("steps = 3", "steps = 0", "[training] steps is a whole number of at least 1, got 0"),
        ("batch = 4", 'batch = "4"', "[training] batch is a whole number of at least 1, got '4'"),
        ("batch = 4", 'clip = "x"', "[training] clip bounds the gradient's norm"),
        ("batch = 4", 'optimizer = {lr = "x"}', "[training] AdamW: lr is 'x'; a finite number"),
        ("batch = 4", "optimizer = {betas = 0.9}", "[training] AdamW: betas is 0.9; a tuple of numbers"),
        ('"modular_arithmetic"', '"text"', '[data] of the task text needs source = "..."'),
        ("n_layers = 1", "d_vocab = 3", "the data have 6 tokens, this model has d_vocab 3; give d_vocab=6"),
    ],
)
def test_a_value_of_a_wrong_type_is_told_with_its_table_and_leaves_no_settings(settings_file, tmp_path, old, new, says):
    settings_file.write_text(
        settings_file.read_text().replace(old, new).replace('"text"\np = 5\nfraction = 1.0', '"text"')
    )
    done = invoke("train", "--settings", settings_file, "--out", tmp_path / "run")
    by_annotation = "TypeCheckError" in done.stderr  # where annotations are executed, they speak first
    assert by_annotation or (done.exit_code == cli.BAD_INPUT and says in done.stderr), done.stderr
    assert not (tmp_path / "run" / "settings.toml").exists()


def test_a_run_of_python_was_said_to_be_none(tmp_path):
    data = hl.data.modular_arithmetic(p=5, fraction=0.8)
    hl.train(tiny_model(d_vocab=data.d_vocab), data, steps=2, out=tmp_path / "run", settings=Settings(batch=4))
    done = invoke("train", "--out", tmp_path / "run")
    assert done.exit_code == 2 and "holds a run without settings.toml" in done.output.replace("\n", " ")


def test_files_of_numbers_are_trained_on_by_their_header(tmp_path):
    table, prompts = tmp_path / "table.csv", tmp_path / "prompts.csv"
    table.write_text("\n".join(["a,b,c", *(f"{a},{b},{(a + b) % 3}" for a in range(3) for b in range(3))]))
    prompts.write_text("\n".join(["prompt,x1,y", *(f"{i},{x},{i * x}" for i in range(4) for x in (1, 2, 3))]))
    for path, task in ((table, "modular_triples"), (prompts, "regression_prompts")):
        done = invoke("train", path, *TINY, "--out", tmp_path / task)
        assert done.exit_code == 0, done.output
        assert read_recipe(tmp_path / task / "settings.toml").data["task"] == task
    done = invoke("train", "modular_triples", *TINY, "--out", tmp_path / "none")
    assert done.exit_code == cli.BAD_INPUT and "modular_triples reads a file of your own" in done.stderr

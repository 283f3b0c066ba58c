"""The recipe of the paper's run is the published one, and its controls differ in one thing each."""

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from refused import refused

from hooklens.core.errors import HooklensError
from hooklens.data.modular import modular_arithmetic
from hooklens.plugins.algorithmic.grokking import control_recipes, fast_recipe, grokking_recipe
from hooklens.plugins.algorithmic.grokking.modular_recipes import check_table_size, without_decay
from hooklens.training import AdamW, Constant, CrossEntropy
from hooklens.training.run_recipe import Recipe, read_recipe


def test_the_recipe_is_that_of_nanda_et_al():
    recipe = grokking_recipe()
    settings, data = recipe.settings(), recipe.load_data()
    assert settings.optimizer == AdamW(lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)
    assert settings.schedule == Constant(warmup=10) and settings.loss == CrossEntropy(double=True)
    assert settings.clip is None and len(data.batch(0, settings.batch)) == 3830 == len(data.pairs[0])
    model = recipe.load_model(data)
    cfg = model.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp) == (1, 128, 4, 32, 512)
    assert (cfg.act_fn, cfg.normalization_type, cfg.n_ctx) == ("relu", None, 3)
    assert not cfg.tie_word_embeddings and cfg.d_vocab == cfg.d_vocab_out == 114
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases == {"blocks.0.mlp.in_.bias", "blocks.0.mlp.out.bias"}  # as in the authors' code
    sizes = {name: p.detach().std() for name, p in model.named_parameters() if p.ndim > 1}
    for name, std in sizes.items():
        expected = 114**-0.5 if name.startswith("unembed") else 128**-0.5
        n = dict(model.named_parameters())[name].numel()
        assert abs(float(std) - expected) < 5 * expected / math.sqrt(2 * n), name


def test_the_task_alone_gives_the_same_run():
    plain, recipe = Recipe({"task": "modular_arithmetic"}), grokking_recipe(solved_for=None)
    models = [one.load_model(one.load_data()) for one in (plain, recipe)]
    assert models[0].cfg == models[1].cfg
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*(m.parameters() for m in models), strict=True))
    assert plain.settings().optimizer == recipe.settings().optimizer


def test_a_recipe_that_was_written_is_read_as_it_was(tmp_path):
    for recipe in (grokking_recipe(7, fraction=0.5), fast_recipe(seed=3), grokking_recipe(7, shuffled=True)):
        recipe.save(tmp_path / "settings.toml")
        assert not read_recipe(tmp_path / "settings.toml").differences(recipe)
        assert read_recipe(tmp_path / "settings.toml").settings() == recipe.settings()


def test_a_control_differs_in_one_thing():
    recipe = grokking_recipe()
    differences = {name: control.differences(recipe) for name, control in control_recipes(recipe).items()}
    assert differences == {
        "weight decay 0": ["training.optimizer.weight_decay was 0.0 and is 1.0"],
        "shuffled answers": ["data.shuffled was True and is None"],
    }
    wrapped = {"part": "orthogonal_gradient", "inner": {"part": "adamw", "weight_decay": 0.5}}
    assert without_decay(wrapped) == wrapped | {"inner": {"part": "adamw", "weight_decay": 0.0}}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: grokking_recipe(100), "p is a prime of at least 5 here, got 100; the closest are 97 and 101"),
        (lambda: grokking_recipe(3), "p is a whole number of at least 5, got 3"),
        (lambda: grokking_recipe(5, fraction=1.0), "leaves no pair of 25 to test on"),
        (lambda: grokking_recipe(5, fraction=0.01), "share of all 25 pairs"),
        (lambda: grokking_recipe(weight_decay=-1), "weight_decay is a finite number of at least 0"),
        (lambda: grokking_recipe(steps=0), "steps is a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_grok_are_refused(call, says):
    with refused(HooklensError, says):
        call()


def test_the_last_pair_counts():
    check_table_size(5, 0.96)  # one pair of 25 is left
    with refused(HooklensError, "leaves no pair"):
        check_table_size(5, 1)


def test_training_on_the_task_has_the_same_defaults_and_does_not_end_early():
    data = {"task": "modular_arithmetic", "seed": 0}
    ours, defaults = grokking_recipe(), Recipe(data, {}, {"seed": 0})
    assert ours.load_data() == defaults.load_data()
    assert ours.training["steps"] == defaults.training["steps"]
    settings, others = ours.settings().to_json(), defaults.settings().to_json()
    assert {name for name in settings if settings[name] != others[name]} == {"batch", "solved"}
    n_pairs = len(ours.load_data().pairs[0])
    assert others["solved"] is None and min(settings["batch"], others["batch"]) > n_pairs  # both take all pairs
    models = [recipe.load_model(ours.load_data()) for recipe in (ours, defaults)]
    assert models[0].cfg.to_json() == models[1].cfg.to_json()
    for parameter, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize(
    "options",
    [{"p": np.int64(7)}, {"fraction": np.float64(0.5)}, {"weight_decay": np.float32(1)}, {"seed": np.int64(0)}],
)
def test_numbers_of_numpy_were_written_with_their_type_and_could_not_be_read(options, tmp_path):
    try:
        recipe, data = grokking_recipe(**{"p": 7, "fraction": 0.5} | options), modular_arithmetic(np.int64(7))
    except TypeCheckError:
        pytest.skip("executed annotations ask for Python's numbers")
    recipe.save(tmp_path / "settings.toml")
    assert not read_recipe(tmp_path / "settings.toml").differences(recipe)
    changed = recipe.changed(training={"steps": np.int64(9), "optimizer": {"lr": np.float64(0.5)}})
    changed.save(tmp_path / "settings.toml")
    assert read_recipe(tmp_path / "settings.toml").settings() == changed.settings()
    assert type(data.p) is int


def test_settings_that_no_file_can_hold_and_flags_that_are_none_are_refused(tmp_path):
    with refused(HooklensError, "plain numbers, texts, lists and tables; got array"):
        grokking_recipe(7, fraction=0.5).changed(data={"seed": np.zeros(2)}).save(tmp_path / "settings.toml")
    with refused(HooklensError, "shuffled is True or False, got 1"):
        grokking_recipe(shuffled=1)
    with refused(HooklensError, "solved_for is a whole number"):
        grokking_recipe(solved_for="5")

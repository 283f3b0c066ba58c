"""Runs that should grok, and their controls: trained, or resumed, in one folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hooklens.core.arguments import flag, path_of
from hooklens.core.errors import InputError
from hooklens.data.modular import Modular
from hooklens.plugins.algorithmic.fourier.pair_table import modulus_of
from hooklens.plugins.algorithmic.fourier.weight_spectra import measure_fourier_spectrum
from hooklens.plugins.algorithmic.grokking.grokking_step import find_grokking
from hooklens.plugins.algorithmic.grokking.modular_recipes import RATE, check_table_size, control_recipes
from hooklens.pretrained.loading import computing_device
from hooklens.studies.grokking_study import GrokkingStudy, study_grokking
from hooklens.training.loop import train
from hooklens.training.run_folder import RECIPE, RunFolder
from hooklens.training.run_recipe import Recipe, read_recipe
from hooklens.training.training_run import Run, open_run

_OWN = ("steps", "solved", "solved_for")  # of a control, whose steps are those that its run took


def train_recipe(recipe: Recipe, out: str | os.PathLike, *, device: Any = None, show: bool | None = None) -> Run:
    """Train what a recipe says, or go on with the run in the folder `out`, which must be of the same recipe.

    >>> import tempfile
    >>> from hooklens.plugins.algorithmic.grokking.modular_recipes import grokking_recipe
    >>> recipe = grokking_recipe(p=5, fraction=0.6, steps=2)
    >>> train_recipe(recipe, tempfile.mkdtemp() + "/run").steps_done
    2
    """
    folder, device = RunFolder(path_of(out, "out")), computing_device(device)
    check_recipe(folder.path, recipe)
    data = recipe.load_data()
    model = recipe.load_model(data, device=device)
    if not folder.exists:
        folder.check_free()
    with folder.writing():  # another process may have begun a run here meanwhile
        check_recipe(folder.path, recipe)
        if (folder.path / RECIPE).is_file() or not folder.exists:
            recipe.save(folder.path / RECIPE)
    return train(model, data, steps=recipe.training["steps"], out=folder.path, settings=recipe.settings(), show=show)


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise if the run in a folder was trained on another p, or with other settings; more steps are the same run."""
    if not (folder / RECIPE).is_file():
        return
    kept = read_recipe(folder / RECIPE)
    if kept.data.get("p") != recipe.data.get("p"):
        raise InputError(
            f"the run in {str(folder)!r} was trained on p = {kept.data.get('p')}, and p = {recipe.data.get('p')} is "
            "asked for; give that p, or another folder"
        )
    asked, taken = recipe.training["steps"], kept.training["steps"]
    begun = RunFolder(folder).exists  # one that was stopped before its first step may also become shorter
    if asked < taken and begun and not kept.changed(training={"steps": asked}).differences(recipe):
        raise InputError(
            f"the run in {str(folder)!r} was begun for {taken:,} steps, and {asked:,} are asked for; ask for "
            f"{taken:,} or more, or analyse the run as it is"
        )
    more = {"steps": max(asked, taken) if begun else asked}
    if differences := kept.changed(training=more).differences(recipe):
        raise InputError(
            f"the run in {str(folder)!r} has other settings: {'; '.join(differences[:3])}; give these, or "
            "another folder"
        )


def steps_taken(folder: Path) -> int | None:
    """How many steps the run in a folder has taken; None if there is none yet."""
    try:
        return open_run(folder).steps_done
    except InputError:
        return None


def control_of(recipe: Recipe, steps: int) -> Iterator[tuple[str, Recipe]]:
    """The controls of a run, by name: as many steps as it took, and no early end.

    >>> from hooklens.plugins.algorithmic.grokking.modular_recipes import grokking_recipe
    >>> [(name, control.training["steps"]) for name, control in control_of(grokking_recipe(), 7000)]
    [('weight decay 0', 7000), ('shuffled answers', 7000)]
    """
    for name, control in control_recipes(recipe).items():
        training = {key: value for key, value in control.training.items() if key not in _OWN}
        yield name, Recipe(control.data, control.model, training | {"steps": steps})


def grok(
    recipe: Recipe, out: str | os.PathLike, *, controls: bool = True, device: Any = None, show: bool | None = None
) -> GrokkingStudy:
    """Train a run and its controls in folders below `out`, or go on with them, and study them.

    >>> import tempfile
    >>> from hooklens.plugins.algorithmic.grokking.modular_recipes import grokking_recipe
    >>> study = grok(grokking_recipe(p=5, fraction=0.6, steps=2), tempfile.mkdtemp(), controls=False)
    >>> study.grokking.verdict
    'did not grok: never memorised'

    Controls are trained only for a run that grokked, because without that there is no drop to compare. They take as
    many steps as it did.
    """
    folder = path_of(out, "out")
    flag("controls", controls)
    check_studied(recipe)
    run = train_recipe(recipe, folder / "run", device=device, show=show)
    trained = {}
    if controls and find_grokking(run).grokked:
        for name, control in control_of(recipe, run.steps_done):
            trained[name] = train_recipe(control, folder / name.replace(" ", "_"), device=device, show=show)
    return study_grokking(run, controls=trained)


def check_studied(recipe: Recipe) -> None:
    """Raise for a recipe whose run could be trained and not studied.

    >>> check_studied(Recipe({"task": "modular_arithmetic", "p": 7, "operation": "x"}))
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: the Fourier analysis here is that of a + b, and this task is a x b; ...
    """
    data = recipe.load_data()
    if not isinstance(data, Modular):
        raise InputError(f"grokking is studied on modular_arithmetic, and this recipe's task is {recipe.data['task']}")
    modulus_of(data)
    check_table_size(data.p, data.fraction)
    model = recipe.load_model(data)
    if model.cfg.attn_only:
        raise InputError("the study reads neurons, and the model of this recipe has none (attn_only); give it MLPs")
    measure_fourier_spectrum(model, data)


def folder_name(recipe: Recipe) -> str:
    """A name for the folder of a run, from what tells it from others.

    >>> from hooklens.plugins.algorithmic.grokking.modular_recipes import fast_recipe, grokking_recipe
    >>> folder_name(grokking_recipe(seed=3))
    'p113_fraction0.3_decay1_seed3'
    >>> folder_name(fast_recipe())
    'p43_fraction0.4_decay1_rate0.003_seed0'
    """
    data, rule = recipe.data, recipe.training["optimizer"]
    inner = rule.get("inner", rule)
    own = "" if rule["part"] == "adamw" else f"_{rule['part']}"
    own += "" if inner.get("lr", RATE) == RATE else f"_rate{_short(inner['lr'])}"
    decay = _short(inner.get("weight_decay", 0.0))
    return f"p{data['p']}_fraction{_short(data['fraction'])}_decay{decay}{own}_seed{data['seed']}"


def _short(number: float) -> str:
    """A number as briefly as it can be read back: 1 for 1.0."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(float(number))

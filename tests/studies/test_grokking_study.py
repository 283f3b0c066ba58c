"""Runs on small tables: trained, resumed, refused, studied, and put on a page; a run that did not grok is said so."""

import json
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError
from hooklens.plugins.algorithmic.fourier.frequency_ablation import FrequencyAblation
from hooklens.plugins.algorithmic.fourier.neuron_patching import NeuronPatching
from hooklens.plugins.algorithmic.fourier.progress_measures import measure_progress
from hooklens.plugins.algorithmic.grokking import GrokkingStep, fast_recipe, find_grokking, grokking_recipe
from hooklens.plugins.algorithmic.grokking.norm_drop import GROKKING, NO_DECAY, SHUFFLED, compare_norm_drops
from hooklens.plugins.algorithmic.grokking.phases import Phases
from hooklens.plugins.algorithmic.icl import GradientDescent, construct_descent
from hooklens.results.result import Result
from hooklens.studies.grokking_page import grokking_report, seeds_table, together
from hooklens.studies.grokking_runs import control_of, folder_name, grok, train_recipe
from hooklens.studies.grokking_study import (
    GrokkingStudy,
    check_control,
    read_circuit,
    study_grokked_model,
    study_grokking,
)
from hooklens.studies.icl_study import study_in_context
from hooklens.studies.parsimony_study import MEASURES, Parsimony, compare_parsimony, sweep_parsimony
from hooklens.testing import tiny_model
from hooklens.training.run_folder import RunFolder
from hooklens.training.run_recipe import Recipe


def small(steps=100, *, p=7, **changes):
    """A narrow model on a small table: seconds, not minutes."""
    recipe = grokking_recipe(p, fraction=0.6, steps=steps, solved_for=None)
    optimizer = {"lr": 0.01} | changes
    narrow = {"d_model": 16, "n_heads": 2, "d_mlp": 32}
    return recipe.changed(model=narrow, training={"checkpoints": 5, "evaluate": 6, "optimizer": optimizer})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    grok(small(), out / "first", controls=True, show=False)
    return out


@pytest.fixture(scope="module")
def study(folder):
    return study_grokking(hl.open_run(folder / "first" / "run"))


def test_a_run_that_did_not_grok_is_studied_and_said_to_be(study):
    assert study.grokking.verdict.startswith("did not grok") and study.norms is None
    assert study.grokking.verdict in study.findings()[0]
    assert dict(zip(*zip(*study.table().rows, strict=True), strict=True))["verdict"] == study.grokking.verdict
    assert (study.modulus, study.seed, study.n_steps, study.weight_decay) == (7, 0, 100, 1.0)
    assert not study.is_published_setting and study.table().columns == ("what", "value")


def test_the_costs_of_both_tracks_are_one_table(study):
    by_hand = construct_descent(GradientDescent((0.2,), mean=False), 2, 3)
    other = study_in_context({"by hand": by_hand}, hl.data.in_context_regression(2, (2, 3)), searched=False, tasks=16)
    table = hl.studies.join_costs([study, other]).table()
    assert [row[:2] for row in table.rows] == [("modulo 7, seed 0", "accuracy"), ("by hand", "MSE")]
    assert table.rows[0][2] == float(study.regions.accuracy[0])
    assert table.rows[1][2] == float(other.errors.errors.mean())
    assert all(flops == counted for _, _, _, flops, counted, *_ in table.rows)
    with pytest.raises(HooklensError, match="studies of grokking or in-context learning, got None"):
        hl.studies.join_costs([None])
    with pytest.raises(HooklensError, match="at least one study"):
        hl.studies.join_costs([])


def test_a_run_is_also_its_folder(folder, study):
    path = folder / "first" / "run"
    assert find_grokking(path).statement == study.grokking.statement
    assert study_grokking(str(path)).values() == study.values()


def test_findings_name_what_the_neuron_rule_leaves_out_and_compare_losses_of_the_same_pairs(study):
    keys = study.circuit.keys
    named = {rule: [1, 2] for rule in keys.by_rule} | {"neurons": [1]}
    losses = {"loss": 3.25, "training_loss": 0.125, "restricted": 0.5, "excluded": 2.5, "neuron_ablation": None}
    circuit = replace(study.circuit, keys=replace(keys, by_rule=named), **losses)
    text = " ".join(replace(study, circuit=circuit).findings())
    assert "Key frequencies by the neuron rule: 1;" in text
    assert "At least half of the other rules also name 2, which the formula and the losses below leave out." in text
    assert "On all pairs the loss is 3.25 nats and the restricted loss 0.5; on the training pairs" in text
    assert "on the training pairs the loss is 0.125 and the excluded loss 2.5" in text
    agreeing = replace(circuit, keys=replace(keys, by_rule=named | {"neurons": [1, 2]}))
    assert "also name" not in " ".join(replace(study, circuit=agreeing).findings())


def test_controls_are_trained_only_where_there_is_a_drop_to_compare(folder):
    assert [path.name for path in (folder / "first").iterdir()] == ["run"]
    kinds = dict(control_of(small(), 40))
    assert list(kinds) == [NO_DECAY, SHUFFLED] and {one.training["steps"] for one in kinds.values()} == {40}
    solved = grokking_recipe(7, fraction=0.6)
    assert "solved" in solved.training and all("solved" not in one.training for _, one in control_of(solved, 40))


def test_controls_are_compared_over_the_rise_of_the_run(folder, monkeypatch):
    run = hl.open_run(folder / "first" / "run")
    controls = {}
    for name, recipe in control_of(small(), run.steps_done):
        controls[name] = train_recipe(recipe, folder / "controls" / name, show=False)
    # Seven numbers are too few to grok: planted curves show the rest of the path.
    steps = torch.arange(0, 101, 10)
    train, held_out = ((steps >= step).float() for step in (10, 60))
    grokking = GrokkingStep.of_curves(steps, train, steps, held_out)
    monkeypatch.setattr("hooklens.studies.grokking_study.find_grokking", lambda run: grokking)
    study = study_grokking(run, controls=controls)
    assert study.norms.kinds == [GROKKING, NO_DECAY, SHUFFLED]
    assert (study.norms.start, study.norms.stop) == (50, 60)
    assert study.values()["largest drop of a control"] == max(study.norms.drop[1:].tolist())
    assert study.norms.statement in study.findings()
    assert study.phases is None  # planted steps, and a run without key frequencies
    swapped = dict(zip(controls, reversed(controls.values()), strict=True))
    for given, says in (
        (swapped, r"optimizer.weight_decay is 1.0 and not 0.0"),
        ({SHUFFLED: run}, r"not the control 'shuffled answers' of this run: data.shuffled is None and not True"),
        ({GROKKING: controls[NO_DECAY]}, "no control named 'grokking run'"),
    ):
        with refused(HooklensError, says):
            study_grokking(run, controls=given)


def test_what_is_not_there_is_said_with_its_reason(study, folder):
    cells = dict(study.table().rows)
    assert study.halfway is None and cells["rise begins"] == "did not generalise"
    assert cells["memorisation ends"] == "no phases"
    assert cells["drop of the squared norm at grokking"] == "did not grok"
    bad = replace(study, circuit=replace(study.circuit, loss=9.0, smallest=None))
    assert dict(bad.table().rows)["smallest set within 1 %"] == "not searched"
    with refused(HooklensError, "controls are runs by name"):
        study_grokking(hl.open_run(folder / "first" / "run"), controls={"x": "nope"})


def test_findings_say_what_frequencies_do_in_a_model_that_does_not_solve_the_task(study):
    measured = {"modulus": 7, "site": "post", "frequencies": torch.tensor([1, 2, 3]), "accuracies": torch.zeros(3)}
    losses = torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)
    ablation = FrequencyAblation(**measured, losses=losses, keys=[1], base=1.5, base_accuracy=0.2, chance=1.9)
    keys = replace(study.circuit.keys, by_rule={rule: [1] for rule in study.circuit.keys.by_rule})
    known = {"keys": keys, "loss": 1.5, "restricted": 0.1, "excluded": 2.5, "neuron_ablation": ablation}
    circuit = replace(study.circuit, **known)
    text = " ".join(replace(study, circuit=circuit).findings())
    assert float(study.regions.accuracy[0]) < 0.9 and "not a circuit that solves the task" in text
    assert "The restricted loss is far below the loss: on all pairs together, what it leaves out does harm." in text
    assert "what is left prefers wrong ones" in text  # the excluded loss is above ln p
    assert "takes the loss on all pairs from 1.5 to 2 nats. Of the other frequencies, 2 matters most" in text
    assert "2 is none only because of the threshold of 85 %" in text
    lower = replace(circuit, neuron_ablation=replace(ablation, losses=torch.full((3,), 1.0)), restricted=1.0)
    text = " ".join(replace(study, circuit=lower).findings())
    assert "Removing another frequency does not raise the loss" in text and "far below" not in text
    below = replace(circuit, excluded=1.8)
    assert "prefers wrong ones" not in " ".join(replace(study, circuit=below).findings())


def test_the_same_call_goes_on_and_another_p_is_refused(folder):
    run = train_recipe(small(), folder / "first" / "run", show=False)
    assert run.steps_done == 100
    with refused(HooklensError, "was trained on p = 7, and p = 5 is asked for"):
        train_recipe(small(p=5), folder / "first" / "run")
    with refused(HooklensError, "training.optimizer.weight_decay was 1.0 and is 0.5"):
        train_recipe(small(weight_decay=0.5), folder / "first" / "run")
    longer = train_recipe(small(110), folder / "first" / "run", show=False)
    assert longer.steps_done == 110
    with refused(HooklensError, "was begun for 110 steps, and 100 are asked for; ask for 110 or more"):
        train_recipe(small(100), folder / "first" / "run")


def test_a_stopped_run_ends_as_one_that_was_not(folder, tmp_path):
    recipe = small(20)
    whole = train_recipe(recipe, tmp_path / "whole", show=False)
    data = recipe.load_data()
    stopped = [0]

    def stop(step, loss):
        stopped[0] = step
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hl.train(
            recipe.load_model(data), data, steps=20, settings=recipe.settings(), out=tmp_path / "part", after_step=stop
        )
    assert stopped == [7]
    resumed = train_recipe(recipe, tmp_path / "part", show=False)
    ends = [run.checkpoints()[-1].load().state_dict() for run in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_other_runs_are_refused(tmp_path):
    data = hl.data.markov_source(4, window=6)
    recipe = Recipe({"task": "markov_source", "d_vocab": 4, "window": 6}, {"d_model": 8, "n_heads": 2}, {"steps": 1})
    run = hl.train(recipe.load_model(data), data, steps=1, show=False, out=tmp_path / "run")
    with refused(HooklensError, "not trained on hl.data.modular_arithmetic"):
        study_grokking(run)


def test_composite_moduli_and_other_models_are_refused(study):
    with refused(HooklensError, "p is a prime of at least 5"):
        study_grokked_model(tiny_model(d_vocab=10), hl.data.modular_arithmetic(9))
    with refused(HooklensError, "was trained on another p|it was trained on p"):
        study_grokked_model(tiny_model(d_vocab=8), hl.data.modular_arithmetic(5))


def test_the_page_says_what_its_numbers_are_and_that_a_phase_is_empty(study):
    empty = replace(study, phases=Phases(memorised=67, formed=67, cleaned=90))
    assert "Circuit formation is empty" in grokking_report([empty]).to_html()
    three = replace(study, phases=Phases(memorised=67, formed=80, cleaned=90))
    page = grokking_report([three]).to_html()
    assert "Circuit formation is empty" not in page
    for name in ("smallest set within 1 %", "Gini of W_E", "largest drop of a control", "ln p (nats)"):
        assert f"{name}: " in page, name


def test_the_page_holds_every_seed_and_its_numbers(study, tmp_path):
    other = replace(study, seed=1)
    report = grokking_report([study, other])
    path = report.save(tmp_path / "page.html", data=[study, other])
    page, told = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert "0 of 2 grokked" in page and "Seed 1" in page and "The run did not grok" in page
    assert [one["seed"] for one in told["data"]] == [0, 1]
    assert seeds_table([study, other]).columns == ("what", "seed 0", "seed 1")
    assert together([study]) == [] and together([study, other])[0] == "0 of 2 seeds grokked."
    with refused(HooklensError, "at least one"):
        grokking_report([])
    with refused(HooklensError, r"holds studies of one p, and these are of \[5, 7\]"):
        grokking_report([study, replace(study, modulus=5)])
    assert seeds_table(study).columns == ("what", "seed 0")  # one alone


def test_a_study_is_saved_and_read(study, tmp_path):
    study.save(tmp_path / "study")
    loaded = Result.load(tmp_path / "study")
    assert isinstance(loaded, GrokkingStudy) and loaded.findings() == study.findings()


def test_folders_are_named_after_the_setting():
    assert folder_name(grokking_recipe(13, fraction=0.4, weight_decay=0.3, seed=2)) == "p13_fraction0.4_decay0.3_seed2"
    # the fast setting is another one, and so are two that agree in six digits
    assert folder_name(fast_recipe()) != folder_name(grokking_recipe(43, fraction=0.4))
    decays = (0.3, 0.3000000001)
    assert len({folder_name(grokking_recipe(13, fraction=0.4, weight_decay=decay)) for decay in decays}) == 2


def planted(decays, values):
    """A sweep in which every measure has these values; NaN stands for a run that did not generalise."""
    n, solved = len(decays), [value == value for value in values]
    return Parsimony(
        modulus=31,
        weight_decay=torch.tensor(decays),
        seeds=list(range(n)),
        verdicts=["grokked" if done else "did not grok: memorised, not generalised by the end" for done in solved],
        generalised_at=[100 if done else None for done in solved],
        held_out_accuracy=torch.tensor([1.0 if done else 0.9 for done in solved]),
        measures=torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, len(MEASURES)),
    )


def test_correlations_with_weight_decay_are_those_of_ranks():
    decays = [0.3, 0.3, 1.0, 1.0, 3.0, 3.0, 10.0, 10.0, 10.0]
    falling = planted(decays, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, float("nan")])
    rho, p = falling.correlation("key frequencies")
    # Spearman with ties, by hand: ranks 0.5 0.5 2.5 2.5 4.5 4.5 6.5 6.5 against 7 ... 0
    assert abs(rho + 40 / (42 * 40) ** 0.5) < 1e-12 and p < 0.01
    assert any("8 of 9 runs" in line for line in falling.statements)
    assert any("weight decay 10, seed 8" in line for line in falling.statements)
    flat = planted(decays, [5.0] * 8 + [float("nan")])
    assert all(value != value for value in flat.correlation("smallest set"))
    # a measure of a run that did not generalise does not count: with it this one would rise
    falling.measures[8, 3] = 100.0
    assert falling.correlation("squared weights") == (rho, p)
    assert len(falling.figure().data) == len(MEASURES)


def test_p_values_of_the_correlation_are_uniform_where_there_is_none():
    generator = torch.Generator().manual_seed(0)
    decays = [0.3, 0.3, 1.0, 1.0, 3.0, 3.0]
    p = [planted(decays, torch.rand(6, generator=generator).tolist()).correlation("smallest set")[1] for _ in range(60)]
    assert sum(value <= 0.1 for value in p) <= 13  # 6 expected; more than 13 has a chance of 0.2 %


def test_runs_of_several_tables_are_not_one_sweep(folder):
    first = hl.open_run(folder / "first" / "run")
    other = train_recipe(small(2, p=5), folder / "five", show=False)
    with refused(HooklensError, r"trained on several p: \[5, 7\]"):
        compare_parsimony([first, other])
    assert compare_parsimony([first.path]).verdicts == [study_grokking(first).grokking.verdict]
    with refused(HooklensError, "each run counts once"):
        compare_parsimony([first, hl.open_run(first.path)])
    with refused(HooklensError, "a list of at least one run"):
        compare_parsimony(first)


def test_curves_that_end_before_the_window_are_refused():
    steps = torch.tensor([0, 10])
    with refused(HooklensError, "were stopped before"):
        compare_norm_drops([(GROKKING, 0, steps, torch.ones(2))], start=0, stop=20)


@pytest.mark.slow
def test_a_run_groks_and_everything_of_the_paper_is_found_in_it(tmp_path):
    recipe = fast_recipe(31, fraction=0.4, weight_decay=4.0, steps=1500, solved_for=100)
    study = grok(recipe.changed(training={"checkpoints": 20, "evaluate": 75}), tmp_path, show=False)
    step, circuit = study.grokking, study.circuit
    assert step.grokked and study.n_steps == step.generalised_at + 100 < 1500
    # the held-out pairs are answered by waves of few frequencies, which are all that the logits need
    assert 1 <= len(circuit.frequencies) <= 5 and circuit.neurons.share_explained > 0.5
    assert circuit.restricted < circuit.loss < 0.1 and circuit.excluded > circuit.chance
    assert circuit.smallest.size <= len(circuit.frequencies) and circuit.formula.explained_centred > 0.8
    kept, others = circuit.neuron_ablation, set(range(1, 16)) - set(circuit.frequencies)
    losses = dict(zip(kept.frequencies.tolist(), kept.losses.tolist(), strict=True))
    assert min(losses[k] for k in circuit.frequencies) > 10 * max(losses[k] for k in others)
    # the norm drops where it rises, and not in runs that do not grok
    assert study.norms.is_evidence and set(study.norms.kinds) == {GROKKING, NO_DECAY, SHUFFLED}
    shuffled = find_grokking(hl.open_run(tmp_path / "shuffled_answers"))
    assert shuffled.verdict == "did not grok: memorised, not generalised by the end"
    # half-way, pairs whose partner was trained on are known, and others are not
    partner = {name: float(value) for name, value in zip(study.halfway.regions, study.halfway.accuracy, strict=True)}
    assert partner["partner (b, a) trained"] > partner["partner (b, a) not trained"] + 0.3
    assert study.phases.memorised <= study.phases.formed <= study.phases.cleaned == step.generalised_at


def test_a_short_run_was_refused_more_steps_because_its_warm_up_was_shorter(tmp_path):
    run = train_recipe(small(20), tmp_path / "run", show=False)
    assert train_recipe(small(120), tmp_path / "run", show=False).steps_done == 120 and run.steps_done == 120
    whole = train_recipe(small(120), tmp_path / "whole", show=False)
    ends = [made.checkpoints()[-1].load().state_dict() for made in (run, whole)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_records_that_were_removed_are_not_said_to_come(tmp_path):
    run = train_recipe(small(20), tmp_path / "run", show=False)
    (run.path / "evaluations.rows").unlink()
    with refused(HooklensError, "no evaluations.rows: the file was removed or emptied, or"):
        find_grokking(run.path)
    for kept in (run.path / "checkpoints").iterdir():
        kept.unlink()
    with refused(HooklensError, "has no checkpoint: they were removed"):
        study_grokking(run.path)


def test_a_process_that_writes_a_run_keeps_its_settings(tmp_path):
    """A second process with other settings replaced the file of the first, and only then saw its lock."""
    folder = RunFolder(tmp_path / "run")
    with folder.writing(), refused(HooklensError, "is being written by process"):
        train_recipe(small(20), tmp_path / "run", show=False)
    assert not (tmp_path / "run" / "settings.toml").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight_decays": [1.0, 1.0]}, "weight_decays holds a value twice"),
        ({"seeds": [0, 0]}, "seeds holds a value twice"),
        ({"seeds": [0, 2**70]}, "seed is a whole number from"),
        ({"device": "gpu"}, "'gpu' is not a device"),
    ],
)
def test_a_sweep_that_cannot_end_does_not_begin(options, says, tmp_path):
    sizes = {"weight_decays": [1.0], "seeds": [0], "p": 5, "fraction": 0.6, "steps": 2}
    with refused(HooklensError, says):
        sweep_parsimony(tmp_path, **sizes | options)
    assert not list(tmp_path.iterdir())


def test_a_sweep_looks_at_all_folders_first_and_takes_every_seed(tmp_path):
    sizes = {"p": 5, "fraction": 0.6, "steps": 2}
    sweep = sweep_parsimony(tmp_path, weight_decays=[1.0], seeds=[2**63], **sizes)
    sweep.save(tmp_path / "sweep")
    assert sweep.seeds == [2**63] == Result.load(tmp_path / "sweep").seeds
    (kept,) = tmp_path.glob("p5_*")
    kept.rename(tmp_path / folder_name(fast_recipe(5, fraction=0.6, weight_decay=2.0)))
    with refused(HooklensError, "has other settings"):
        sweep_parsimony(tmp_path, weight_decays=[1.0, 2.0], seeds=[0], **sizes)
    assert len(list(tmp_path.glob("p5_*"))) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"attn_only": True}}, "the model of this recipe has none"),
        ({"data": {"shuffled": True}}, "the answers of this control are shuffled"),
        ({"data": {"operation": "x"}}, "this task is a x b"),
    ],
)
def test_a_recipe_that_cannot_be_studied_is_not_trained(changes, says, tmp_path):
    with refused(HooklensError, says):
        grok(grokking_recipe(5, fraction=0.6, steps=2).changed(**changes), tmp_path, show=False)
    with refused(HooklensError, "controls is True or False, got 'no'"):
        grok(small(2), tmp_path, controls="no")
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_stopped_before_its_first_step_may_become_shorter(tmp_path):
    (tmp_path / "run").mkdir()
    small(20).save(tmp_path / "run" / "settings.toml")
    assert train_recipe(small(2), tmp_path / "run", show=False).steps_done == 2


def test_the_decay_of_a_wrapped_rule_is_that_of_the_rule_inside(tmp_path):
    wrapped = {"part": "grokfast", "inner": {"part": "adamw", "weight_decay": 0.5}}
    try:
        recipe = grokking_recipe(5, fraction=0.6, steps=2).changed(training={"optimizer": wrapped})
    except TypeCheckError:
        pytest.skip("executed annotations ask for the inner rule, and not for its table")
    run = train_recipe(recipe, tmp_path / "run", show=False)
    assert compare_parsimony([run]).weight_decay.tolist() == [0.5]
    for name, control in control_of(recipe, 2):
        check_control(name, train_recipe(control, tmp_path / name, show=False), run)


def test_phases_are_read_only_with_checkpoints_between(folder, monkeypatch):
    """With none between memorisation and generalisation the phases were those of the checkpoints."""
    run = hl.open_run(folder / "first" / "run")
    steps = torch.arange(0, 101, 10)
    kept, progress = [one.step for one in run.checkpoints()], measure_progress(run, frequencies=[1])
    monkeypatch.setattr("hooklens.studies.grokking_study.read_circuit", lambda model, data: with_keys(model, data))
    monkeypatch.setattr("hooklens.studies.grokking_study.measure_progress", lambda run, frequencies: progress)
    said = {}
    for memorised in (0, 40):  # checkpoints after 0, 1, 3, 10, 32 and 100 steps
        train, held_out = ((steps >= step).float() for step in (memorised, 90))
        found = GrokkingStep.of_curves(steps, train, steps, held_out)
        monkeypatch.setattr("hooklens.studies.grokking_study.find_grokking", lambda run, found=found: found)
        study = study_grokking(run)
        said[memorised] = study.phases is None, any("Phases are not read" in line for line in study.findings())
    assert said == {0: (False, False), 40: (True, True)}, kept


def with_keys(model, data):
    """The circuit of a model, with frequency 1 for a key one."""
    circuit = read_circuit(model, data)
    keys = replace(circuit.keys, by_rule=circuit.keys.by_rule | {"neurons": [1]})
    return replace(circuit, keys=keys, restricted=1.0, excluded=1.0)


def test_one_model_has_no_norm_and_effects_that_add_up_are_said_to(study):
    alone = study_grokked_model(tiny_model(d_vocab=8), hl.data.modular_arithmetic(7, fraction=0.5))
    assert not [name for name in alone.values() if "norm" in name or "control" in name]
    sizes = {"modulus": 7, "frequency": torch.tensor([1, 1]), "clean": 2.0, "corrupted": 0.0, "largest_error": 0.0}
    for effects, says in (
        ([1.0, 1.0], "all of the MLP, must add up to 100%"),
        ([0.5, 0.5], "What is missing from 100%"),
    ):
        patching = NeuronPatching(effects=torch.tensor(effects), **sizes)
        text = " ".join(replace(study, circuit=replace(study.circuit, patching=patching)).findings())
        assert says in text

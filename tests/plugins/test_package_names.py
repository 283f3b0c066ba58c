"""The short imports: `from hooklens.plugins.lens import logit_lens` is the function, whatever was imported before."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = """
circuits: Circuit CircuitEvaluation CircuitGraph CircuitTransfer Completeness Discovery EdgeRuns EdgeScores
    Faithfulness FaithfulnessCurve Matching Minimality Pruning Roles acdc acdc_nodes circuit_graph circuit_of eap
    eap_ig eap_ig_activations eap_ig_midpoint eap_ig_own_source evaluate_circuit measure_faithfulness
    trace_faithfulness prune_edges prune_edges_below prune_nodes prune_nodes_below random_circuits run_edges
    transfer_circuit whole_circuit
heads: Composition CopySuppression Copying Criteria HeadScores InductionHeads Knockout Mediation NameMovers
    PositionScores Redundancy Taxonomy score_composition score_copy_suppression score_copying score_heads
    find_induction_heads knock_out_keys measure_mediation find_name_movers score_positions measure_redundancy
    classify_heads
lens: Calibration LogitAttribution LogitLens PredictionLens Trajectory TunedLens TunedLensTraining measure_calibration
    direct_logit_attribution fit_tuned_lens lens_logits logit_lens prediction_lens train_tuned_lens trace_predictions
    tuned_lens
patching: AblationComparison AblationSweep At AttributionPatching Choice Fixed Given InformationFlow InputAttribution
    Mean MeanOfOthers MeanOverPositions OtherRun PatchSweep PathSweep Replacement Resample WeightRandomisation Zero
    ablate attribution_patch compare_ablations gradient_x_input trace_information integrated_gradients patch
    path_patch
probing: PROBES TASKS Activations Calibration CausalCheck Geometry Logistic MassMean Probe ProbeKind ProbeStudy
    ProbeTask Ridge TokenProjection Transfer WhitenedMassMean check_probe_use gather next_vowel odd_first
    part_of_speech measure_geometry probe_texts project_tokens read_task sentiment subject_number sum_over_50
    train_probe train_value_probe transfer_probe ValueProbe ValueStudy
steering: CoefficientSweep ContrastDirections DirectionAblation StreamEdit SweepSettings ablate_direction
    sweep_coefficients find_direction measure_direction_ablation project_out steer
weights: NeuronTokens Overlap PrincipalAngles SingularDirections Spectra Spectrum TokenLists effective_rank
    mlp_read_directions mlp_write_directions read_neurons numerical_rank ov_directions measure_overlap
    participation_ratio measure_angles qk_directions measure_spectrum
"""
PUBLIC = {package: names.split() for package, names in re.findall(r"(\w+): ([^:]*)(?=\n\w+:|$)", NAMES)}


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_has_these_names_and_they_are_no_modules(package):
    module = importlib.import_module(f"hooklens.plugins.{package}")
    assert sorted(module.__all__) == sorted(PUBLIC[package])
    for name in module.__all__:
        value = getattr(module, name)
        assert not inspect.ismodule(value)
        if inspect.isroutine(value) or inspect.isclass(value):
            assert value.__name__ == name and value.__module__.startswith(
                ("hooklens.plugins.", "hooklens.sweeps.nodes", "hooklens.sweeps.replacement")
            )


def test_every_package_of_methods_is_pinned_here():
    import hooklens.plugins

    folders = {path.parent for path in Path(hooklens.plugins.__file__).parent.glob("*/__init__.py")}
    # algorithmic/ holds families of its own, and exports nothing itself
    assert {folder.name for folder in folders if not list(folder.glob("*/__init__.py"))} == set(PUBLIC)


def test_no_package_brings_anything_heavy_whichever_comes_first():
    code = """
import importlib, json, sys
import hooklens.public
for package in {packages}:
    for name in [name for name in sys.modules if name.startswith("hooklens.plugins.")]:
        del sys.modules[name]                                 # no cycle from wherever one begins
    importlib.import_module("hooklens.plugins." + package)
print(json.dumps([name for name in ("plotly", "sklearn", "scipy", "pandas") if name in sys.modules]))
"""
    assert json.loads(fresh(code.format(packages=list(PUBLIC)))) == []


def test_a_module_stays_a_module_beside_the_function_that_its_package_exports():
    import hooklens.plugins.lens.layer_lens as layer_lens
    from hooklens.plugins.lens import logit_lens

    assert inspect.ismodule(layer_lens) and layer_lens.logit_lens is logit_lens

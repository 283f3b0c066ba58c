"""The short imports: `from hooklens.plugins.lens import logit_lens` is the function, whatever was imported before."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NAMES = """
circuits: Circuit CircuitEvaluation CircuitGraph CircuitTransfer Completeness Discovery EdgeRuns
    EdgeScores Faithfulness FaithfulnessCurve Matching Minimality Pruning Roles acdc acdc_nodes circuit_graph
    circuit_of eap eap_ig eap_ig_activations eap_ig_midpoint eap_ig_own_source evaluate faithfulness faithfulness_curve
    prune_edges prune_edges_below prune_nodes prune_nodes_below random_circuits run_edges transfer_circuit
    whole_circuit
heads: Composition CopySuppression Copying Criteria HeadScores InductionHeads Knockout Mediation NameMovers
    PositionScores Redundancy Taxonomy composition copy_suppression copying head_scores induction_heads
    knockout mediation name_movers position_scores redundancy taxonomy
lens: Calibration LogitAttribution LogitLens Trajectory TunedLens TunedLensTraining calibration
    direct_logit_attribution fit_tuned_lens lens_logits logit_lens train_tuned_lens trajectory tuned_lens
patching: AblationComparison AblationSweep At AttributionPatching Choice Fixed Given InformationFlow
    InputAttribution Mean MeanOfOthers MeanOverPositions OtherRun PatchSweep PathSweep Replacement Resample
    WeightRandomisation Zero ablate attribution_patching compare_ablations gradient_x_input information_flow
    integrated_gradients patch path_patch
probing: PROBES TASKS Activations Calibration CausalCheck Geometry Logistic MassMean Probe ProbeKind ProbeStudy
    ProbeTask Ridge TokenProjection Transfer WhitenedMassMean causal_check gather next_vowel odd_first part_of_speech
    probe_geometry probe_texts project_tokens read_task sentiment subject_number sum_over_50 train_probe transfer
steering: CoefficientSweep ContrastDirections DirectionAblation StreamEdit SweepSettings ablate_direction
    coefficient_sweep contrast_direction direction_ablation project_out steer
weights: NeuronTokens Overlap PrincipalAngles SingularDirections Spectra Spectrum TokenLists effective_rank
    mlp_read_directions mlp_write_directions neuron_tokens numerical_rank ov_directions overlap participation_ratio
    principal_angles qk_directions spectrum
"""
PUBLIC = {package: names.split() for package, names in re.findall(r"(\w+): ([^:]*)(?=\n\w+:|$)", NAMES)}

SAME = sorted(  # modules called as a function that their package has
    f"{package}.{name}"
    for package, names in PUBLIC.items()
    for name in names
    if find_spec(f"hooklens.plugins.{package}.{name}")
)


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

    found = {path.parent.name for path in Path(hooklens.plugins.__file__).parent.glob("*/__init__.py")}
    assert found == set(PUBLIC)


def test_modules_called_as_their_function_are_many():
    assert {"lens.logit_lens", "heads.taxonomy", "weights.overlap", "probing.transfer"} <= set(SAME)


CODE = """
import importlib, json, sys
import hooklens.public
wrong, same, packages = [], {same}, {packages}
for package in packages:
    for name in [name for name in sys.modules if name.startswith("hooklens.plugins.")]:
        del sys.modules[name]                                 # no cycle from wherever one begins
    here = [name for name in same if name.startswith(package + ".")]
    for path in here or [package]:                            # the modules before the package
        module = importlib.import_module("hooklens.plugins." + path)
    for path in here:
        name = path.split(".")[1]
        of_package = getattr(sys.modules["hooklens.plugins." + package], name)
        if of_package is not getattr(sys.modules["hooklens.plugins." + path], name):
            wrong.append(path)
print(json.dumps([wrong, [name for name in ("plotly", "sklearn", "scipy", "pandas") if name in sys.modules]]))
"""


def test_the_function_stands_whatever_is_imported_first_and_nothing_heavy_comes_along():
    """Importing a submodule sets it as the package's attribute, over a function of that name bound lazily."""
    assert json.loads(fresh(CODE.format(same=SAME, packages=list(PUBLIC)))) == [[], []]


def test_both_ways_of_importing_give_one_function():
    import hooklens.plugins.lens.layer_lens
    from hooklens.plugins.lens import logit_lens
    from hooklens.plugins.lens.layer_lens import logit_lens as the_long_way

    assert logit_lens is the_long_way is hooklens.plugins.lens.layer_lens
    assert importlib.import_module("hooklens.plugins.lens.layer_lens").logit_lens is logit_lens

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
algorithmic.fourier: Circles FourierSpectrum FrequencyAblation KeyFrequencies LogitFormula NeuronFrequencies
    NeuronPatching PairTable PlaneSpectrum Progress SmallestSet SumDirections Task ablate_logit_frequencies
    ablate_neuron_frequencies classify_neurons component_frequencies component_names cross_entropy distinguished
    excluded_logits excluded_loss explain_by_frequency explain_by_sum find_key_frequencies find_smallest_set
    fit_logit_formula formula_coefficients formula_logits fourier_basis frequency_power frequency_power_2d gini
    inverse_2d inverse_participation_ratio keep_frequencies keep_single_frequencies logit_similarity mean_by_sum
    measure_fourier_spectrum measure_plane_spectrum measure_progress neuron_logit_map patch_neurons
    project_embedding random_pairs read_sum_directions restricted_logits restricted_loss run_pairs sums tabulate
    task_of transform transform_2d
algorithmic.grokking: GrokkingStep NormDrops Phases TableRegions binomial_interval compare_norm_drops
    control_recipes fast_recipe find_grokking find_phases grokking_recipe measure_regions
    squared_weights
algorithmic.icl: AttentionRegression Averaging BestStep DepthGap ExpectedError FirstKeys GDPlusPlus GradientDescent
    InputMoments KernelComparison Learner LearnerComparison LeastSquares PreconditionedStep RankCollapse
    RegressionPrompts Ridge ShiftErrors WeightInterpolation WeightProducts Zero best_constant_steps
    best_gd_plus_plus best_preconditioner best_step best_step_schedules collapse_bound compare_learners
    compare_with_kernel composite_norm construct_descent draw_prompts expected_error independent_moments
    interpolate_weights kernel_weights measure_depth_gap measure_rank_collapse measure_shifts moments_of
    normal_moments predict prompts_of regress_attention residual_to_rank_one sensitivity_of smooth task_of
    uniform_moments weight_products
circuits: Circuit CircuitEvaluation CircuitGraph CircuitTransfer Completeness Discovery EdgeRuns EdgeScores
    Faithfulness FaithfulnessCurve Matching Minimality Pruning Roles acdc acdc_nodes circuit_graph circuit_of eap
    eap_ig eap_ig_activations eap_ig_midpoint eap_ig_own_source evaluate_circuit measure_faithfulness
    trace_faithfulness prune_edges prune_edges_below prune_nodes prune_nodes_below random_circuits run_edges
    transfer_circuit whole_circuit
heads: Composition CopySuppression Copying Criteria HeadScores InductionHeads Knockout Mediation NameMovers
    PositionScores Redundancy Taxonomy score_composition score_copy_suppression score_copying score_heads
    find_induction_heads knock_out_keys measure_mediation find_name_movers score_positions measure_redundancy
    classify_heads
lens: Calibration LogitAttribution LogitLens PredictionLens Trajectory TunedLens TunedLensTraining
    measure_calibration direct_logit_attribution fit_tuned_lens lens_logits logit_lens prediction_lens
    train_tuned_lens trace_predictions tuned_lens
patching: AblationComparison AblationSweep At AttributionPatching Choice Fixed Given InformationFlow
    InputAttribution Mean MeanOfOthers MeanOverPositions OtherRun PatchSweep PathSweep Replacement Resample
    WeightRandomisation Zero ablate attribution_patch compare_ablations gradient_x_input trace_information
    integrated_gradients patch path_patch
probing: PROBES TASKS Activations Calibration CausalCheck Geometry Logistic MassMean Probe ProbeKind ProbeStudy
    ProbeTask Ridge TokenProjection Transfer ValueProbe ValueStudy WhitenedMassMean check_probe_use gather
    next_vowel odd_first part_of_speech measure_geometry probe_texts project_tokens read_task sentiment
    subject_number sum_over_50 train_probe train_value_probe transfer_probe
steering: CoefficientSweep ContrastDirections DirectionAblation StreamEdit SweepSettings ablate_direction
    sweep_coefficients find_direction measure_direction_ablation project_out steer
weights: NeuronTokens Overlap PrincipalAngles SingularDirections Spectra Spectrum TokenLists effective_rank
    mlp_read_directions mlp_write_directions read_neurons numerical_rank ov_directions measure_overlap
    participation_ratio measure_angles qk_directions measure_spectrum
"""
PUBLIC = {package: names.split() for package, names in re.findall(r"([\w.]+): ([^:]*)(?=\n[\w.]+:|$)", NAMES)}


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

    root = Path(hooklens.plugins.__file__).parent
    packages = {".".join(path.parent.relative_to(root).parts) for path in root.glob("*/**/__init__.py")}
    assert packages - {"algorithmic"} == set(PUBLIC)  # which only holds families


@pytest.mark.slow
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

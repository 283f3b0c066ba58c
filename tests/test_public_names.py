"""The public names stay, with their arguments; importing them stays light."""

import inspect
import subprocess
import sys

import pytest

import hooklens as hl

NAMES = [
    "ActivationCache",
    "FactoredMatrix",
    "HookCall",
    "HookPoint",
    "HookedModule",
    "HookedTransformer",
    "HookedTransformerConfig",
    "HooklensError",
    "KVCache",
    "Mean",
    "PatchSweep",
    "Result",
    "Site",
    "Table",
    "describe",
    "differentiable_attention",
    "engine",
    "kl",
    "load",
    "log_prob",
    "logit_diff",
    "loss",
    "packed_linears",
    "patch",
    "prob",
    "recovered",
    "site",
    "wrap",
]

METHODS = [
    "run_with_hooks",
    "run_with_cache",
    "add_hook",
    "hooks",
    "generate",
    "to_tokens",
    "to_string",
    "to_str_tokens",
    "to_single_token",
    "hook_names",
    "W_E",
    "W_pos",
    "W_U",
    "b_U",
    "W_Q",
    "W_K",
    "W_V",
    "W_O",
    "b_Q",
    "b_K",
    "b_V",
    "b_O",
    "W_in",
    "W_gate",
    "W_out",
    "b_in",
    "b_out",
    "QK",
    "OV",
]

ARGUMENTS = {
    hl.load: ["source", "tokenizer", "device", "dtype", "fold"],
    hl.patch: ["model", "clean", "corrupted", "metric", "site", "by", "value", "resume"],
    hl.logit_diff: ["model", "answer", "wrong_answer", "pos"],
    hl.site: ["name", "layer", "part"],
    hl.HookedTransformer.forward: [
        "self", "tokens", "start_at_layer", "stop_at_layer", "kv_cache", "attention_mask", "logits_at",
    ],
}  # fmt: skip

HEAVY = ["plotly", "sklearn", "scipy", "pandas", "gudhi", "typer", "transformers", "huggingface_hub"]


def test_the_public_names_are_these():
    assert hl.__all__ == NAMES
    assert all(hasattr(hl, name) for name in NAMES)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_has(name):
    assert hasattr(hl.HookedTransformer, name) or name in vars(hl.HookedTransformer)


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__name__)
def test_arguments_stay(function):
    assert list(inspect.signature(function).parameters) == ARGUMENTS[function]


@pytest.mark.parametrize("name", ["values", "clean", "corrupted", "recovered", "top", "table", "figure", "per_pair"])
def test_a_sweep_has(name):
    assert name in hl.PatchSweep.__dataclass_fields__ or hasattr(hl.PatchSweep, name)


def test_importing_is_light():
    code = f"import sys, hooklens; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

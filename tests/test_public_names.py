"""The public names stay, with their arguments; importing them stays light."""

import inspect
import subprocess
import sys
from pathlib import Path

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
    "Resume",
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


def fresh(code):
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_is_light():
    assert fresh(f"import sys, hooklens.public; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_torch_comes_with_the_first_name():
    assert fresh("import sys, hooklens as hl; hl.__version__; print('torch' in sys.modules)") == "False"
    assert fresh("import sys, hooklens as hl; hl.load; print('torch' in sys.modules)") == "True"


@pytest.mark.parametrize(
    "code",
    [
        "import hooklens as hl; print(*(name for name in dir(hl) if name in hl.__all__))",
        "import hooklens as hl; print(*(name for name in hl.__all__ if hasattr(hl, name)))",
        "from hooklens import *; print(*sorted(name for name in list(globals()) if not name.startswith('_')))",
    ],
)
def test_the_names_are_there_before_any_was_asked_for(code):
    assert fresh(code).split() == NAMES


def test_a_submodule_hides_no_name():
    code = "import hooklens.cli, hooklens.plugins.patching.activation, hooklens as hl; print(hl.patch.__module__)"
    assert fresh(code) == "hooklens.plugins.patching.activation"
    assert not {path.stem for path in Path(hl.__file__).parent.iterdir()} & set(NAMES)


def test_a_name_that_does_not_exist_is_told():
    with pytest.raises(AttributeError, match="module 'hooklens' has no attribute 'pach'"):
        _ = hl.pach
    with pytest.raises(ImportError, match="pach"):
        from hooklens import pach  # noqa: F401

"""The public names stay, with their arguments; importing them stays light."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hooklens as hl

NAMES = [
    "ActivationCache",
    "Component",
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
    "PromptPairs",
    "Replacement",
    "Result",
    "Resume",
    "Site",
    "Table",
    "ablate",
    "checkpoints",
    "circuits",
    "data",
    "describe",
    "differentiable_attention",
    "engine",
    "fourier",
    "grokking",
    "heads",
    "icl",
    "kl",
    "lens",
    "load",
    "log_prob",
    "logit_diff",
    "logit_lens",
    "loss",
    "open_run",
    "packed_linears",
    "patch",
    "patching",
    "path_patch",
    "prediction",
    "prob",
    "probing",
    "recovered",
    "save",
    "scratch",
    "site",
    "squared_error",
    "steer",
    "steering",
    "studies",
    "train",
    "train_probe",
    "training",
    "weights",
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


def test_a_method_is_in_its_family_and_a_missing_name_says_which():
    assert hl.patching.patch is hl.patch and hl.lens.logit_lens is hl.logit_lens and callable(hl.circuits.acdc)
    with pytest.raises(AttributeError, match=r"no 'acdc'; it is hl\.circuits\.acdc"):
        hl.acdc  # noqa: B018
    with pytest.raises(AttributeError, match=r"no 'qwertz'$"):
        hl.qwertz  # noqa: B018
    with pytest.raises(AttributeError, match=r"no 'logit_lense'; closest: hl\.logit_lens"):
        hl.logit_lense  # noqa: B018
    assert not hasattr(hl, "_nothing")


@pytest.mark.parametrize("name", METHODS)
def test_the_model_has(name):
    assert hasattr(hl.HookedTransformer, name) or name in vars(hl.HookedTransformer)


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__name__)
def test_arguments_stay(function):
    assert list(inspect.signature(function).parameters) == ARGUMENTS[function]


@pytest.mark.parametrize("name", ["values", "clean", "corrupted", "recovered", "top", "table", "figure", "per_pair"])
def test_a_sweep_has(name):
    assert name in hl.PatchSweep.__dataclass_fields__ or hasattr(hl.PatchSweep, name)


FRESH = """
import json, sys
import hooklens as hl
hl.__version__
import hooklens.plugins
seen = {"torch at first": "torch" in sys.modules}
hl.load
seen["torch at the first name"] = "torch" in sys.modules
seen["beside a tokenizer"] = [name for name in sys.argv[1].split() if name in sys.modules]
import hooklens.public, hooklens.results.result, hooklens.plugins.patching.activation
seen["heavy"] = [name for name in sys.argv[2].split() if name in sys.modules]
seen["patch"] = hl.patch.__module__
seen["dir"] = [name for name in dir(hl) if name in hl.__all__]
seen["has"] = [name for name in hl.__all__ if hasattr(hl, name)]
import hooklens.cli
seen["beside the command line"] = [name for name in sys.argv[2].split() if name in sys.modules]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen():
    """What a new interpreter sees, in the order of FRESH."""
    light = "transformers tokenizers gguf rich"
    command = [sys.executable, "-c", FRESH, light, " ".join(HEAVY)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_importing_is_light(seen):
    assert seen["beside a tokenizer"] == [] and seen["heavy"] == []
    assert seen["beside the command line"] == ["typer"]


def test_torch_comes_with_the_first_name(seen):
    assert not seen["torch at first"] and seen["torch at the first name"]


def test_the_names_are_there_before_any_was_asked_for(seen):
    assert seen["dir"] == seen["has"] == NAMES


def test_a_star_import_brings_the_names():
    namespace = {}
    exec("from hooklens import *", namespace)
    assert sorted(name for name in namespace if not name.startswith("_")) == NAMES


def test_a_submodule_hides_no_name(seen):
    assert seen["patch"] == "hooklens.plugins.patching.activation"
    packages = {"data", "scratch", "studies", "training", *FAMILIES}  # which are the names themselves
    files = {path.stem for path in Path(hl.__file__).parent.iterdir()} - packages
    assert not files & set(NAMES)


def test_a_name_that_does_not_exist_is_told():
    with pytest.raises(AttributeError, match="hooklens has no 'pach'"):
        _ = hl.pach
    with pytest.raises(ImportError, match="pach"):
        from hooklens import pach  # noqa: F401


FAMILIES = ("circuits", "heads", "lens", "patching", "probing", "steering", "weights")
BY_FAMILY = """
import sys
import hooklens as hl
for family in sys.argv[1:]:
    names = {}
    exec(f"from hooklens.{family} import *; import hooklens.plugins.{family} as module", names)
    assert getattr(hl, family).__all__ == names["module"].__all__
    assert all(names[name] is getattr(names["module"], name) for name in names["module"].__all__), family
    assert all(names[name] is getattr(getattr(hl, family), name) for name in names["module"].__all__), family
from hooklens.circuits import acdc
assert acdc is hl.circuits.acdc
"""


def test_names_of_a_family_could_not_be_imported_from_it():
    """In a new process."""
    done = subprocess.run([sys.executable, "-c", BY_FAMILY, *FAMILIES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

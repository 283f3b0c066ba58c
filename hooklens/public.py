"""All public names; `hooklens` imports them from here on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

from hooklens.anatomy.description import describe
from hooklens.core.cache import ActivationCache
from hooklens.core.component import Component
from hooklens.core.errors import HooklensError, closest
from hooklens.core.hooks import HookCall, HookedModule, HookPoint
from hooklens.core.names import Site, site
from hooklens.core.wrapping import wrap
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.metrics import kl, log_prob, logit_diff, loss, prediction, prob, recovered, squared_error
from hooklens.model.attention import differentiable_attention
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.factored import FactoredMatrix
from hooklens.model.kv_cache import KVCache
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.checkpoint import save
from hooklens.pretrained.loading import load
from hooklens.results.result import Result, Table
from hooklens.sweeps.resume import Resume
from hooklens.sweeps.settings import engine

if TYPE_CHECKING:
    from hooklens import data, scratch, studies, training
    from hooklens.plugins import circuits, heads, lens, patching, probing, steering, weights
    from hooklens.plugins.algorithmic import fourier, grokking, icl
    from hooklens.plugins.lens import logit_lens
    from hooklens.plugins.patching import Mean, PatchSweep, Replacement, ablate, patch, path_patch
    from hooklens.plugins.probing import train_probe
    from hooklens.plugins.steering import steer
    from hooklens.training import checkpoints, open_run, train

#: Families of methods, and the methods that most people begin with. They are imported on first use, as each imports
#: its whole family.
_PLUGINS = ("circuits", "heads", "lens", "patching", "probing", "steering", "weights")
_FAMILIES = {name: f"hooklens.plugins.{name}" for name in _PLUGINS}
_FAMILIES |= {name: f"hooklens.plugins.algorithmic.{name}" for name in ("fourier", "grokking", "icl")}
_FAMILIES |= {name: f"hooklens.{name}" for name in ("data", "scratch", "studies", "training")}
_VERBS = {
    **dict.fromkeys(("Mean", "PatchSweep", "Replacement", "ablate", "patch", "path_patch"), "patching"),
    **dict.fromkeys(("checkpoints", "open_run", "train"), "training"),
    "logit_lens": "lens",
    "steer": "steering",
    "train_probe": "probing",
}

__all__ = [
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


def __getattr__(name: str) -> object:
    """A family of methods, or one of its verbs."""
    if name in _FAMILIES:
        return import_module(_FAMILIES[name])
    if name in _VERBS:
        return getattr(import_module(_FAMILIES[_VERBS[name]]), name)
    raise AttributeError(f"hooklens has no {name!r}{_hint(name)}")


def _hint(name: str) -> str:
    """In which families a name is, if it is in any; else the names nearest to it."""
    if name.startswith("_"):
        return ""
    known = {f"{family}.{verb}": verb for family, path in _FAMILIES.items() for verb in import_module(path).__all__}
    if inside := [f"hl.{path}" for path, verb in known.items() if verb == name]:
        return f"; it is {' and '.join(inside)}"
    near = closest(name, [*__all__, *known.values()], many=2, cutoff=0.75)
    paths = [name if name in __all__ else next(path for path, verb in known.items() if verb == name) for name in near]
    return f"; closest: {', '.join(f'hl.{path}' for path in dict.fromkeys(paths))}" if paths else ""

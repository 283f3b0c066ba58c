"""Every public name: `hooklens` takes them from here when the first one is asked for."""

from typing import TYPE_CHECKING

from hooklens.anatomy.description import describe
from hooklens.core.cache import ActivationCache
from hooklens.core.errors import HooklensError
from hooklens.core.hooks import HookCall, HookedModule, HookPoint
from hooklens.core.names import Site, site
from hooklens.core.wrap import wrap
from hooklens.metrics import kl, log_prob, logit_diff, loss, prob, recovered
from hooklens.model.attention import differentiable_attention
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.factored import FactoredMatrix
from hooklens.model.kv_cache import KVCache
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.load import load
from hooklens.results.result import Result, Table
from hooklens.sweeps.resume import Resume
from hooklens.sweeps.settings import engine

if TYPE_CHECKING:
    from hooklens.plugins.patching.activation import Mean, PatchSweep, patch

__all__ = [
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


def __getattr__(name: str) -> object:
    """`patch` and what belongs to it come when asked for: their package brings every method of patching."""
    if name not in ("Mean", "PatchSweep", "patch"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("hooklens.plugins.patching.activation"), name)

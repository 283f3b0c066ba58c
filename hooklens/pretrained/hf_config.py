"""Read a Hugging Face config.json: sizes, activation, rotary positions and windows, each checked before use."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from hooklens.core.errors import InputError
from hooklens.model import config

#: Names of activation functions: Hugging Face's to ours.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "quick_gelu": "gelu_quick",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "identity",
}
ROPE_TYPES = ("default", "linear", "llama3", "longrope")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_dtype(value: Any) -> bool:
    if isinstance(value, dict):  # one per part of a composite model
        return all(dtype is None or _is_dtype(dtype) for dtype in value.values())
    named = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    return value == "auto" or isinstance(named, torch.dtype)


#: Settings of many configurations that not every family reads. A wrong type means that the file is not a valid config.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sliding_window": (_is_count, "a whole number of tokens"),
    "max_window_layers": (_is_count, "a whole number of layers"),
    "layer_types": (lambda value: isinstance(value, list | tuple), "a list of the kinds of layers"),
    "rope_parameters": (lambda value: isinstance(value, dict), "an object of settings"),
    "rope_scaling": (lambda value: isinstance(value, dict), "an object of settings"),
    "dtype": (_is_dtype, "the name of a torch dtype such as 'bfloat16'"),
    "torch_dtype": (_is_dtype, "the name of a torch dtype such as 'bfloat16'"),
}
_WINDOWED = {"sliding_attention": True, "full_attention": False}


class HFConfig:
    """The values of a config.json, and their origin for error messages.

    >>> config = HFConfig({"hidden_size": 64, "hidden_act": "silu"}, "config.json")
    >>> config.size("hidden_size"), config.activation("hidden_act")
    (64, 'silu')

    `most_layers` is the number of tensors in the checkpoint. Every layer has at least one, so a config with more layers
    is refused before any layer is built.
    """

    def __init__(self, values: dict[str, Any], where: str, *, most_layers: int | None = None):
        self.values, self.where, self.most_layers = values, where, most_layers
        self.defaults: dict[str, Any] = {}
        for key, (good, needed) in _KINDS.items():
            value = self.get(key)
            if value is not None and not good(value):
                raise self._refused(f"{key} is {value!r:.80}; {needed} is needed, or null")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default if the key is absent or null."""
        value = self.values.get(key)
        return self.defaults.get(key, default) if value is None else value

    def _refused(self, problem: str) -> InputError:
        return InputError(f"{self.where}: {problem}")

    def with_defaults(self, defaults: dict[str, Any]) -> "HFConfig":
        """The same values, with a family's defaults for keys that are absent or null."""
        changed = copy.copy(self)
        changed.defaults = defaults
        return changed

    @property
    def d_head(self) -> int:
        """The number of dimensions of a head: `head_dim`, or the width divided by the number of heads."""
        if self.get("head_dim") is not None:
            return self.size("head_dim")
        return self.size("hidden_size") // self.size("num_attention_heads")

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(key, default)
        if value is None:
            raise InputError(
                f"{self.where} has no {key!r}, which is needed to build the model; it has {', '.join(self.values)}"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63:
            raise self._refused(f"{key} is {value!r:.80}; a whole number of at least 1 is needed")
        return value

    def layers(self, key: str, default: int | None = None) -> int:
        """The number of layers, checked against the number of tensors in the checkpoint."""
        n_layers = self.size(key, default)
        if self.most_layers is not None and n_layers > self.most_layers:
            raise self._refused(
                f"{key} is {n_layers:,}, but there are only {self.most_layers} tensors; do the configuration and the "
                "weights belong together?"
            )
        return n_layers

    def number(self, key: str, default: float) -> float:
        """A positive, finite number. Every number read this way is a divisor or is divided."""
        return self._number(key, self.get(key, default))

    def _number(self, key: str, value: Any) -> float:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not (math.isfinite(number) and number > 0):
            raise self._refused(f"{key} is {value!r:.80}; a finite number above 0 is needed")
        return number

    def flag(self, key: str, default: bool) -> bool:
        """True or false; any other value (a variant of the architecture) raises an error."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._refused(f"{key} is {value!r}; only true and false are supported")
        return value

    def refuse(self, key: str, *, allowed: Any, why: str) -> None:
        """Refuse a setting that this library cannot represent."""
        value = self.get(key, allowed)
        if value != allowed:
            raise self._refused(f"{key} is {value!r}: {why}; only {allowed!r} is supported")

    def activation(self, key: str, default: str = "silu") -> str:
        """Our name for the activation function."""
        name = self.get(key, default)
        if name not in ACTIVATIONS:
            supported = ", ".join(ACTIVATIONS)
            raise self._refused(f"{key} is {name!r}, an unsupported activation function; supported: {supported}")
        return ACTIVATIONS[name]

    def rope_settings(self) -> dict[str, Any]:
        """The rotary settings, in the format of transformers 5 or 4."""
        beside = {key: self.get(key) for key in ("rope_theta", "partial_rotary_factor") if self.get(key) is not None}
        return beside | (self.get("rope_parameters") or self.get("rope_scaling") or {})

    def rotary(self, d_head: int, settings: dict[str, Any] | None = None, *, theta: float = 10000.0) -> config.Rotary:
        """Build the rotary part from the settings."""
        settings = self.rope_settings() if settings is None else settings
        if nested := [key for key, value in settings.items() if isinstance(value, dict)]:
            raise self._refused(
                f"this family has no rotary settings by kind of layer ({', '.join(nested)}); only one setting for all "
                "layers is supported"
            )
        dim = int(d_head * self._number("partial_rotary_factor", settings.get("partial_rotary_factor") or 1.0))
        if dim < 2 or dim > d_head or dim % 2:
            raise self._refused(
                f"rotary positions would rotate {dim} of {d_head} dimensions of a head; it must be even"
            )
        base = self._number("rope_theta", theta if settings.get("rope_theta") is None else settings["rope_theta"])
        return config.Rotary(base, None if dim == d_head else dim, self._scaling(settings, dim))

    def _scaling(self, settings: dict[str, Any], dim: int) -> config.ScalingPart | None:
        kind = settings.get("rope_type") or settings.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise self._refused(f"the rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        try:
            if kind == "linear":
                return config.LinearScaling(self._number("factor", settings["factor"]))
            if kind == "llama3":
                names = ("factor", "low_freq_factor", "high_freq_factor")
                factor, low, high = (self._number(name, settings[name]) for name in names)
                return config.Llama3Scaling(factor, low, high, self._original(settings))
            return self._long(settings, dim) if kind == "longrope" else None
        except KeyError as error:
            given = sorted(settings)
            raise self._refused(f"the rope type {kind!r} needs {error}; its settings are {given}") from None

    def _original(self, settings: dict[str, Any]) -> int:
        fallback = settings.get("original_max_position_embeddings") or self.get("max_position_embeddings")
        return self.size("original_max_position_embeddings", fallback)

    def _long(self, settings: dict[str, Any], dim: int) -> config.DividedScaling:
        """One divisor per frequency, in two sets (Ding et al. 2024, LongRoPE); cos and sin scale by `magnitude`."""
        original = self._original(settings)
        short, long = (tuple(map(float, settings[f"{name}_factor"])) for name in ("short", "long"))
        if not len(short) == len(long) == dim // 2:
            seen = f"{len(short)} short and {len(long)} long ones"
            raise self._refused(f"longrope needs {dim // 2} factors, one per frequency; it has {seen}")
        stretch = settings.get("factor") or self.size("max_position_embeddings") / original
        grown = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return config.DividedScaling(short, long, original, float(settings.get("attention_factor") or grown))

    def masks(self, window: int | None, layer_types: list[str] | None = None) -> config.PerLayer:
        """The mask of every layer: windowed where `layer_types` says so, or in all layers if it is None."""
        if window is None:
            return config.Causal()
        if layer_types is None:
            return config.SlidingWindow(window)
        if unknown := ", ".join(sorted(set(layer_types) - set(_WINDOWED))):
            raise self._refused(f"layers of the kind {unknown} are not supported; supported: {', '.join(_WINDOWED)}")
        masks = {True: config.SlidingWindow(window), False: config.Causal()}
        return tuple(masks[_WINDOWED[kind]] for kind in layer_types)

    def layer_types(self, default: list[str]) -> list[str]:
        """The kind of attention of each layer."""
        kinds = list(self.get("layer_types", default))
        if len(kinds) != len(default):
            raise self._refused(f"layer_types lists {len(kinds)} layers, but the model has {len(default)}")
        return kinds

"""The configuration of a model: a short list of sizes, and injected parts instead of switches."""

import math
import numbers
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.errors import InputError, NameNotFound, WrongType, did_you_mean

Frequencies = Float[Tensor, "pair"]
RowFrequencies = Float[Tensor, "*batch pair"]
Lengths = Int[Tensor, "*batch"]
Scores = Float[Tensor, "batch head query_pos key_pos"]
Seen = Bool[Tensor, "#batch #head query_pos key_pos"] | None
# Broadcast against each other, whatever their axes.
Positions = Int[Tensor, "..."]
Allowed = Bool[Tensor, "..."]

_PARTS: dict[str, dict[str, Any]] = {}  # the classes by slot and name
_POSITIVE = {"base", "factor", "low_freq_factor", "high_freq_factor", "magnitude", "short", "long"}
_POSITIVE |= {"scale", "soft_cap", "output_logits_soft_cap"}
_POSITIVE |= {"dim", "window", "original_n_ctx", "d_in", "n_layers", "d_model", "n_ctx", "n_heads", "d_vocab"}
_SETTLED = ("d_head", "n_key_value_heads", "d_vocab_out", "d_mlp")  # their defaults follow from other fields
_POSITIVE |= set(_SETTLED)
_NOT_NEGATIVE = {"eps", "std", "unembed_std"}
_NOT_NEGATIVE |= {"lr", "weight_decay", "amplify", "warmup", "floor", "gamma", "at"}
_BELOW_ONE = {"momentum", "decay"}
_KINDS: dict[Any, str] = {bool: "True or False", str: "a name", int: "a whole number", float: "a finite number"}
_LARGEST_WHOLE = 2**63 - 1  # torch's
_LARGEST_REAL = 1e12  # far above any model's values, and its square is finite in float32
_NUMBERS = (int, float, int | None, float | None, tuple[float, ...])


class _NamedFields:
    """Base of the dataclasses here: a keyword that is not a field raises with the closest, or where the field is."""

    moved: ClassVar[dict[str, str]] = {}

    def __new__(cls, *args: Any, **values: Any):
        holder: Any = cls
        known = [f.name for f in fields(holder)]
        for name in values:
            if name not in known and name in cls.moved:
                raise NameNotFound(f"{name} is not a field of {cls.__name__} here; give {cls.moved[name]}")
            if name not in known:
                raise did_you_mean(f"field of {cls.__name__}", name, known)
        return super().__new__(cls)


@dataclass(frozen=True)
class Part(_NamedFields):
    """A choice of component. JSON stores its registered name, so that a checkpoint can rebuild the model."""

    slot: ClassVar[str]
    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return
        if not isinstance(cls.name, str):
            raise WrongType(f"the name of the part {cls.__qualname__} must be a string, got {cls.name!r:.80}")
        known = _PARTS.setdefault(cls.slot, {})
        other = known.get(cls.name, cls)
        if not same_class(other, cls):
            raise InputError(
                f"{cls.__qualname__} is a {cls.slot} part named {cls.name!r}, and so is {other.__module__}."
                f"{other.__qualname__}; give it another name"
            )
        known[cls.name] = cls

    def __post_init__(self) -> None:
        check_values(self, type(self).__name__)

    def to_json(self) -> dict[str, Any]:
        """The part as plain values, with its registered name under "part"."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"part": self.name} | {k: v.to_json() if isinstance(v, Part) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]):
        """The part with these fields; an unknown field raises an error."""
        _check_dict(cls.__name__, values, cls)
        hashable = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**hashable)


def same_class(first: type, second: type) -> bool:
    """Whether two classes are one, possibly defined twice, as by a notebook's cell that is run again."""
    return (first.__module__, first.__qualname__) == (second.__module__, second.__qualname__)


def _check_dict(what: str, values: Any, holder: Any) -> None:
    if not isinstance(values, dict):
        raise WrongType(f"{what} is read from a dict of its fields, such as to_json returns; got {values!r:.80}")
    needed = [f.name for f in fields(holder) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise InputError(f"{what} also needs {', '.join(missing)}; got a dict with {', '.join(values) or 'no fields'}")


def check_values(holder: Any, where: str) -> None:
    """Raise for values of a wrong type or range, which would cause NaN logits or a later, unrelated error.

    >>> LinearScaling(factor=0.0)
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: LinearScaling: factor is 0.0; a finite number above 0 is needed
    """
    for f in fields(holder):
        given = getattr(holder, f.name)
        if f.name in _SETTLED or (given is None and f.type not in _KINDS):
            continue
        if f.type == tuple[float, ...] and not isinstance(given, tuple | list):
            raise InputError(f"{where}: {f.name} is {given!r:.80}; a tuple of numbers is needed, such as (0.5, 0.75)")
        for value in given if f.type == tuple[float, ...] else (given,):
            if needed := _needed(f.name, f.type, value):
                raise InputError(f"{where}: {f.name} is {value!r:.80}; {needed} is needed")


def _needed(name: str, kind: Any, value: Any) -> str | None:
    """The expected values of a field, if this value is invalid; None if it is valid or the field accepts anything."""
    if kind in (bool, str):
        return None if isinstance(value, kind) else _KINDS[kind]
    if kind not in _NUMBERS and name not in _POSITIVE:
        return None
    whole = kind in (int, int | None)
    good = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    good = good and abs(value) <= (_LARGEST_WHOLE if whole else _LARGEST_REAL)  # False for NaN
    bound = ""
    if name in _BELOW_ONE:
        good, bound = good and 0 <= value < 1, " from 0 to below 1"
    elif name in _POSITIVE:
        good, bound = good and value > 0, " above 0"
    elif name in _NOT_NEGATIVE:
        good, bound = good and value >= 0, " of at least 0"
    if good:
        return None
    return (_KINDS[int] if whole else _KINDS[float]) + bound


def part(slot: str, value: Any) -> Any:
    """Convert a name, a dict from JSON or a part to a part.

    >>> part("position", "rotary")
    Rotary(base=10000.0, dim=None, scaling=None, interleaved=False)
    """
    if value is None:
        return None
    if isinstance(value, Part):
        if value.slot != slot:
            raise InputError(f"{value!r} is a {value.slot} part, but {slot} was expected")
        if not same_class(_PARTS[slot].get(getattr(value, "name", ""), Part), type(value)):
            raise InputError(
                f"{value!r} has no name of its own, which a checkpoint stores; write name = '...' in its class"
            )
        return value
    values = dict(value) if isinstance(value, dict) else {"part": value}
    name = values.pop("part", None)
    if not isinstance(name, str):
        raise WrongType(
            f"{slot} takes a part as an instance, a name, or a dict with the name under 'part'; got {value!r:.80}"
        )
    if name not in _PARTS[slot]:
        unknown = did_you_mean(f"{slot} part", name, _PARTS[slot])
        raise type(unknown)(f"{unknown}. A part of another package is known once that package is imported")
    return _PARTS[slot][name].from_json(values)


def _undefined(part: Part, method: str) -> InputError:
    return InputError(f"{type(part).__name__} does not define {method}, which every {part.slot} part needs")


# -- positions


@dataclass(frozen=True)
class PositionPart(Part):
    """How a model represents the position of a token."""

    slot = "position"


@dataclass(frozen=True)
class Learned(PositionPart):
    """A trained vector per position, added to the embedding."""

    name = "learned"


@dataclass(frozen=True)
class Sinusoidal(PositionPart):
    """Fixed sines and cosines, added to the embedding (Vaswani et al. 2017, section 3.5)."""

    name = "sinusoidal"
    base: float = 10000.0


@dataclass(frozen=True)
class NoPositions(PositionPart):
    """No position signal except the causal mask."""

    name = "none"


@dataclass(frozen=True)
class ScalingPart(Part):
    """A change of rotary frequencies for longer contexts."""

    slot = "scaling"

    def scale(self, freq: Frequencies) -> Frequencies:
        """The changed frequencies."""
        raise _undefined(self, "scale()")


@dataclass(frozen=True)
class LinearScaling(ScalingPart):
    """Every frequency divided by a factor (Chen et al. 2023, position interpolation)."""

    name = "linear"
    factor: float = 1.0

    def scale(self, freq: Frequencies) -> Frequencies:
        return freq / self.factor


@dataclass(frozen=True)
class Llama3Scaling(ScalingPart):
    """Long wavelengths divided by a factor, short ones kept, a linear blend between (Llama 3.1)."""

    name = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_n_ctx: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"Llama3Scaling blends from low_freq_factor to high_freq_factor, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}; the second must be larger"
            )

    def scale(self, freq: Frequencies) -> Frequencies:
        turns = self.original_n_ctx * freq / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return kept * freq + (1 - kept) * freq / self.factor


@dataclass(frozen=True)
class DividedScaling(ScalingPart):
    """Every frequency divided by its own number (Phi-3 long rope), sines and cosines times `magnitude`.

    `long` replaces `short` at every position of a row with more than `original_n_ctx` tokens.
    """

    name = "divided"
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    original_n_ctx: int = 4096
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        for name in ("short", "long"):
            divisors = getattr(self, name)
            if not isinstance(divisors, tuple | list) or not divisors:
                raise InputError(
                    f"DividedScaling: {name} is a tuple with one divisor per rotary frequency, got {divisors!r:.80}"
                )
        super().__post_init__()
        if len(self.short) != len(self.long):
            raise InputError(
                f"DividedScaling: short and long need one divisor per rotary frequency each, got {len(self.short)} and "
                f"{len(self.long)}"
            )

    def is_long(self, lengths: Lengths) -> Bool[Tensor, "..."]:
        """Which rows with these lengths are longer than the original context."""
        return lengths > self.original_n_ctx

    def scale(self, freq: Frequencies, lengths: Lengths | None = None) -> RowFrequencies:
        long, short = (torch.tensor(f, dtype=freq.dtype, device=freq.device) for f in (self.long, self.short))
        return freq / (short if lengths is None else torch.where(self.is_long(lengths)[..., None], long, short))


@dataclass(frozen=True)
class Rotary(PositionPart):
    """Queries and keys rotated by an angle proportional to position (Su et al. 2021, equation 34).

    `dim` of each head's dimensions are rotated (None: all). Pairs are (i, i + dim/2), or (2i, 2i + 1) if interleaved.
    """

    name = "rotary"
    base: float = 10000.0
    dim: int | None = None
    scaling: ScalingPart | None = None
    interleaved: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]):
        return super().from_json(values | {"scaling": part("scaling", values.get("scaling"))})


# -- what a query may see


@dataclass(frozen=True)
class MaskPart(Part):
    """Which keys a query may attend to, by absolute position. `causal` means that none lies after the query."""

    slot = "mask"
    causal: ClassVar[bool] = True

    def allows(self, query_pos: Positions, key_pos: Positions) -> Allowed:
        raise _undefined(self, "allows()")


@dataclass(frozen=True)
class Causal(MaskPart):
    """A query attends to itself and earlier positions."""

    name = "causal"

    def allows(self, query_pos: Positions, key_pos: Positions) -> Allowed:
        return key_pos <= query_pos


@dataclass(frozen=True)
class SlidingWindow(MaskPart):
    """A query attends to itself and the `window` - 1 tokens before it."""

    name = "sliding_window"
    window: int = 4096

    def allows(self, query_pos: Positions, key_pos: Positions) -> Allowed:
        return (key_pos <= query_pos) & (key_pos > query_pos - self.window)


@dataclass(frozen=True)
class NoMask(MaskPart):
    """Every query attends to every key."""

    name = "none"
    causal = False

    def allows(self, query_pos: Positions, key_pos: Positions) -> Allowed:
        return (key_pos == key_pos) & (query_pos == query_pos)


# -- from scores to a pattern


@dataclass(frozen=True)
class ScorePart(Part):
    """A map from masked scores, q k / scale under a soft cap, to a pattern. `scale` is sqrt d_head if it is None.

    `row_sums_to_one` says whether the rows of the pattern are averages.
    """

    slot = "score"
    row_sums_to_one: ClassVar[bool] = True
    fusable: ClassVar[bool] = False
    scale: float | None = None
    soft_cap: float | None = None

    def pattern(self, scores: Scores, seen: Seen) -> Scores:
        raise _undefined(self, "pattern()")


@dataclass(frozen=True)
class Softmax(ScorePart):
    """exp(score), normalised over keys; a row without visible keys is 0."""

    name = "softmax"
    fusable = True

    def pattern(self, scores: Scores, seen: Seen) -> Scores:
        wide = torch.promote_types(scores.dtype, torch.float32)
        if seen is None:
            return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)
        # A row of -inf would give NaN, also in its gradient: normalise zeros instead, then set it to 0.
        blank = ~seen.any(dim=-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blank, 0.0), dim=-1, dtype=wide)
        return weights.masked_fill(blank, 0.0).to(scores.dtype)


@dataclass(frozen=True)
class LinearScore(ScorePart):
    """The score itself, masked with 0: unnormalised linear attention."""

    name = "linear"
    row_sums_to_one = False

    def pattern(self, scores: Scores, seen: Seen) -> Scores:
        return scores.masked_fill(scores == -torch.inf, 0.0)


# -- norms


@dataclass(frozen=True)
class NormPart(Part):
    """How a vector is normalised."""

    slot = "norm"


@dataclass(frozen=True)
class LayerNormPart(NormPart):
    """Centred and divided by the standard deviation (Ba et al. 2016, equation 4)."""

    name = "LN"
    eps: float = 1e-5
    affine: bool = True
    bias: bool = True


@dataclass(frozen=True)
class RMSNormPart(NormPart):
    """Divided by the root mean square (Zhang and Sennrich 2019). `weight_offset` is added to the weight (Gemma: 1)."""

    name = "RMS"
    eps: float = 1e-5
    affine: bool = True
    weight_offset: float = 0.0


# -- how attention, MLP and norms stand on the stream


@dataclass(frozen=True)
class BlockPart(Part):
    """The kind of a model's blocks. The module is the `Block` subclass whose `part` this is (model/block.py)."""

    slot = "block"
    final_norm: bool = True  # whether a norm follows the last block


@dataclass(frozen=True)
class PreNorm(BlockPart):
    """A norm before attention and before the MLP (Xiong et al. 2020, figure 1b)."""

    name = "pre"


@dataclass(frozen=True)
class PostNorm(BlockPart):
    """The norms stand after the sums (Vaswani et al. 2017)."""

    name = "post"
    final_norm: bool = False


@dataclass(frozen=True)
class Sandwich(BlockPart):
    """Pre-norm, and each branch normalised again before it is added (Gemma 2)."""

    name = "sandwich"


@dataclass(frozen=True)
class Parallel(BlockPart):
    """Attention and MLP both read the stream that enters (Wang and Komatsuzaki 2021)."""

    name = "parallel"


# -- what enters


@dataclass(frozen=True)
class EmbedPart(Part):
    """The input that the model reads."""

    slot = "embed"


@dataclass(frozen=True)
class TokenEmbed(EmbedPart):
    """One row of W_E per token, times `scale` (Gemma: sqrt d_model)."""

    name = "tokens"
    scale: float = 1.0


@dataclass(frozen=True)
class VectorEmbed(EmbedPart):
    """Vectors `batch pos d_in` through a linear map, for example for in-context regression."""

    name = "vectors"
    d_in: int = 1
    bias: bool = False


# -- initial weights


@dataclass(frozen=True)
class NormalInit(Part):
    """N(0, std^2), std 0.8 / sqrt d_model if not given; `residual_scale` divides W_O and W_out by sqrt(2 n_layers).

    Biases start at 0, norm weights at 1.
    """

    slot = "init"
    name = "normal"
    std: float | None = None
    unembed_std: float | None = None
    residual_scale: bool = False


@dataclass(frozen=True)
class Biases(_NamedFields):
    """Which linear maps have a bias. `gate` is that of gated MLPs (None: as `mlp` says)."""

    qkv: bool = True
    o: bool = True
    mlp: bool = True
    unembed: bool = False
    gate: bool | None = None


PerLayer = Any  # a part, its name, or a tuple with one per layer
Settled = Any  # None allowed as input; a number after __post_init__

_SLOTS = {
    "block": "block",
    "positional_embedding_type": "position",
    "mask": "mask",
    "score_fn": "score",
    "normalization_type": "norm",
    "qk_norm": "norm",
    "embed": "embed",
    "init": "init",
}
_MAY_VARY = ("positional_embedding_type", "mask")
# Fields of the configurations of TransformerLens and Hugging Face with another name or place here.
_MOVED = {
    "attn_scale": "score_fn=Softmax(scale=...)",
    "attn_scores_soft_cap": "score_fn=Softmax(soft_cap=...)",
    "attn_softcap": "score_fn=Softmax(soft_cap=...)",
    "final_norm": "block=PreNorm(final_norm=...)",
    "parallel_attn_mlp": 'block="parallel"',
    "eps": "normalization_type=LayerNormPart(eps=...) or RMSNormPart(eps=...)",
    "use_qk_norm": "qk_norm=RMSNormPart() or LayerNormPart()",
    **dict.fromkeys(["rotary_base", "rope_theta"], "positional_embedding_type=Rotary(base=...)"),
    "rotary_dim": "positional_embedding_type=Rotary(dim=...)",
    "rotary_adjacent_pairs": "positional_embedding_type=Rotary(interleaved=...)",
    "window_size": "mask=SlidingWindow(window=...)",
    "attention_dir": 'mask="causal" or mask="none"',
    "initializer_range": "init=NormalInit(std=...)",
    "hidden_size": "d_model=...",
    **dict.fromkeys(["num_layers", "num_hidden_layers"], "n_layers=..."),
    "num_attention_heads": "n_heads=...",
    "vocab_size": "d_vocab=...",
}
_MAY_LACK = ("normalization_type", "qk_norm", "positional_embedding_type")


@dataclass(frozen=True)
class HookedTransformerConfig(_NamedFields):
    """Sizes and parts of a HookedTransformer. Names follow TransformerLens 3; parts can be given by name.

    Its `attn_scale` and `attn_scores_soft_cap` are fields of a part: `score_fn=Softmax(scale=1.0, soft_cap=50.0)`.

    >>> cfg = HookedTransformerConfig(n_layers=2, d_model=16, n_ctx=32, n_heads=4, d_vocab=50)
    >>> cfg.d_head, cfg.d_mlp, cfg.mask
    (4, 64, Causal())

    `dropout` is the probability with which training drops entries of the embedding, of the pattern, and of what
    attention and MLP add to the stream (as in GPT-2); after `model.eval()` it changes nothing.
    """

    moved: ClassVar[dict[str, str]] = _MOVED
    n_layers: int
    d_model: int
    n_ctx: int
    n_heads: int
    d_vocab: int
    d_head: int = -1
    n_key_value_heads: Settled = None
    d_mlp: Settled = None
    d_vocab_out: int = -1
    act_fn: str = "gelu_new"
    gated_mlp: bool = False
    attn_only: bool = False
    block: Any = "pre"
    normalization_type: Any = "LN"
    qk_norm: Any = None
    positional_embedding_type: PerLayer = "learned"
    mask: PerLayer = "causal"
    score_fn: Any = "softmax"
    embed: Any = "tokens"
    output_logits_soft_cap: float | None = None
    biases: Biases = field(default_factory=Biases)
    tie_word_embeddings: bool = False
    init: Any = "normal"
    dropout: float = 0.0
    model_name: str = "custom"
    folded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        settle = object.__setattr__
        check_values(self, "the configuration")
        if not isinstance(self.biases, Biases):
            raise WrongType(
                f"biases says which maps have one, and is given as Biases(qkv=False, o=False, mlp=False); "
                f"got {self.biases!r:.80}"
            )
        check_values(self.biases, "biases")
        if self.d_head == -1:
            if self.d_model % self.n_heads:
                raise InputError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; give d_head")
            settle(self, "d_head", self.d_model // self.n_heads)
        settle(self, "n_key_value_heads", self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads)
        settle(self, "d_mlp", self._settled_d_mlp())
        settle(self, "d_vocab_out", self.d_vocab if self.d_vocab_out == -1 else self.d_vocab_out)
        for name, slot in _SLOTS.items():
            settle(self, name, self._settled(name, slot))
        self._check()

    def _settled_d_mlp(self) -> Any:
        if not self.attn_only:
            return 4 * self.d_model if self.d_mlp is None else self.d_mlp
        if self.d_mlp not in (None, 0):
            raise InputError(f"attn_only=True is a model without MLPs, got d_mlp={self.d_mlp!r:.80}; leave d_mlp out")
        return 0

    def _settled(self, name: str, slot: str) -> Any:
        value = getattr(self, name)
        if isinstance(value, list | tuple):
            if name not in _MAY_VARY or len(value) != self.n_layers:
                raise InputError(f"{name} takes one part (mask, rotary: or a tuple of {self.n_layers}); got {value!r}")
            parts = tuple(part(slot, choice) for choice in value)
            return parts[0] if len(set(parts)) == 1 else parts
        if value is None and name not in _MAY_LACK:
            raise InputError(f"{name} must be a part, such as {', '.join(_PARTS[slot])}; got None")
        return part(slot, value)

    def _check(self) -> None:
        for name in _SETTLED:
            needed = _needed(name, int, getattr(self, name))
            if needed and not (name == "d_mlp" and self.attn_only):
                raise InputError(f"the configuration: {name} is {getattr(self, name)!r:.80}; {needed} is needed")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is a probability from 0 to below 1, got {self.dropout}")
        if self.n_heads % self.n_key_value_heads:
            raise InputError(f"n_heads {self.n_heads} is not a multiple of n_key_value_heads {self.n_key_value_heads}")
        if self.tie_word_embeddings and self.d_vocab_out != self.d_vocab:
            raise InputError(f"tied embeddings need d_vocab_out {self.d_vocab_out} equal to d_vocab {self.d_vocab}")
        positions = self.positional_embedding_type
        for position in positions if isinstance(positions, tuple) else (positions,):
            scaling = position.scaling if isinstance(position, Rotary) else None
            n = (getattr(position, "dim", None) or self.d_head) // 2
            if isinstance(scaling, DividedScaling) and len(scaling.short) != n:
                raise InputError(
                    f"DividedScaling needs {n} divisors, one per pair of rotated dimensions of a head, got "
                    f"{len(scaling.short)}"
                )

    def mask_at(self, layer: int) -> MaskPart:
        """The mask of one layer."""
        return self.mask[layer] if isinstance(self.mask, tuple) else self.mask

    def rotary_at(self, layer: int) -> Rotary | None:
        """The rotary part of one layer, None if it has none."""
        positions = self.positional_embedding_type
        here = positions[layer] if isinstance(positions, tuple) else positions
        return here if isinstance(here, Rotary) else None

    @property
    def final_norm(self) -> NormPart | None:
        """The norm before the unembedding."""
        return self.normalization_type if self.block.final_norm else None

    @property
    def causal(self) -> bool:
        """Whether no position attends to a later one, at any layer."""
        return all(self.mask_at(layer).causal for layer in range(self.n_layers))

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain values; `from_json` rebuilds it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "HookedTransformerConfig":
        """Rebuild a configuration from `to_json`; an unknown field raises an error."""
        _check_dict("a configuration", values, cls)
        biases, folded = values.get("biases", {}), values.get("folded", ())
        _check_dict("biases", biases, Biases)
        if not isinstance(folded, list | tuple) or not all(isinstance(name, str) for name in folded):
            raise WrongType(f"folded is a list of names, got {folded!r:.80}")
        return cls(**values | {"biases": Biases(**biases), "folded": tuple(folded)})

    def replace(self, **changes: Any) -> "HookedTransformerConfig":
        """A copy with some fields changed. If `attn_only` changes, d_mlp is its default again unless it is given."""
        if changes.get("attn_only", self.attn_only) != self.attn_only:
            changes = {"d_mlp": None} | changes
        return replace(self, **changes)


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_json()
    if isinstance(value, Biases):
        return asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value

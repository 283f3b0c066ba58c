"""The activations of one forward pass by name: slicing, stacking, and decomposition of the residual stream."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import check_target, layer_number
from hooklens.core.component import head_name, neuron_name
from hooklens.core.envelope import Schema, read_envelope, write_envelope
from hooklens.core.errors import InputError, NameNotFound, WrongType
from hooklens.core.files import reading
from hooklens.core.names import Where, axes, parse, resolve
from hooklens.core.padding import take

if TYPE_CHECKING:
    from hooklens.core.hooks import HookedModule

Index = int | slice | Sequence[int] | Tensor
Labelled = list[tuple[str, Tensor]]
Tokens = str | int | Sequence[str] | Sequence[int] | Tensor
_SCHEMA = Schema("hooklens.cache", 1, "an activation cache", "ActivationCache.save")


class Entries(dict[str, Tensor]):
    """Activations by full name, and the mask [batch key_pos] of their forward pass."""

    attention_mask: Tensor | None = None


class ActivationCache(Mapping[str, Tensor]):
    """The activations of one forward pass: a mapping from full names.

    Short forms work too: `cache["z", 5]`, `cache["resid_post", -1]`, `cache["embed"]`. Points with the same tensor
    share its memory, also in a saved file. `pos=` counts the real tokens of each row: 0 is the first, -1 the last.
    `layer=` of a decomposition is None or -1 for all layers.

    >>> from hooklens.testing import tiny_model
    >>> logits, cache = tiny_model().run_with_cache([[1, 2, 3]])
    >>> cache["pattern", 0].shape            # batch head query_pos key_pos
    torch.Size([1, 2, 3, 3])
    """

    def __init__(
        self,
        entries: dict[str, Tensor],
        model: "HookedModule | None" = None,
        attention_mask: Bool[Tensor, "*batch key_pos"] | None = None,
    ):
        self._entries = entries if isinstance(entries, Entries) else Entries(entries)
        self.model = model
        if attention_mask is not None:
            self._entries.attention_mask = attention_mask

    @property
    def attention_mask(self) -> Bool[Tensor, "*batch key_pos"] | None:
        """False where a key is padding; the last columns are the positions of this pass. None if nothing is padded."""
        mask = self._entries.attention_mask
        return None if mask is None or bool(mask.all()) else mask

    def __getitem__(self, key: Where) -> Tensor:
        if isinstance(key, str) and key in self._entries:
            return self._entries[key]
        matching = self._find(key)
        if len(matching) > 1:
            raise NameNotFound(
                f"{key!r} matches {len(matching)} activations ({', '.join(matching[:4])}, ...); name one"
            )
        return self._entries[matching[0]]

    def _find(self, key: Where) -> list[str]:
        """The full names that match `key`; negative layers count from the model's last one."""
        names = list(self._entries)
        if self.model is None:
            return resolve(key, names)
        asked = key[0] if isinstance(key, tuple) else getattr(key, "name", key)
        ending = "_grad" if str(asked).endswith("_grad") else ""
        wanted = resolve(key, [name + ending for name in self.model.hook_names()])
        kept = [name for name in wanted if name in self._entries]
        if not kept:
            raise NameNotFound(
                f"{key!r} was not captured; this cache holds {len(names)} activations "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); ask for it in run_with_cache(names=...)"
            )
        return kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Any) -> bool:
        try:
            self[key]
        except (KeyError, ValueError, TypeError):
            return False
        return True

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} activations, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of memory, counting every storage once."""
        storages = [act.untyped_storage() for act in self._entries.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    # -- moving and slicing: all return a new cache

    def map(self, change) -> "ActivationCache":
        """A cache of `change(name, tensor)`; entries that share a tensor still share the changed one."""
        done: dict[tuple, Tensor] = {}
        entries = {}
        for name, act in self._entries.items():
            key = (_identity(act), axes_or_none(name))
            if key not in done:
                done[key] = change(name, act)
            entries[name] = done[key]
        return ActivationCache(entries, self.model, self._entries.attention_mask)

    def to(self, device=None, dtype: torch.dtype | None = None) -> "ActivationCache":
        """The cache on another device, or its floating-point entries in another dtype."""
        check_target(device, dtype)
        return self.map(lambda name, act: converted(act, device, dtype))

    def slice(
        self, *, batch: Index | None = None, pos: Index | None = None, layers: Index | None = None
    ) -> "ActivationCache":
        """Part of the cache: some batch rows, positions (of queries, where keys have their own) or layers.

        An integer drops its axis. `layers` does not affect points outside the blocks. If rows are padded, `pos` counts
        the real tokens of each row and must exist in all of them; the result then has no padding.
        """
        kept = self if layers is None else self._of_layers(layers)
        if kept.attention_mask is not None:
            return kept._of_padded(kept.attention_mask, batch, pos)
        return kept.map(lambda name, act: _sliced(name, act, batch, pos))

    def _of_padded(self, mask: Tensor, batch: Index | None, pos: Index | None) -> "ActivationCache":
        is_single = isinstance(batch, int) or (isinstance(batch, Tensor) and batch.ndim == 0)
        kept = self
        if batch is not None:  # rows first: positions need to exist in these only
            some = torch.as_tensor(batch).reshape(1) if is_single else batch
            mask = mask[_as_index("batch", some, len(mask), "this cache")]
            kept = kept.map(lambda name, act: _sliced(name, act, some, None))
        if pos is not None:
            kept = kept.map(lambda name, act: _sliced(name, act, None, pos, mask))
        if is_single:
            kept, mask = kept.map(lambda _, act: act[0]), mask[0]
        return ActivationCache(dict(kept._entries), self.model, None if pos is not None else mask)

    def _of_layers(self, layers: Index) -> "ActivationCache":
        chosen = {*_chosen("layers", layers, self._n_layers(), "this cache").tolist(), None}
        entries = {name: act for name, act in self._entries.items() if _layer_of(name) in chosen}
        return ActivationCache(entries, self.model, self._entries.attention_mask)

    def stack(self, where: Where) -> Float[Tensor, "layer ..."]:
        """One site of every layer, stacked: `cache.stack("resid_post")` has the axes layer batch pos d_model."""
        matching = self._find(where)
        kinds = {(p.name, p.part) for p in map(parse, matching) if p is not None}
        if len(kinds) > 1:
            raise InputError(f"{where!r} matches several sites, {sorted(map(str, kinds))}; stack one of them")
        return torch.stack([self._entries[name] for name in matching])

    def _n_layers(self) -> int:
        cfg: Any = getattr(self.model, "cfg", None)
        if cfg is not None:
            return cfg.n_layers
        return 1 + max((layer for layer in map(_layer_of, self._entries) if layer is not None), default=-1)

    # -- decomposition of the residual stream

    def accumulated_resid(
        self, layer: int | None = None, *, incl_mid: bool = False, apply_ln: bool = False, pos: Index | None = None
    ) -> tuple[Float[Tensor, "component ..."], list[str]]:
        """The residual stream before each block up to `layer` (None or -1: to the end), with labels.

        With `incl_mid` also between attention and MLP.
        """
        end, points = self._end(layer), self._points()
        names = {}
        for n in range(end):
            names[f"{n}_pre"] = f"blocks.{n}.hook_resid_pre"
            if incl_mid and f"blocks.{n}.hook_resid_mid" in points:
                names[f"{n}_mid"] = f"blocks.{n}.hook_resid_mid"
        names["final_post" if end == self._n_layers() else f"{end}_pre"] = self._stream_at(end)
        return self._stacked([(label, self._entry(name, pos)) for label, name in names.items()], layer, apply_ln, pos)

    def decompose_resid(
        self,
        layer: int | None = None,
        *,
        mode: str = "all",
        incl_embeds: bool = True,
        apply_ln: bool = False,
        pos: Index | None = None,
    ) -> tuple[Float[Tensor, "component ..."], list[str]]:
        """The contribution of each component to the stream that enters `layer` (None or -1: leaves the last block).

        The contributions, here with labels, sum to that stream. `mode` is "all", "attn" or "mlp".
        """
        if mode not in ("all", "attn", "mlp"):
            raise InputError(f"mode must be 'all', 'attn' or 'mlp', got {mode!r}")
        self._additive("decompose_resid")
        points = self._points()
        names = {n: f"hook_{n}" for n in ("embed", "pos_embed") if incl_embeds and f"hook_{n}" in points}
        for n in range(self._end(layer)):
            if mode != "mlp":
                names[f"{n}_attn_out"] = f"blocks.{n}.hook_attn_out"
            if mode != "attn" and f"blocks.{n}.hook_mlp_out" in points:
                names[f"{n}_mlp_out"] = f"blocks.{n}.hook_mlp_out"
        return self._stacked([(label, self._entry(name, pos)) for label, name in names.items()], layer, apply_ln, pos)

    def stack_head_results(
        self,
        layer: int | None = None,
        *,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        pos: Index | None = None,
    ) -> tuple[Float[Tensor, "component ..."], list[str]]:
        """The contribution of every head below `layer` (None or -1: of all layers) to the stream, as L0H0, L0H1, ...

        Read from the cached `result`, or computed from `z`. With `incl_remainder` the last component is the rest of the
        stream: embeddings, MLPs and biases.
        """
        self._additive("stack_head_results")
        labelled = []
        for n in range(self._end(layer)):
            result = self._head_result(n, pos)
            labelled += [(head_name(n, head), act) for head, act in enumerate(result.unbind(-2))]
        return self._stacked(labelled, layer, apply_ln, pos, incl_remainder)

    def stack_neuron_results(
        self,
        layer: int | None = None,
        *,
        neurons: Index | None = None,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        pos: Index | None = None,
    ) -> tuple[Float[Tensor, "component ..."], list[str]]:
        """The contribution of every neuron below `layer` (None or -1: of all layers) to the stream, as L0N0, L0N1, ...

        Large: d_mlp vectors for each layer and position. `neurons` and `pos` select some.
        """
        self._additive("stack_neuron_results")
        labelled = []
        for n in range(self._end(layer)):
            if f"blocks.{n}.mlp.hook_post" not in self._points():
                continue
            post = self._entry(f"blocks.{n}.mlp.hook_post", pos)
            chosen = _chosen("neurons", neurons, post.shape[-1], f"the MLP of layer {n}")
            added = post[..., chosen, None] * self._block(n).mlp.output_matrix().detach()[chosen].to(post)
            added = self._in_stream(n, "mlp", added, pos)
            labelled += [(neuron_name(n, int(i)), act) for i, act in zip(chosen, added.unbind(-2), strict=True)]
        return self._stacked(labelled, layer, apply_ln, pos, incl_remainder)

    def apply_ln_to_stack(
        self,
        stack: Float[Tensor, "component ... d_model"],
        layer: int | None = None,
        *,
        mlp_input: bool = False,
        pos: Index | None = None,
    ) -> Float[Tensor, "component ... d_model"]:
        """Apply the norm that reads the stream at `layer` (None or -1: the final norm), with its cached scale.

        Linear in the stack: centred if the norm centres, divided by the scale, times the norm's weight, without its
        bias. So a full decomposition sums to the norm's output minus its bias.
        """
        if not isinstance(stack, Tensor):
            raise WrongType(f"a stack is a tensor [component ... d_model] as of decompose_resid; got {stack!r:.80}")

        def scale_at(name: str) -> Tensor:
            scale = self._entry(name, pos)
            if stack.shape[1:-1] != scale.shape[:-1]:
                raise InputError(
                    f"a stack {list(stack.shape)} cannot be divided by {name} {list(scale.shape)}; give pos= here as "
                    "it was given to the stack, and take both from one cache"
                )
            return scale

        return self._need_model().reads_through(self._end(layer), mlp=mlp_input).frozen(stack, scale_at)

    def logit_attrs(
        self,
        stack: Float[Tensor, "component ... d_model"],
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        *,
        pos: Index | None = None,
    ) -> Float[Tensor, "component ..."]:
        """The contribution of each component of a stack to the logit of `tokens` (minus that of `incorrect_tokens`).

        The direct effect only, with the final norm's scale frozen. For a full decomposition it sums to the logit before
        any soft cap, minus b_U and minus the final norm's bias through W_U.
        """
        model: Any = self._need_model()
        directions = model.tokens_to_residual_directions(tokens).detach()
        if incorrect_tokens is not None:
            directions = directions - model.tokens_to_residual_directions(incorrect_tokens).detach()
        scaled = self.apply_ln_to_stack(stack, None, pos=pos)
        if directions.ndim == 2 and scaled.ndim == 4:  # one direction for each prompt, at every position
            directions = directions[:, None]
        fit = zip(reversed(directions.shape[:-1]), reversed(scaled.shape[1:-1]), strict=False)
        if directions.ndim >= scaled.ndim or any(given not in (1, n) for given, n in fit):
            raise InputError(
                f"tokens {list(directions.shape[:-1])} do not fit a stack {list(stack.shape)}; give one token, or one "
                "for each prompt"
            )
        return (scaled * directions.to(scaled)).sum(-1)

    # -- saving

    def save(self, path: str | Path) -> None:
        """Save the cache as a safetensors file with every tensor once; `load` reads it."""
        first: dict[tuple, str] = {}
        same = {name: first.setdefault(_identity(act), name) for name, act in self._entries.items()}
        tensors = {name: self._entries[name] for name in first.values()}
        if self.attention_mask is not None:
            tensors["attention_mask"] = self.attention_mask
        write_envelope(path, _SCHEMA, same, tensors)

    @classmethod
    def load(cls, path: str | Path, model: "HookedModule | None" = None) -> "ActivationCache":
        """Load a cache that `save` wrote; a damaged or foreign file is refused before any tensor is used."""
        file = read_envelope(path, _SCHEMA)
        tensors = dict(file.tensors())
        with reading(path, _SCHEMA.what):
            mask = tensors.get("attention_mask")
            if mask is not None and (mask.dtype != torch.bool or mask.ndim not in (1, 2)):
                raise TypeError(f"its attention_mask is {mask.dtype} {list(mask.shape)}")
            return cls({name: tensors[stored] for name, stored in file.content.items()}, model, mask)

    # -- helpers

    def _need_model(self):
        if self.model is None:
            raise InputError("this cache has no model; load it with ActivationCache.load(path, model)")
        return self.model

    def _block(self, layer: int):
        return self._need_model().blocks[layer]

    def _points(self) -> Collection[str]:
        return self._need_model().hook_points().keys() if self.model is not None else list(self._entries)

    def _end(self, layer: int | None) -> int:
        n_layers, layer = self._n_layers(), layer_number("layer", layer)
        if layer is None:
            return n_layers
        if not -1 <= layer <= n_layers:
            raise InputError(
                f"layer {layer} asked for; the stream is taken where it enters a layer, 0 to {n_layers - 1}, or where "
                f"it leaves the last one: None, -1 or {n_layers}. Count other layers from 0"
            )
        return n_layers if layer == -1 else layer

    def _entry(self, name: str, pos: Index | None) -> Tensor:
        return _sliced(name, self[name], None, pos, self.attention_mask)

    def _stream_at(self, end: int) -> str:
        """The point of the stream that enters a layer, or leaves the last one."""
        return f"blocks.{end - 1}.hook_resid_post" if end == self._n_layers() else f"blocks.{end}.hook_resid_pre"

    def _head_result(self, layer: int, pos: Index | None) -> Tensor:
        attn = f"blocks.{layer}.attn"
        if f"{attn}.hook_result" in self._entries:
            result = self._entry(f"{attn}.hook_result", pos)
        else:
            z = self._entry(f"{attn}.hook_z", pos)
            result = torch.einsum("...hd,hdm->...hm", z, self._block(layer).attn.output_matrix().detach().to(z))
        return self._in_stream(layer, "attn", result, pos)

    def _in_stream(self, layer: int, part: str, written: Tensor, pos: Index | None) -> Tensor:
        """The outputs of a part's components as they reach the stream: linear, with the scales of this run."""
        passage = self._block(layer).writes_through(part)
        return passage.frozen(written, lambda name: self._entry(name, pos).unsqueeze(-2))

    def _additive(self, asker: str) -> None:
        if self.model is not None:
            self._block(0).need_sum(asker, "accumulated_resid works there")

    def _stacked(
        self, labelled: Labelled, layer: int | None, apply_ln: bool, pos: Index | None, rest: bool = False
    ) -> tuple[Tensor, list[str]]:
        """The labelled contributions as one tensor, if asked with the rest of the stream and through its norm."""
        if rest:
            stream = self._entry(self._stream_at(self._end(layer)), pos)
            labelled = [*labelled, ("remainder", stream - sum(act for _, act in labelled))]
        if not labelled:
            raise InputError(f"there is no component of this kind below layer {layer}")
        stack = torch.stack([act for _, act in labelled])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos=pos)
        return stack, [label for label, _ in labelled]


def axes_or_none(name: str) -> tuple[str, ...] | None:
    """The axes of a known site, None for a point of a wrapped module."""
    try:
        return axes(name.removesuffix("_grad"))
    except KeyError:
        return None


def converted(act: Tensor, device, dtype: torch.dtype | None) -> Tensor:
    """The activation on another device, or in another dtype if it is floating-point; expanded axes stay expanded.

    >>> converted(torch.ones(2, 1).expand(2, 500), None, torch.float64).untyped_storage().nbytes()
    16
    """
    repeated_once = [slice(0, 1) if stride == 0 else slice(None) for stride in act.stride()]
    once = act[tuple(repeated_once)]
    return once.to(device=device, dtype=dtype if act.is_floating_point() else None).expand(act.shape)


def _identity(act: Tensor) -> tuple:
    return (act.untyped_storage().data_ptr(), act.storage_offset(), tuple(act.shape), act.stride(), act.dtype)


def _layer_of(name: str) -> int | None:
    site = parse(name.removesuffix("_grad"))
    return None if site is None else site.layer


def _as_index(what: str, index: Index, size: int, of: str) -> Any:
    """An index in a form that torch takes on every device; one that does not fit raises an error with the range."""
    if not isinstance(index, slice) and not _fits(index, size):
        raise InputError(f"{what} {index!r:.60} asked for; {of} has {what} 0 to {size - 1} (or -{size} to -1)")
    if isinstance(index, Tensor):
        return index.cpu()
    return list(index) if isinstance(index, Sequence) else index


def _fits(index: Any, size: int) -> bool:
    try:
        asked = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        return False
    if asked.dtype == torch.bool:
        return tuple(asked.shape) == (size,)
    if asked.numel() == 0:  # torch makes floats of an empty list
        return True
    return not asked.is_floating_point() and -size <= int(asked.min()) and int(asked.max()) < size


def _chosen(what: str, index: Index | None, size: int, of: str) -> Int[Tensor, "chosen"]:
    """The numbers below `size` that an index selects."""
    everything = torch.arange(size)
    return everything if index is None else everything[_as_index(what, index, size, of)].reshape(-1)


def _sliced(
    name: str, act: Tensor, batch: Index | None, pos: Index | None, real: Bool[Tensor, "batch key_pos"] | None = None
) -> Tensor:
    if batch is None and pos is None:
        return act
    names = axes_or_none(name)
    if names is None or act.ndim != len(names):
        raise InputError(f"the axes of {name} {list(act.shape)} are unknown, or one is already sliced")
    if pos is not None:
        axis = next(i for i, axis in enumerate(names) if axis in ("pos", "query_pos", "key_pos"))
        if real is None:
            act = act[(slice(None),) * axis + (_as_index("pos", pos, act.shape[axis], name),)]
        else:
            act = take(act, axis, real[:, -act.shape[axis] :], pos)
    return act if batch is None else act[_as_index("batch", batch, len(act), name)]

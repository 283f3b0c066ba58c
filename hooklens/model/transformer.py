"""HookedTransformer: from tokens to logits, with every activation accessible by name."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor, nn

from hooklens.core.arguments import layer_number, seeded
from hooklens.core.cache import ActivationCache
from hooklens.core.errors import Absent, InputError, KeepsPropertyErrors, WrongType
from hooklens.core.hooks import HookedModule, HookPoint, edited_elsewhere, moment
from hooklens.core.names import Where
from hooklens.core.padding import PaddedTensor, columns, padded
from hooklens.core.terminal import visible
from hooklens.model.attention import under_transform
from hooklens.model.block import block_of
from hooklens.model.config import DividedScaling, HookedTransformerConfig, Learned, Sinusoidal, TokenEmbed
from hooklens.model.dropout import Dropout
from hooklens.model.embed import Embedding, SinusoidalPositions, TokenEmbedding, Unembedding, VectorEmbedding
from hooklens.model.factored import FactoredMatrix
from hooklens.model.ids import as_ids, as_mask
from hooklens.model.kv_cache import Context, KVCache
from hooklens.model.linear import matrix_of
from hooklens.model.norms import Norm, Passage, make_norm
from hooklens.model.views import StackedWeight, write_all

if TYPE_CHECKING:
    from hooklens.generation.continuation import OnPiece
    from hooklens.generation.sampling import Generation, Prompt
    from hooklens.pretrained.tokenizer import Tokenizer

Stream = Float[Tensor, "batch pos d_model"]
Logits = Float[Tensor, "batch out_pos d_vocab"]
Input = Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_in"]
Chosen = Int[Tensor, "batch"]
Mask = Bool[Tensor, "any_batch key_pos"]
AnyMask = Shaped[Tensor, "*batch key_pos"]
Text = str | Sequence[str]
Tokens = Text | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor


class HookedTransformer(KeepsPropertyErrors, HookedModule):
    """A transformer whose activations can be read and edited by name; hook names as in TransformerLens 3.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> model([[1, 2, 3]]).shape             # batch pos d_vocab
    torch.Size([1, 3, 11])
    >>> logits = model.run_with_hooks([[1, 2, 3]], fwd_hooks=[(("z", 0), lambda z, hook: z * 0)])
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig,
        *,
        tokenizer: "Tokenizer | None" = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(cfg, HookedTransformerConfig):
            raise WrongType(f"a HookedTransformer is built from a HookedTransformerConfig(...), got {cfg!r:.80}")
        self.cfg, self.tokenizer = cfg, tokenizer
        with torch.device("meta"):  # draws no values and leaves the global generator unchanged
            self._build()
        self.name_points()
        self.to(dtype or torch.get_default_dtype())
        if device is None or torch.device(device).type != "meta":
            self.to_empty(device=device or "cpu")
            initialise(self, seed)
        self.tie()

    def _build(self) -> None:
        cfg = self.cfg
        self.embed = TokenEmbedding(cfg) if isinstance(cfg.embed, TokenEmbed) else VectorEmbedding(cfg)
        self.hook_embed = HookPoint()
        self.pos_embed: Any = None
        if isinstance(cfg.positional_embedding_type, Learned):
            self.pos_embed = Embedding(cfg.n_ctx, cfg.d_model)
        elif isinstance(cfg.positional_embedding_type, Sinusoidal):
            self.pos_embed = SinusoidalPositions(cfg)
        if self.pos_embed is not None:
            self.hook_pos_embed = HookPoint()
        # Any: torch knows the elements as bare modules, and every attribute of those as a tensor or a module.
        kind = block_of(cfg.block)
        self.blocks: Any = nn.ModuleList(kind(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = make_norm(cfg.d_model, cfg.final_norm)
        self.dropout = Dropout(cfg.dropout)
        self.unembed = Unembedding(cfg)

    def tie(self) -> None:
        """Share the embedding's weight with the unembedding, if the configuration says so."""
        if self.cfg.tie_word_embeddings:
            self.unembed.linear.weight = self.embed.weight

    def _apply(self, fn: Any, recurse: bool = True) -> "HookedTransformer":
        super()._apply(fn, recurse)
        self.tie()  # leaving the meta device splits the shared parameter
        return self

    # -- forward

    def forward(
        self,
        tokens: Tokens,
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        kv_cache: KVCache | None = None,
        attention_mask: Bool[Tensor, "*batch key_pos"] | Int[Tensor, "*batch key_pos"] | None = None,
        logits_at: int | Sequence[int] | Integer[Tensor, "batch"] | None = None,
    ) -> Logits | Stream:
        """Logits of every position; with `stop_at_layer`, the residual stream that enters that layer.

        With `start_at_layer` the input is the residual stream at that layer. With a `kv_cache` the tokens follow those
        in the cache. `logits_at` selects one position per row (negative: from its last real token), and the last block
        then computes only this one; the result keeps a position axis of size 1. `attention_mask` is 0 at padding, left
        or right; if there is padding, also in texts, the result is a `PaddedTensor`: `[:, -1]` is each row's last real
        position.
        """
        start, stop = self._layers(start_at_layer, stop_at_layer)
        x, attention_mask = self._input(tokens, attention_mask, start_at_layer is not None)
        ctx = self._context(x, attention_mask, kv_cache)
        chosen = None if logits_at is None or stop_at_layer is not None else self._chosen(logits_at, x, ctx)
        layers, embeds, reads_out = range(start, stop), start_at_layer is None, stop_at_layer is None
        if kv_cache is None and (ctx.key_seen is None or torch.compiler.is_compiling()):
            return self._run(x, ctx, layers, chosen, embeds=embeds, reads_out=reads_out)
        step, to_come = (0, 0) if kv_cache is None else (kv_cache.step, kv_cache.to_come)
        with moment(step, ctx.offset, ctx.key_seen, to_come):
            out = self._run(x, ctx, layers, chosen, embeds=embeds, reads_out=reads_out)
        if kv_cache is not None:
            kv_cache.advance(x, ctx, start_at_layer)
        if ctx.key_seen is None or chosen is not None or not _readable(out, ctx.key_seen):
            return out
        return padded(out, ctx.key_seen[:, ctx.offset :])

    def _run(
        self, x: Input | Stream, ctx: Context, layers: range, chosen: Chosen | None, *, embeds: bool, reads_out: bool
    ) -> Logits | Stream:
        if embeds:
            x = self.embed_input(x, ctx)
        one_query = None if chosen is None else ctx.narrowed(chosen)
        narrow = one_query is not None and len(layers) > 0 and not edited_elsewhere(self._late_points)
        for layer in layers:
            last = narrow and layer == self.cfg.n_layers - 1
            x = self.blocks[layer](x, one_query if last else ctx)
        if not reads_out:
            return x
        return self.read_out(x, None if narrow else one_query)

    def embed_input(self, x: Input, ctx: Context) -> Stream:
        """The residual stream that enters block 0."""
        stream = self.hook_embed(self.embed(x))
        if self.pos_embed is None:
            return self.dropout(stream)
        positions = self.pos_embed(ctx.positions).to(stream.dtype)
        return self.dropout(stream + self.hook_pos_embed(positions.expand(stream.shape[0], -1, -1)))

    def read_out(self, x: Stream, ctx: Context | None = None) -> Logits:
        """Final norm and unembedding; a context selects the position of each row."""
        if isinstance(x, PaddedTensor):
            return padded(self.read_out(x.as_subclass(Tensor), ctx), x.attention_mask)
        x = x if self.ln_final is None else self.ln_final(x)
        return self.unembed(x if ctx is None else ctx.select(x))

    def reads_through(self, layer: int, *, mlp: bool = False) -> Passage:
        """The norm through which a layer's attention or MLP (`layer` = n_layers: the unembedding) reads the stream."""
        n = self.cfg.n_layers
        normed = not mlp and self.blocks[0].leaves_through().norm is not None  # by the block before
        if not normed <= layer < n + (not mlp):
            raise InputError(f"no norm of this model reads the stream at layer {layer}; leave apply_ln out")
        if mlp:
            return self.blocks[layer].reads_through("mlp")
        if normed:
            return self.blocks[layer - 1].leaves_through()
        return Passage(self.ln_final) if layer == n else self.blocks[layer].enters_through()

    @cached_property  # used in every step of a generation
    def _late_points(self) -> list[HookPoint]:
        final = [] if self.ln_final is None else [self.ln_final.hook_scale, self.ln_final.hook_normalized]
        return self.blocks[-1].query_points() + final

    def _layers(self, start_at: int | None, stop_at: int | None) -> tuple[int, int]:
        n = self.cfg.n_layers
        for name, value in (("start_at_layer", start_at), ("stop_at_layer", stop_at)):
            value = layer_number(name, value)
            if value is not None and not -n <= value <= n:
                raise InputError(f"{name}={value} is out of range: this model has layers 0 to {n - 1} (or -{n} to -1)")
        start, stop = (0 if start_at is None else start_at), (n if stop_at is None else stop_at)
        start, stop = start + n * (start < 0), stop + n * (stop < 0)
        if stop < start:
            raise InputError(f"stop_at_layer={stop_at} lies before start_at_layer={start_at}")
        return start, stop

    def _input(self, tokens: Tokens, mask: AnyMask | None, is_stream: bool) -> tuple[Input | Stream, Mask | None]:
        if isinstance(tokens, str) or (isinstance(tokens, list | tuple) and tokens and isinstance(tokens[0], str)):
            tokens, real = self._need_tokenizer().to_tokens(tokens, return_mask=True, device=self.device)
            mask = real if mask is None and not bool(real.all()) else mask
        if isinstance(tokens, PaddedTensor):  # the result of model(texts, stop_at_layer=...)
            mask = tokens.attention_mask if mask is None else mask
            tokens = tokens.as_subclass(Tensor)
        if not is_stream and isinstance(self.cfg.embed, TokenEmbed):
            tokens = self._check_tokens(tokens)
            tokens = tokens[None] if tokens.ndim == 1 else tokens
        else:
            tokens = torch.as_tensor(tokens, device=self.device)
            width = self.cfg.d_model if is_stream else self.cfg.embed.d_in
            if tokens.ndim != 3 or tokens.shape[-1] != width:
                raise InputError(f"expected vectors [batch pos {width}], got {list(tokens.shape)}")
            if not is_stream and tokens.dtype != self.dtype and not torch.is_autocast_enabled(tokens.device.type):
                raise InputError(
                    f"expected vectors of {self.dtype}, as the model's weights are, got {tokens.dtype}; pass "
                    "vectors.to(model.dtype)"
                )
        if mask is not None:
            mask = as_mask(mask, tokens.device)
        return tokens, mask

    def _check_tokens(self, tokens: Any) -> Int[Tensor, "*batch pos"]:
        tokens = as_ids(tokens, device=self.device)
        if 0 in tokens.shape:
            raise InputError(
                f"the prompt is empty, its tokens have shape {list(tokens.shape)}; give at least one token"
            )
        _check_ids(tokens, self.cfg.d_vocab)
        if tokens.ndim not in (1, 2):
            raise InputError(f"tokens have shape [batch pos], got {list(tokens.shape)}")
        return tokens

    def _context(self, x: Input | Stream, mask: Mask | None, past: KVCache | None) -> Context:
        if not isinstance(past, KVCache | None):
            raise WrongType(f"kv_cache must be an hl.KVCache or None; got {past!r:.80}")
        n_new, offset = x.shape[1], 0 if past is None else past.length
        if offset + n_new > self.cfg.n_ctx:
            n_ctx = self.cfg.n_ctx
            raise InputError(f"{offset + n_new} tokens do not fit this model's n_ctx of {n_ctx}; shorten the prompt")
        before = None if past is None else past.seen
        if mask is None and before is None:
            return self._measured(Context(torch.arange(offset, offset + n_new, device=x.device), offset, cache=past))
        batch = x.shape[0]
        real = torch.ones((batch, n_new), dtype=torch.bool, device=x.device) if mask is None else mask[:, -n_new:]
        if mask is not None and (len(mask) != batch or mask.shape[1] not in (n_new, offset + n_new)):
            raise InputError(f"attention_mask has shape {list(mask.shape)}; the input is {batch} x {n_new}")
        if offset and before is None:
            before = torch.ones((batch, offset), dtype=torch.bool, device=x.device)
        seen = real if before is None else torch.cat((before, real), dim=1)
        positions = (seen.long().cumsum(1) - 1).clamp_min(0)[:, offset:]
        return self._measured(Context(positions, offset, key_seen=seen, cache=past))

    @cached_property
    def _by_length(self) -> set[DividedScaling]:
        """The rotary scalings whose frequencies depend on the number of tokens in a row."""
        rotary = [self.cfg.rotary_at(layer) for layer in range(self.cfg.n_layers)]
        scalings = {part.scaling for part in rotary if part is not None}
        return {scaling for scaling in scalings if isinstance(scaling, DividedScaling)}

    def _measured(self, ctx: Context) -> Context:
        """The context with its rows' lengths; rebuilds the cache if these change its rotary frequencies."""
        past = ctx.cache
        if past is None or not self._by_length:
            return ctx
        ctx.lengths = ctx.positions.amax(-1) + 1
        if past.lengths is not None:
            ctx.lengths = torch.maximum(ctx.lengths, past.lengths)
            if any(bool((s.is_long(ctx.lengths) ^ s.is_long(past.lengths)).any()) for s in self._by_length):
                self._rebuild(past, ctx.lengths)
        return ctx

    def _rebuild(self, past: KVCache, lengths: Int[Tensor, "*row"]) -> None:
        """Run the inputs of a cache again, as rows of these lengths. Rotating its keys again would not suffice: later
        layers' keys and values were computed from attention with the old frequencies.

        Hooks see the passes again, each with its step; without listeners they are merged into one pass.
        """
        passes, fresh = past.passes, KVCache()
        if sum(x.shape[1] for x, _ in passes) != past.length:
            raise InputError(
                f"{int(lengths.max())} tokens exceed this model's original context, where its rotary frequencies "
                "change, but this KV cache is part of another one and cannot be rebuilt; start with an empty KVCache"
            )
        if len({start for _, start in passes}) == 1 and not edited_elsewhere(self.hook_points().values()):
            passes = [(torch.cat([x for x, _ in passes], 1), passes[0][1])]
        fresh.lengths = lengths
        for x, start in passes:
            seen = None if past.seen is None else past.seen[:, : fresh.length + x.shape[1]]
            self(x, start_at_layer=start, stop_at_layer=past.top, kv_cache=fresh, attention_mask=seen)
        vars(past).update(vars(fresh) | {"step": past.step})

    def _chosen(self, at: int | Sequence[int] | Integer[Tensor, "batch"], x: Input | Stream, ctx: Context) -> Chosen:
        batch, n_new = x.shape[:2]
        index = as_ids(at, "logits_at is an integer, or one for each row", x.device)
        if index.ndim > 1 or index.numel() not in (1, batch):
            raise InputError(f"logits_at is one position for all rows or one per row, got {index.numel()} for {batch}")
        index = index.reshape(-1).expand(batch)
        if ctx.key_seen is not None:
            return columns(ctx.key_seen[:, ctx.offset :], index[:, None])[:, 0]
        index = torch.where(index < 0, n_new + index, index)
        if bool(((index < 0) | (index >= n_new)).any()):
            raise InputError(f"logits_at={at} is out of range for {n_new} tokens")
        return index

    def run_with_cache(  # type: ignore[override]
        self,
        tokens: Tokens,
        names: Where | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        grads: bool = False,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        kv_cache: KVCache | None = None,
        attention_mask: AnyMask | None = None,
    ) -> tuple[Logits | Stream, ActivationCache]:
        """Run the model, and return its output and the activations at the named points (None: all except lazy points).

        Entries are detached, moved to `device` and cast to `dtype` on capture. With `grads=True` they stay in the graph
        and the caller's backward fills `<name>_grad`.

        >>> from hooklens.testing import tiny_model
        >>> logits, cache = tiny_model().run_with_cache([[1, 2, 3]], names=["pattern", "resid_post"])
        >>> list(cache)[:2]
        ['blocks.0.attn.hook_pattern', 'blocks.0.hook_resid_post']
        """
        return super().run_with_cache(
            tokens,
            names=names,
            device=device,
            dtype=dtype,
            grads=grads,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            kv_cache=kv_cache,
            attention_mask=attention_mask,
        )

    # -- tokens

    def to_tokens(
        self,
        text: Text,
        *,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] = "right",
        return_mask: bool = False,
    ) -> Any:
        """Convert texts to token ids [batch pos]. `prepend_bos=None` adds BOS only if the model was trained with it.

        Shorter texts are padded, and the ids do not show where: `return_mask=True` returns (ids, mask [batch pos]), and
        `model(ids, attention_mask=mask)` ignores the padding. Texts passed to the model itself get their mask.
        """
        tokens, mask = self._need_tokenizer().to_tokens(
            text, prepend_bos=prepend_bos, padding_side=padding_side, return_mask=True, device=self.device
        )
        return (tokens, mask) if return_mask else tokens

    def to_string(self, tokens: Tensor | Sequence) -> str | list[str]:
        """The text of token ids; a list of texts for a batch."""
        return self._need_tokenizer().to_string(tokens)

    def to_str_tokens(self, text: str | Tensor | Sequence[int], *, prepend_bos: bool | None = None) -> list[str]:
        """The text of each token."""
        return self._need_tokenizer().to_str_tokens(text, prepend_bos=prepend_bos)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token; otherwise the error shows its tokens."""
        return self._need_tokenizer().to_single_token(text)

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "... d_model"]:
        """The column of W_U for each token (text, id or ids): the stream direction that raises its logit."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        elif isinstance(tokens, list | tuple) and tokens and isinstance(tokens[0], str):
            tokens = [self.to_single_token(token) for token in tokens]
        ids = as_ids(tokens, "tokens are texts or integers", self.device)
        _check_ids(ids, self.cfg.d_vocab_out)
        return matrix_of(self.unembed.linear, self.cfg.d_model)[ids]

    def _need_tokenizer(self) -> "Tokenizer":
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, so it reads token ids only; pass a tensor [batch pos], or "
                "HookedTransformer(cfg, tokenizer=...)"
            )
        return self.tokenizer.padding_within(self.cfg.d_vocab)

    def generate(
        self,
        prompt: "Prompt",
        max_new_tokens: int = 20,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | torch.Generator | None = None,
        stop: int | str | Collection[int | str] | None = None,
        stream: "bool | OnPiece" = False,
        capture: Mapping[int, Where | None] | None = None,
    ) -> "Generation":
        """Generate text. See `hooklens.generation.sampling.generate`."""
        from hooklens.generation.sampling import generate  # imported here, because generation is a layer above

        return generate(
            self,
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            stream=stream,
            capture=capture,
        )

    # -- weights, with TransformerLens's shapes

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        if self.pos_embed is None:
            raise Absent("this model has no position embedding (rotary, or no positions)")
        return self.pos_embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.linear.weight.T

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"] | None:
        return self.unembed.linear.bias

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every layer and head."""
        return self._factored("QK")

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every layer and head."""
        return self._factored("OV")

    def _factored(self, name: str) -> FactoredMatrix:
        factors = [getattr(block.attn, name).pair for block in self.blocks]
        return FactoredMatrix(*map(torch.stack, zip(*factors, strict=True)))

    def __repr__(self) -> str:
        cfg = self.cfg
        size = sum(p.numel() for p in self.parameters())
        return (
            f"HookedTransformer({visible(cfg.model_name)}: {cfg.n_layers} layers, d_model {cfg.d_model}, "
            f"{cfg.n_heads} heads of {cfg.d_head}, d_mlp {cfg.d_mlp}, {size / 1e6:.1f}M parameters)"
        )


def need_hooked(model: Any, asker: str) -> None:
    """Raise for anything except a HookedTransformer.

    >>> need_hooked(nn.Linear(2, 2), "a sweep")
    Traceback (most recent call last):
    hooklens.core.errors.WrongType: a sweep needs a HookedTransformer, got Linear; hl.load(...) makes one from ...
    """
    if not isinstance(model, HookedTransformer):
        raise WrongType(
            f"{asker} needs a HookedTransformer, got {type(model).__name__}; hl.load(...) makes one from a Hugging "
            "Face id or folder or a GGUF file, and hl.wrap gives any other module hooks and caches"
        )


def _check_ids(ids: Int[Tensor, "..."], d_vocab: int) -> None:
    if ids.numel() and _readable(ids):
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= d_vocab:
            raise InputError(f"token ids lie between 0 and {d_vocab - 1} here, got {low} to {high}")


def _readable(*tensors: Shaped[Tensor, "..."]) -> bool:
    """Whether the values can be read: not while a graph is recorded, and not under vmap."""
    return not torch.compiler.is_compiling() and not any(x.is_meta or under_transform(x) for x in tensors)


def _stacked(part: str, name: str) -> property:
    def views(model: HookedTransformer) -> list[Tensor]:
        views: list[Any] = [getattr(getattr(block, part, None), name, None) for block in model.blocks]
        if any(view is None for view in views):
            raise Absent(f"this model has no {name}")
        return views

    def read(self: HookedTransformer) -> StackedWeight:
        return StackedWeight.of(views(self))

    def write(self: HookedTransformer, value: Tensor) -> None:
        write_all(views(self), value)

    return property(read, write, doc=f"{name} of every layer, stacked; assignment and [layer, ...] = write through.")


for _name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
    setattr(HookedTransformer, _name, _stacked("attn", _name))
for _name in ("W_in", "W_gate", "W_out", "b_in", "b_out"):
    setattr(HookedTransformer, _name, _stacked("mlp", _name))


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    subclasses: list[type] = cls.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _methods(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


_DEFINED = {cls: _methods(cls) for cls in _with_subclasses(nn.Module) if cls.__module__.startswith("hooklens.")}
_DEFINED[nn.Linear] = _methods(nn.Linear)


def methods_replaced(modules: Iterable[nn.Module]) -> bool:
    """Whether a class of this model's kind, or one of these modules, has another method than it was defined with."""
    for cls, defined in _DEFINED.items():
        now = _methods(cls)
        if now.keys() != defined.keys() or any(now[name] is not value for name, value in defined.items()):
            return True
    own = ((type(module), name) for module in modules for name in vars(module) if not name.startswith("_"))
    return any(callable(getattr(cls, name, None)) for cls, name in own)


def runs_as_defined(model: HookedTransformer) -> bool:
    """Whether all modules are of classes of hooklens, no method was replaced, and no hook is on all modules of torch.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> before = runs_as_defined(model)
    >>> model.blocks[0].attn.q = nn.Sequential(model.blocks[0].attn.q)
    >>> before, runs_as_defined(model)
    (True, False)
    """
    modules = list(model.modules())
    are_known = all(type(module) in _DEFINED or type(module) is nn.ModuleList for module in modules)
    return are_known and not methods_replaced(modules) and not nn.modules.module._has_any_global_hook()


def initialise(model: HookedTransformer, seed: int) -> None:
    """Draw the initial weights from a separate generator: N(0, std^2) weights, zero biases, unit norms."""
    cfg = model.cfg
    generator = seeded(seed)
    std = cfg.init.std or 0.8 / math.sqrt(cfg.d_model)
    shrink = 1 / math.sqrt(2 * cfg.n_layers) if cfg.init.residual_scale else 1.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.ndim > 1:
                here = cfg.init.unembed_std if name.startswith("unembed") and cfg.init.unembed_std else std
                here *= shrink if name.endswith(("attn.o.weight", "mlp.out.weight")) else 1.0
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32) * here)
        for module in model.modules():
            if isinstance(module, Norm) and module.weight is not None:
                module.weight.fill_(module.unit_weight)

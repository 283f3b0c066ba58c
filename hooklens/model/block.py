"""A block: attention and an MLP on the residual stream. Four kinds, which differ in the position of the norms.

A block also describes what its parts read and write, so that no other code needs to know where its norms are: whether
the stream is a sum, through which norm a part reads (`reads_through`) and writes (`writes_through`), and which part
reads the other. A new kind is a `BlockPart` with a name and a subclass of `Block` with that `part`.
"""

from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.core.hooks import HookedPart, HookPoint
from hooklens.model.attention import Attention, OwnInputs
from hooklens.model.config import BlockPart, HookedTransformerConfig, Parallel, PostNorm, PreNorm, Sandwich, same_class
from hooklens.model.dropout import Dropout
from hooklens.model.kv_cache import Context
from hooklens.model.mlp import MLP, GatedMLP
from hooklens.model.norms import Norm, Passage, make_norm

Stream = Float[Tensor, "batch pos d_model"]
Vectors = Float[Tensor, "*lead d_model"]  # inputs of norms: one per position, or one per head and position
Queried = Float[Tensor, "batch query_pos d_model"]  # every position, or the selected one
_INPUTS = ("hook_resid_pre", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")

#: The module of each kind of block.
BLOCKS: dict[type[BlockPart], "type[Block]"] = {}


class Block(HookedPart):
    """Pre-norm: mid = pre + attn(ln1(pre)), post = mid + mlp(ln2(mid)) (Xiong et al. 2020, figure 1b)."""

    part: ClassVar[type[BlockPart]] = PreNorm
    #: The reason why the residual stream is not the sum of the components' outputs; None if it is.
    not_a_sum: ClassVar[str | None] = None
    #: Whether one part reads the output of the other part of this block.
    mlp_reads_attn: ClassVar[bool] = True
    attn_reads_mlp: ClassVar[bool] = False
    #: Whether the forward pass consists of `before_attn`, `attn_adds`, `finish`, `finish_mid`, `mlp_base` and `leave`,
    #: attention first. Exact sweeps then enter the block in the middle; they run any other block from its beginning.
    in_steps: ClassVar[bool] = True
    #: The modules in the order in which their points fire: points, attention, the MLP; any other name is a norm.
    order: ClassVar[tuple[str, ...]] = (
        *(*_INPUTS, "ln1", "attn", "hook_attn_out", "hook_resid_mid"),
        *("hook_mlp_in", "ln2", "mlp", "hook_mlp_out", "hook_resid_post"),
    )
    #: The modules that an attention-only model lacks.
    of_mlp: ClassVar[tuple[str, ...]] = ("hook_resid_mid", "hook_mlp_in", "ln2", "mlp", "ln2_post", "hook_mlp_out")
    attn: Attention
    mlp: MLP | None
    ln1: Norm | None
    ln2: Norm | None
    ln1_post: Norm | None
    ln2_post: Norm | None
    hook_resid_pre: HookPoint
    hook_q_input: HookPoint
    hook_k_input: HookPoint
    hook_v_input: HookPoint
    hook_attn_out: HookPoint
    hook_resid_mid: HookPoint
    hook_mlp_in: HookPoint
    hook_mlp_out: HookPoint
    hook_resid_post: HookPoint
    #: Points of the incoming stream, keys and values, which see every position even if one query is selected.
    early: ClassVar[tuple[str, ...]] = (
        *("hook_resid_pre", "hook_attn_in", "hook_k_input", "hook_v_input", "ln1.hook_scale", "ln1.hook_normalized"),
        *("attn.hook_k", "attn.hook_v", "attn.hook_rot_k", "attn.k_norm.hook_scale", "attn.k_norm.hook_normalized"),
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "part" in cls.__dict__:
            if not (isinstance(cls.part, type) and issubclass(cls.part, BlockPart) and hasattr(cls.part, "name")):
                raise WrongType(
                    f"the part of {cls.__qualname__} must be a subclass of BlockPart with a name, got {cls.part!r:.80}"
                )
            other = BLOCKS.get(cls.part, cls)
            if not same_class(other, cls):
                raise InputError(
                    f"{cls.__qualname__} has the part {cls.part.__name__}, and so has {other.__qualname__}"
                )
            BLOCKS[cls.part] = cls
        if {"forward", "finish"} & cls.__dict__.keys():
            cls.in_steps = cls.__dict__.get("in_steps", False)

    def __init__(self, cfg: HookedTransformerConfig, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads = cfg.n_heads, cfg.n_key_value_heads
        self.mlp = self.ln1 = self.ln2 = self.ln1_post = self.ln2_post = None
        self.build(cfg, layer)
        self.dropout = Dropout(cfg.dropout)

    def build(self, cfg: HookedTransformerConfig, layer: int) -> None:
        """Create the modules that this block has, in their order."""
        for name in self.order:
            if (name in self.of_mlp and cfg.attn_only) or (name == "hook_attn_in" and self.n_heads != self.n_kv_heads):
                continue
            if name == "attn":
                self.attn = Attention(cfg, layer)
            elif name == "mlp":
                self.mlp = GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)
            else:
                is_point = name.startswith("hook_")
                setattr(self, name, HookPoint() if is_point else make_norm(cfg.d_model, cfg.normalization_type))

    def forward(self, x: Stream, ctx: Context) -> Queried:
        x = self.hook_resid_pre(x)
        own = self.own_inputs(x, ctx)
        raw = self.attn(self.before_attn(x), ctx, own)
        return self.finish(ctx.select(x), self.hook_attn_out(self.dropout(self.attn_adds(raw))))

    def finish(self, x: Stream, attn_out: Stream) -> Stream:
        """Everything after `attn_out`, given the stream `x` that entered the block."""
        if self.mlp is None:
            return self.leave(x + attn_out)
        if not self.mlp_reads_attn:
            return self.leave(x + attn_out + self.mlp_out(x))
        return self.finish_mid(self.hook_resid_mid(x + attn_out))

    def finish_mid(self, mid: Stream) -> Stream:
        """Everything after `resid_mid`."""
        stream = self.after_mid(mid)
        return self.leave(stream + self.mlp_out(stream))

    def mlp_base(self, x: Stream, attn_out: Stream) -> Stream:
        """The stream to which the block adds `mlp_out`."""
        return self.after_mid(x + attn_out)

    def need_sum(self, asker: str, instead: str = "activation patching of z works there") -> None:
        """Raise unless the residual stream is a sum."""
        if self.not_a_sum is not None:
            raise InputError(
                f"{asker} needs a residual stream that is the sum of its components' outputs, but {self.not_a_sum}; "
                f"{instead}"
            )

    def need_steps(self, asker: str) -> None:
        """Raise unless the forward pass runs attention and the MLP as separate steps."""
        if not self.in_steps:
            raise InputError(
                f"{asker} runs attention and the MLP of a block as separate steps, but blocks of the kind "
                f"{self.part.name!r} have a forward pass of their own; activation patching works there"
            )

    def reads_through(self, part: Literal["attn", "mlp"]) -> Passage:
        """The norm through which q, k and v, or the MLP, read the stream of this block; the forward pass applies it."""
        return Passage(self.ln1 if part == "attn" else self.ln2)

    def writes_through(self, part: Literal["attn", "mlp"]) -> Passage:
        """The norm through which a head's `result`, or a neuron's output, reaches the stream; likewise applied."""
        return Passage(self.ln1_post if part == "attn" else self.ln2_post)

    def enters_through(self) -> Passage:
        """The norm of the first part that reads the incoming stream."""
        return self.reads_through("mlp" if self.attn_reads_mlp and self.mlp is not None else "attn")

    def leaves_through(self) -> Passage:
        """The norm between `resid_post` and the next block."""
        return Passage()

    def mlp_out(self, stream: Stream) -> Stream:
        """The output of the MLP for the stream that it reads."""
        assert self.mlp is not None
        added = self.mlp_adds(self.mlp(self.before_mlp(self.hook_mlp_in(stream))))
        return self.hook_mlp_out(self.dropout(added))

    def leave(self, post: Stream) -> Stream:
        """`resid_post`, and the stream that the next block receives."""
        return self.leaves_through()(self.hook_resid_post(post))

    def before_attn(self, x: Vectors) -> Vectors:
        return self.reads_through("attn")(x)

    def before_mlp(self, x: Vectors) -> Vectors:
        return self.reads_through("mlp")(x)

    def attn_adds(self, raw: Vectors) -> Vectors:
        """`attn_out`, from the output of the heads."""
        return self.writes_through("attn")(raw)

    def mlp_adds(self, raw: Vectors) -> Vectors:
        """`mlp_out`, from the output of the neurons."""
        return self.writes_through("mlp")(raw)

    def after_mid(self, mid: Stream) -> Stream:
        return mid

    def quiet_norm(self, x: Vectors) -> Vectors:
        """The norm before attention, without its hook points."""
        return self.reads_through("attn").without_hooks(x)

    def own_inputs(self, x: Stream, ctx: Context) -> OwnInputs:
        """A head's own q, k or v input, normalised on its own path, if a hook edits it; else None."""
        shared = getattr(self, "hook_attn_in", None)
        points = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        if not any(point.listening() for point in points) and not (shared is not None and shared.listening()):
            return (None, None, None)
        copies = _per_head(x, self.n_heads)
        attn_in = copies if shared is None else shared(copies)
        own = []
        for point, n in zip(points, (self.n_heads, self.n_kv_heads, self.n_kv_heads), strict=True):
            given = attn_in if attn_in is not copies else _per_head(x, n)
            used = point(given)
            own.append(None if used is given and attn_in is copies else self.quiet_norm(used))
        return (None if own[0] is None else ctx.select(own[0]), own[1], own[2])

    def query_points(self) -> list[HookPoint]:
        """The points that see every query position: all except those of the incoming stream, keys and values."""
        return [m for name, m in self.named_modules() if isinstance(m, HookPoint) and name not in self.early]


class SandwichBlock(Block):
    """Pre-norm, and each branch normalised again before it is added (Gemma 2): mid = pre + ln1_post(attn(ln1(pre)))."""

    part = Sandwich

    order = (
        *(*_INPUTS, "ln1", "attn", "ln1_post", "hook_attn_out", "hook_resid_mid"),
        *("hook_mlp_in", "ln2", "mlp", "ln2_post", "hook_mlp_out", "hook_resid_post"),
    )


class PostNormBlock(Block):
    """Norms after the sums (Vaswani et al. 2017): mid = pre + attn(pre), post = ln1(mid) + mlp(ln1(mid)).

    `resid_mid` and `resid_post` are the sums before their norm; the next block reads ln2(resid_post).
    """

    part = PostNorm
    not_a_sum = "post-norm blocks normalise the stream itself"
    early = tuple(name for name in Block.early if not name.startswith("ln1."))  # this ln1 follows attention

    order = (
        *(*_INPUTS, "attn", "hook_attn_out", "hook_resid_mid", "ln1"),
        *("hook_mlp_in", "mlp", "hook_mlp_out", "hook_resid_post", "ln2"),
    )
    of_mlp = ("hook_resid_mid", "ln1", "hook_mlp_in", "mlp", "hook_mlp_out")

    def before_mlp(self, x: Vectors) -> Vectors:
        return x  # normalised by `after_mid`

    def after_mid(self, mid: Stream) -> Stream:
        return self.reads_through("mlp")(mid)

    def reads_through(self, part: Literal["attn", "mlp"]) -> Passage:
        return Passage() if part == "attn" else Passage(self.ln1)

    def leaves_through(self) -> Passage:
        return Passage(self.ln2)


class ParallelBlock(Block):
    """Attention and MLP both read the incoming stream (Wang and Komatsuzaki 2021): post = pre + attn + mlp."""

    part = Parallel
    mlp_reads_attn = False
    order = tuple(name for name in Block.order if name != "hook_resid_mid")


BLOCKS[PreNorm] = Block


def block_of(part: BlockPart) -> type[Block]:
    """The module of a kind of block."""
    if type(part) not in BLOCKS:
        kind = type(part).__name__
        raise InputError(
            f"no Block is defined for {part!r}; write a subclass of Block with part = {kind}, and import it before the "
            "model is made"
        )
    return BLOCKS[type(part)]


def _per_head(x: Stream, n: int) -> Float[Tensor, "batch pos head d_model"]:
    return x.unsqueeze(2).expand(-1, -1, n, -1)

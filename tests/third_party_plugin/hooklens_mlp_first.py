"""A block kind of somebody else's: the MLP runs before attention, which reads what the MLP wrote."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hooklens.core.hooks import HookPoint
from hooklens.model.attention import Attention
from hooklens.model.block import Block
from hooklens.model.config import BlockPart, HookedTransformerConfig
from hooklens.model.kv_cache import Context
from hooklens.model.norms import make_norm


@dataclass(frozen=True)
class MLPFirst(BlockPart):
    """mid = pre + mlp(ln2(pre)), post = mid + attn(ln1(mid)).

    >>> from hooklens.testing import tiny_model
    >>> tiny_model(block="mlp_first").hook_names()[4:6]
    ['blocks.0.ln2.hook_scale', 'blocks.0.ln2.hook_normalized']
    """

    name = "mlp_first"


class MLPFirstBlock(Block):
    """The parts of a pre-norm block in the other order."""

    part = MLPFirst
    mlp_reads_attn, attn_reads_mlp = False, True
    early = (
        *Block.early,
        *("hook_resid_mid", "hook_mlp_in", "hook_mlp_out", "ln2.hook_scale", "ln2.hook_normalized"),
        *("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"),
    )

    def build(self, cfg: HookedTransformerConfig, layer: int) -> None:
        inputs = {name: self._modules.pop(name) for name in list(self._modules) if name != "hook_resid_pre"}
        if not cfg.attn_only:
            self.hook_mlp_in = HookPoint()
            self.ln2 = make_norm(cfg.d_model, cfg.normalization_type)
            self.build_mlp(cfg)
            self.hook_resid_mid = HookPoint()
        else:
            self.mlp = None
        self._modules.update(inputs)  # points are listed in the order in which they fire
        self.ln1 = make_norm(cfg.d_model, cfg.normalization_type)
        self.attn = Attention(cfg, layer)
        self.hook_attn_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"], ctx: Context) -> Float[Tensor, "batch query_pos d_model"]:
        mid = self.hook_resid_pre(x)
        if self.mlp is not None:
            mid = self.hook_resid_mid(mid + self.mlp_out(mid))
        own = self.own_inputs(mid, ctx)
        raw = self.attn(self.before_attn(mid), ctx, own)
        return self.leave(ctx.select(mid) + self.hook_attn_out(self.attn_adds(raw)))

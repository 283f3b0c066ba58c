"""A block kind of somebody else's: the MLP runs before attention, which reads what the MLP wrote."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hooklens.model.block import Block
from hooklens.model.config import BlockPart
from hooklens.model.kv_cache import Context


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

    order = (
        *("hook_resid_pre", "hook_mlp_in", "ln2", "mlp", "hook_mlp_out", "hook_resid_mid"),
        *("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "ln1", "attn"),
        *("hook_attn_out", "hook_resid_post"),
    )

    def forward(self, x: Float[Tensor, "batch pos d_model"], ctx: Context) -> Float[Tensor, "batch query_pos d_model"]:
        mid = self.hook_resid_pre(x)
        if self.mlp is not None:
            mid = self.hook_resid_mid(mid + self.mlp_out(mid))
        own = self.own_inputs(mid, ctx)
        raw = self.attn(self.before_attn(mid), ctx, own)
        return self.leave(ctx.select(mid) + self.hook_attn_out(self.attn_adds(raw)))

"""Sites of somebody else's that sweeps can overwrite: what each MLP reads, and queries after rotation."""

import torch

from hooklens.sweeps.sites import Entry, SweptSite, add_site


def mlp_adds(entry: Entry) -> torch.Tensor:
    """The stream that leaves the block when the MLP reads what was written."""
    block, base = entry.block, entry.block.mlp_base(entry.stream, entry.at("hook_attn_out"))
    return block.leave(base + block.mlp_adds(block.mlp(block.before_mlp(entry.written))))


#: Says how it enters a block.
MLP_IN = add_site(
    SweptSite("mlp_in", "hook_mlp_in", words="what the MLP reads", enter=mlp_adds, reads=("hook_attn_out",))
)

#: Leaves that to the sweep, which runs the block.
ROT_Q = add_site(SweptSite("rot_q", "attn.hook_rot_q", ("layer", "head"), words="the heads' queries, rotated"))

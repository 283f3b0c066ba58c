"""Convert the block formats of GGUF files back to float32.

A quantised tensor is a row of blocks. Each block packs 32 or 256 small integers and the scales that turn them into
numbers. Every function here returns the values of `gguf.dequantize` bit for bit, about ten times faster: it writes into
the result in pieces that fit the processor's cache, instead of building a list of arrays.

Reference: the block structures in ggml's `ggml-common.h`.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

Blocks = UInt8[Tensor, "block byte"]
Values = Float32[Tensor, "block value"]


def _half(blocks: Blocks, start: int) -> Float32[Tensor, "block 1"]:
    """The 16-bit float at byte `start` of every block."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: UInt8[Tensor, "block group byte"]) -> UInt8[Tensor, "block group 2 byte"]:
    """The low halves of a group's bytes, followed by the high halves."""
    return torch.stack((packed & 15, packed >> 4), dim=2)


def _q8_0(blocks: Blocks, out: Values) -> None:
    """value = scale * signed byte."""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def _q4_0(blocks: Blocks, out: Values) -> None:
    """value = scale * (nibble - 8)."""
    out[:, :16] = blocks[:, 2:] & 15
    out[:, 16:] = blocks[:, 2:] >> 4
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Blocks, out: Values) -> None:
    """value = scale * nibble + minimum."""
    out[:, :16] = blocks[:, 4:] & 15
    out[:, 16:] = blocks[:, 4:] >> 4
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _k_scales(blocks: Blocks) -> tuple[Float32[Tensor, "block 8 1"], Float32[Tensor, "block 8 1"]]:
    """Scale and offset of the eight sub-blocks of Q4_K and Q5_K.

    Twelve bytes store sixteen 6-bit numbers: four low scales, four low offsets, and the nibbles of the four high pairs,
    whose top two bits are stored in the top bits of the first eight bytes.
    """
    scale, offset, high = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat((scale & 63, (high & 15) | ((scale >> 2) & 48)), dim=1)
    offsets = torch.cat((offset & 63, (high >> 4) | ((offset >> 2) & 48)), dim=1)
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * offsets)[..., None]


def _q4_k(blocks: Blocks, out: Values) -> None:
    """value = scale * nibble - offset, in eight sub-blocks of 32."""
    scale, offset = _k_scales(blocks)
    view = out.view(-1, 8, 32)
    view.copy_(_nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32)).mul_(scale).sub_(offset)


def _q5_k(blocks: Blocks, out: Values) -> None:
    """Like Q4_K with a fifth bit: bit j of the 32 bytes at offset 16 belongs to sub-block j."""
    scale, offset = _k_scales(blocks)
    low = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    shift = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (blocks[:, None, 16:48] >> shift) & 1
    out.view(-1, 8, 32).copy_(low | (high << 4)).mul_(scale).sub_(offset)


def _q6_k(blocks: Blocks, out: Values) -> None:
    """value = scale * (six bits - 32), in sixteen sub-blocks of 16 with signed 8-bit scales."""
    low = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 8, 32)
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((blocks[:, 128:192].view(-1, 2, 1, 32) >> shift) & 3).view(-1, 8, 32)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    out.view(-1, 8, 32).copy_(low | (high << 4)).sub_(32)
    out.view(-1, 16, 16).mul_(scale[..., None])


DEQUANTISERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "F32": lambda blocks, out: out.copy_(blocks.view(torch.float32)),
    "F16": lambda blocks, out: out.copy_(blocks.view(torch.float16)),
    "BF16": lambda blocks, out: out.copy_(blocks.view(torch.bfloat16)),
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def can_dequantise(kind: str) -> bool:
    """Whether tensors of this type can be read, by this file or by the (slower) gguf package.

    >>> can_dequantise("Q4_1"), can_dequantise("Q5_0"), can_dequantise("I32")
    (True, True, False)
    """
    if kind in DEQUANTISERS:
        return True
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
        dequantize(np.zeros((1, size), dtype=np.uint8), GGMLQuantizationType[kind])
    except (KeyError, NotImplementedError):
        return False
    return True


def dequantise(kind: str, blocks: Blocks, out: Values) -> None:
    """Write the values of whole blocks of type `kind` into `out`.

    >>> block = torch.tensor([[0x00, 0x3C] + [1] * 32], dtype=torch.uint8)  # the scale 1.0, then 32 ones
    >>> out = torch.empty(1, 32)
    >>> dequantise("Q8_0", block, out)
    >>> out.sum()
    tensor(32.)
    """
    if kind in DEQUANTISERS:
        DEQUANTISERS[kind](blocks, out)
        return
    from gguf import GGMLQuantizationType, dequantize

    out.copy_(torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind])))

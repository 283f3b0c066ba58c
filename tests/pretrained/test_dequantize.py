"""Every block format equals the gguf package's own, bit for bit, and a formula written out for one block."""

import gguf
import numpy as np
import pytest
import torch

from hooklens.pretrained.dequantize import DEQUANTISERS, can_dequantise, dequantise

# Where each format keeps its 16-bit scales: random bytes there could be NaN, so these are set to numbers.
SCALES = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "Q5_0": [0],
    "Q3_K": [108],
}


def random_blocks(kind: str, n: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    _per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if kind in ("F32", "F16", "BF16"):
        values = generator.standard_normal((n, 1)).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8).reshape(n, size)
    blocks = generator.integers(0, 256, (n, size), dtype=np.uint8)
    for start in SCALES[kind]:
        scales = generator.standard_normal((n, 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks


@pytest.mark.parametrize("kind", [*DEQUANTISERS, "Q5_0", "Q3_K"])
def test_equal_to_the_gguf_package_bit_for_bit(kind):
    code = gguf.GGMLQuantizationType[kind]
    blocks = random_blocks(kind, 37)
    out = torch.full((37, gguf.GGML_QUANT_SIZES[code][0]), float("nan"))
    dequantise(kind, torch.from_numpy(blocks.copy()), out)
    expected = torch.from_numpy(gguf.dequantize(blocks, code).reshape(out.shape))
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


def test_q4_k_block_by_the_formula():
    """One block, written out number by number from the description of the format in ggml."""
    block = random_blocks("Q4_K", 1)[0]
    d, dmin = block[:4].view(np.float16).astype(np.float32)
    packed, expected = block[4:16].astype(int), []
    for j in range(8):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            minimum = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        quants = block[16 + 32 * (j // 2) : 48 + 32 * (j // 2)]
        quants = quants >> 4 if j % 2 else quants & 15
        expected += [
            np.float32(d * np.float32(scale)) * np.float32(q) - np.float32(dmin * np.float32(minimum)) for q in quants
        ]
    out = torch.empty(1, 256)
    dequantise("Q4_K", torch.from_numpy(block[None].copy()), out)
    np.testing.assert_array_equal(out[0].numpy(), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantising_and_back_is_close(kind):
    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    code = gguf.GGMLQuantizationType[kind]
    blocks = torch.from_numpy(gguf.quants.quantize(values, code)).reshape(-1, gguf.GGML_QUANT_SIZES[code][1])
    out = torch.empty(16, 32)
    dequantise(kind, blocks, out)
    steps = 127 if kind == "Q8_0" else 7
    assert (out.view(8, 64) - torch.from_numpy(values)).abs().max() < np.abs(values).max() / steps


def test_what_cannot_be_read():
    assert not can_dequantise("I32") and not can_dequantise("Q9_Z") and can_dequantise("Q5_1")

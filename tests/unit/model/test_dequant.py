"""Our dequantisation against the `gguf` package, bit by bit, on random blocks of every type."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from sterna.core.gguf_types import GGMLType, block_layout
from sterna.model.dequant import SUPPORTED_TYPES, dequantize

# Bytes where a float16 scale starts; random bytes there could be infinite.
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
NUM_BLOCKS = 64


@pytest.mark.parametrize("name", SCALES)
def test_quantised_blocks_equal_the_gguf_package(name):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (NUM_BLOCKS, block_layout(GGMLType[name])[1]), dtype=np.uint8)
    for start in SCALES[name]:
        scale = rng.normal(size=NUM_BLOCKS).astype(np.float16)
        raw[:, start : start + 2] = scale.view(np.uint8).reshape(NUM_BLOCKS, 2)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(-1)
    got = dequantize(torch.from_numpy(raw.reshape(-1)), GGMLType[name])
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
def test_float_types_are_taken_as_they_are(name, dtype):
    values = torch.randn(96, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = dequantize(values.view(torch.uint8), GGMLType[name])
    assert torch.equal(got, values)


def test_the_supported_types_are_the_promised_ones():
    promised = {*SCALES, "F32", "F16", "BF16"}
    assert {kind.name for kind in SUPPORTED_TYPES} == promised

"""GGUF quantised blocks to float32, whole tensors at a time.

A tensor's bytes are seen as [blocks, bytes in a block]; a block holds one or two float16 scales
and small integers (layouts: ggml-common.h of llama.cpp):

    Q4_0  d, 16 x 2 nibbles                        d * (q - 8)
    Q4_1  d, m, 16 x 2 nibbles                     d * q + m
    Q5_0  d, 32 high bits, nibbles                 d * (q - 16)
    Q5_1  d, m, 32 high bits, nibbles              d * q + m
    Q8_0  d, 32 int8                               d * q
    Q4_K  d, dmin, 8 x (scale, min) of 6 bits, nibbles of 256        d * s * q - dmin * m
    Q5_K  the same with 256 high bits
    Q6_K  256 x (4 low bits, 2 high bits), 16 int8 scales, d         d * s * (q - 32)

In the 32-element types the low nibbles are elements 0..15 and the high ones 16..31; in the K
types each run of 32 bytes holds 32 elements low and the next 32 high. Products are formed in the
order of the ggml reference, so the float32 values are its values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sterna.core.gguf_types import GGMLType, block_layout
from sterna.kernels.backend import backend_for

_SCALE_BYTES = 12  # of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit mins


def dequantize_as(raw: Tensor, kind: GGMLType, dtype: torch.dtype) -> Tensor:
    """uint8 [nbytes] of a tensor of type `kind` -> `dtype` [elements], rounded once.

    By the C++ kernels where they have the type (10 times faster), else by `dequantize`.
    """
    native = getattr(backend_for("cpu"), "dequantize", None)
    if native is not None and kind not in _FLOAT_DTYPES:
        value: Tensor | None = native(raw.view(-1, block_layout(kind)[1]), int(kind), dtype)
        if value is not None:
            return value
    return dequantize(raw, kind).to(dtype)


def dequantize(raw: Tensor, kind: GGMLType) -> Tensor:
    """uint8 [nbytes] of a tensor of type `kind` -> float32 (or its own float type) [elements].

    `kind` must be in `SUPPORTED_TYPES`. The reference of the C++ kernels.
    """
    if kind in _FLOAT_DTYPES:
        return raw.view(_FLOAT_DTYPES[kind])
    blocks = raw.view(-1, block_layout(kind)[1])
    return _DECODERS[kind](blocks).reshape(-1)


def _f16(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """uint8 [blocks, bytes] -> uint8 [blocks, 2 * bytes]; each `run` bytes: low, then high."""
    runs = packed.reshape(packed.shape[0], -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], dim=2).reshape(packed.shape[0], -1)


def _high_bits(packed: Tensor) -> Tensor:
    """uint8 [blocks, 4] -> uint8 [blocks, 32] of 0 or 16: bit i belongs to element i."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts & 1) << 4).reshape(packed.shape[0], 32)


def _q4_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 2:], 16).float().sub_(8)
    return q.mul_(_f16(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 4:], 16).float()
    return q.mul_(_f16(blocks, 0)).add_(_f16(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 6:], 16) | _high_bits(blocks[:, 2:6])
    return q.float().sub_(16).mul_(_f16(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 8:], 16) | _high_bits(blocks[:, 4:8])
    return q.float().mul_(_f16(blocks, 0)).add_(_f16(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_f16(blocks, 0))


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [blocks, 12] -> 6-bit scales and mins, uint8 [blocks, 8] each.

    Bytes 0..3 and 4..7 hold the first four of each in their low 6 bits; their top 2 bits complete
    the last four, whose low 4 bits share bytes 8..11.
    """
    a, b, c = torch.split(packed, 4, dim=1)
    scales = torch.cat([a & 63, (c & 15) | (a >> 6 << 4)], dim=1)
    mins = torch.cat([b & 63, (c >> 4) | (b >> 6 << 4)], dim=1)
    return scales, mins


def _affine_k(blocks: Tensor, q: Tensor) -> Tensor:
    """d * scale * q - dmin * min over 8 sub-blocks of 32; q uint8 [blocks, 256]."""
    scales, mins = _scales_and_mins(blocks[:, 4 : 4 + _SCALE_BYTES])
    gain = (_f16(blocks, 0) * scales.float())[:, :, None]
    offset = (_f16(blocks, 2) * mins.float())[:, :, None]
    return q.reshape(-1, 8, 32).float().mul_(gain).sub_(offset)


def _q4_k(blocks: Tensor) -> Tensor:
    return _affine_k(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (blocks[:, None, 16:48] >> shifts & 1) << 4  # bit i: sub-block i
    return _affine_k(blocks, _nibbles(blocks[:, 48:], 32) | high.reshape(-1, 256))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128], 64)  # each half of 128: low nibbles of 64 bytes, then high
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4
    q = (low | high.reshape(-1, 256)).float().sub_(32)
    gain = _f16(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return q.reshape(-1, 16, 16).mul_(gain[:, :, None])


_FLOAT_DTYPES: Mapping[GGMLType, torch.dtype] = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}
_DECODERS: Mapping[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}
SUPPORTED_TYPES: tuple[GGMLType, ...] = (*_FLOAT_DTYPES, *_DECODERS)

"""A quantised KV cache: one byte an element and one float32 scale a token and key/value head.

A cache whose dtype is int8 or float8_e4m3fn is quantised. x ~ code * scale with scale =
max|x| / 127 (int8) or / 448 (e4m3), codes rounded to even. A token's codes depend on its own key
or value alone, so a sequence's cache is the same bits however it was cut or batched. A head that
is not finite keeps the scale NaN: a fault stays as visible as in a cache that is not quantised.

The codes of a key multiply exactly in bfloat16 (both formats have at most 8 significant bits); the
scale of a key belongs to its score and that of a value to its probability, which is how the C++
kernels apply them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

SCALE_BYTES = 4
# The largest code of each format.
LARGEST: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
)


def row_elems(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of cache dtype `dtype` that one head of one token takes."""
    return head_dim + SCALE_BYTES if dtype in LARGEST else head_dim


def quantise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., C] -> uint8 [..., C + 4]: the codes, then the scale's four bytes."""
    x = x.float()
    limit = LARGEST[dtype]
    scale = x.abs().amax(dim=-1, keepdim=True) / limit
    usable = scale.isfinite() & (scale > 0)
    scaled = torch.where(usable, x / torch.where(usable, scale, 1.0), 0.0).clamp(-limit, limit)
    codes = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    scale = torch.where(scale.isfinite(), scale, float("nan"))
    return torch.cat([codes.view(torch.uint8), scale.contiguous().view(torch.uint8)], dim=-1)


def dequantise(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [..., C + 4] -> float32 [..., C]."""
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:]
    return codes.contiguous().view(dtype).float() * scale.contiguous().view(torch.float32)

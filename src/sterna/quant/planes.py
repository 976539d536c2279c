"""The papers' 4 + 2 split of six-bit codes (ZeroQuant(4+2) section 4.2, FP6-LLM section 5.1).

Two dense planes, each a power of two wide: the low 4 bits of every code, two codes a byte, and
the high 2 bits (sign and top exponent bit), four codes a byte. Kept as an exchange format and as
the oracle of the tile layout; no kernel here reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_4_2(codes: Tensor) -> tuple[Tensor, Tensor]:
    """codes [N, K] uint8 below 64, K divisible by 4 -> planes uint8 [N, K / 2] and [N, K / 4].

    Element i sits in the low bits first: nibble i % 2 of byte i // 2, pair i % 4 of byte i // 4.
    """
    low = (codes & 15).view(*codes.shape[:-1], -1, 2)
    high = (codes >> 4).view(*codes.shape[:-1], -1, 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)
    four = low[..., 0] | (low[..., 1] << 4)
    return four, (high << shifts).sum(dim=-1, dtype=torch.uint8)


def join_4_2(four: Tensor, two: Tensor) -> Tensor:
    """The planes -> codes [N, K]; the inverse of `split_4_2`."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=two.device)
    low = torch.stack([four & 15, four >> 4], dim=-1).flatten(-2)
    high = ((two[..., None] >> shifts) & 3).flatten(-2)
    return low | (high << 4)

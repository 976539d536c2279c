"""Rotary position tables: row p = [cos(p * f) | sin(p * f)], float32, computed once at load.

f are the inverse frequencies theta^(-2i / rotary_dim), bent by the scaling type:

    default    f                                          (RoFormer, arXiv 2104.09864)
    linear     f / factor                                 (position interpolation, 2306.15595)
    dynamic    f up to max_position_embeddings; see below
    llama3     low frequencies / factor, a ramp between   (Llama 3.1)
    yarn       ramp between f and f / factor by dimension (2309.00071)
    longrope   f / short_factor or f / long_factor        (2402.13753)

yarn and longrope also scale cos and sin by an attention factor. Arithmetic is float32 in the
order transformers uses, since float32 parity over thousands of positions needs equal frequencies.

Dynamic NTK bends f by the length of the whole sequence, which one table cannot follow: keys
already cached would need another rotation. Up to max_position_embeddings it equals `default`, and
Sterna serves it up to there. LongRope chooses between two tables by length; they are stacked
([short; long]) and a sequence keeps the one picked from its prompt + max_tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sterna.model.rope_config import RopeConfig


def rope_table(rope: RopeConfig, num_positions: int) -> Tensor:
    """float32 [P, rotary_dim]; P = num_positions, plus the short table's rows for longrope."""
    scale = attention_scaling(rope)
    if rope.rope_type != "longrope":
        return _table(inverse_frequencies(rope), num_positions, scale)
    short = _table(_longrope(rope, rope.short_factor), short_rows(rope, num_positions), scale)
    if num_positions <= rope.original_max_positions:
        return short
    return torch.cat([short, _table(_longrope(rope, rope.long_factor), num_positions, scale)])


def short_rows(rope: RopeConfig, num_positions: int) -> int:
    """Rows of the LongRope short table, which is also where the long table starts."""
    return min(rope.original_max_positions, num_positions)


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """float32 [rotary_dim / 2]; for longrope the short factors."""
    base = _base(rope)
    if rope.rope_type == "linear":
        return base / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, base)
    if rope.rope_type == "yarn":
        return _yarn(rope)
    if rope.rope_type == "longrope":
        return _longrope(rope, rope.short_factor)
    return base


def attention_scaling(rope: RopeConfig) -> float:
    """Factor on cos and sin; 1 but for yarn and longrope."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "yarn":
        if rope.mscale and rope.mscale_all_dim:
            return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
        return _mscale(rope.factor, 1.0)
    if rope.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))


def _table(inv_freq: Tensor, num_rows: int, scale: float) -> Tensor:
    angles = torch.arange(num_rows, dtype=torch.float32)[:, None] * inv_freq[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1).mul_(scale)


def _exponents(rope: RopeConfig) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim


def _base(rope: RopeConfig) -> Tensor:
    return 1.0 / (rope.theta ** _exponents(rope))


def _longrope(rope: RopeConfig, factors: tuple[float, ...]) -> Tensor:
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta ** _exponents(rope))


def _llama3(rope: RopeConfig, base: Tensor) -> Tensor:
    """Wavelengths beyond original / low_freq_factor are slowed, short ones kept, a ramp between."""
    length = rope.original_max_positions
    wavelength = 2 * math.pi / base
    spread = rope.high_freq_factor - rope.low_freq_factor
    ramp = (length / wavelength - rope.low_freq_factor) / spread
    between = (1 - ramp) * base / rope.factor + ramp * base
    slowed = torch.where(wavelength > length / rope.low_freq_factor, base / rope.factor, between)
    return torch.where(wavelength < length / rope.high_freq_factor, base, slowed)


def _yarn(rope: RopeConfig) -> Tensor:
    powers = rope.theta ** _exponents(rope)
    kept, slowed = 1.0 / powers, 1.0 / (rope.factor * powers)
    low, high = _yarn_bounds(rope)
    steps = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
    share_kept = 1 - torch.clamp((steps - low) / (high - low), 0, 1)
    return slowed * (1 - share_kept) + kept * share_kept


def _yarn_bounds(rope: RopeConfig) -> tuple[float, float]:
    """The dims whose frequencies turn beta_fast and beta_slow times over the original length."""
    low, high = (_yarn_dim(rope, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.has_whole_bounds:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    return low, high if high != low else high + 0.001


def _yarn_dim(rope: RopeConfig, turns: float) -> float:
    length = math.log(rope.original_max_positions / (turns * 2 * math.pi))
    return rope.rotary_dim * length / (2 * math.log(rope.theta))


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

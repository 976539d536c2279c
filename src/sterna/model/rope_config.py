"""The settings of rotary positions, read from either generation of config keys.

transformers 5 writes `rope_parameters` with `rope_theta` inside; transformers 4 wrote
`rope_scaling` beside a top-level `rope_theta`, with `type` for `rope_type` and sometimes "su" for
"longrope". Imports no torch; the arithmetic is in rope.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.core.lookup import unknown

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotation. `original_max_positions` is the length before scaling.

    `attention_factor` None = the value the type derives (yarn, longrope).
    """

    rope_type: str
    theta: float
    rotary_dim: int
    max_positions: int
    original_max_positions: int
    factor: float = 1.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    has_whole_bounds: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def stretched_length(self) -> int:
        """The length the scaling was made for, where max_position_embeddings does not say it."""
        is_yarn = self.rope_type == "yarn"
        return int(self.original_max_positions * self.factor) if is_yarn else 0


def parse_rope(hf: Mapping[str, Any], head_dim: int, source: str) -> RopeConfig:
    """The RopeConfig of a config dictionary; `source` is named in errors.

    Raises UnsupportedModelError for an unknown type, ModelFileError for missing or wrong-sized
    parameters.
    """
    values = _merged(hf)
    rope_type = _rope_type(values, source)
    max_positions = int(hf.get("max_position_embeddings") or 2048)
    original = int(values.get("original_max_position_embeddings") or max_positions)
    partial = values.get("partial_rotary_factor")
    rope = RopeConfig(
        rope_type=rope_type,
        theta=float(values.get("rope_theta") or 10_000.0),
        rotary_dim=int(head_dim * (1.0 if partial is None else partial)),
        max_positions=max_positions,
        original_max_positions=original,
        factor=float(values.get("factor") or max_positions / original),
        attention_factor=values.get("attention_factor"),
        low_freq_factor=float(values.get("low_freq_factor") or 1.0),
        high_freq_factor=float(values.get("high_freq_factor") or 4.0),
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        mscale=float(values.get("mscale") or 0.0),
        mscale_all_dim=float(values.get("mscale_all_dim") or 0.0),
        has_whole_bounds=bool(values.get("truncate", True)),
        short_factor=tuple(values.get("short_factor") or ()),
        long_factor=tuple(values.get("long_factor") or ()),
    )
    return _checked(rope, values, source)


def _merged(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Top-level keys under the nested ones; only what concerns rotation is read from them."""
    top = ("rope_theta", "partial_rotary_factor")
    values = {key: hf[key] for key in top if hf.get(key) is not None}
    values.update(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if hf.get("original_max_position_embeddings"):  # Phi-3 keeps it at the top, and it wins
        values["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    return values


def _rope_type(values: Mapping[str, Any], source: str) -> str:
    name = values.get("rope_type") or values.get("type") or "default"
    if name == "su" or (name == "yarn" and values.get("short_factor")):  # Phi-3's older words
        return "longrope"
    if name not in ROPE_TYPES:
        raise UnsupportedModelError(f"{source}: {unknown('rope_type', name, ROPE_TYPES)}")
    return str(name)


def _checked(rope: RopeConfig, values: Mapping[str, Any], source: str) -> RopeConfig:
    for key in _REQUIRED.get(rope.rope_type, ()):
        if values.get(key) is None:
            raise ModelFileError(f"{source}: rope_type {rope.rope_type!r} needs {key!r}; add it")
    half = rope.rotary_dim // 2
    for key, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if rope.rope_type == "longrope" and len(factors) != half:
            raise ModelFileError(
                f"{source}: {key} has {len(factors)} numbers; {half} are needed (rotary_dim / 2)"
            )
    return rope

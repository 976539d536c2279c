"""The settings of a low-rank adapter. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ALL_LINEAR = "all-linear"


class AdapterConfig(BaseModel):
    """LoRA (arXiv 2106.09685), rank-stabilised (2312.03732), or DoRA (2402.09353)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lora", "dora"] = Field(
        "lora", description="dora also trains the length of every output row of a weight"
    )
    rank: int = Field(16, ge=1, description="columns of B and rows of A")
    alpha: float = Field(32.0, gt=0, description="the adapter's output is scaled by alpha / rank")
    is_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input, in training")
    targets: tuple[str, ...] = Field(
        (ALL_LINEAR,),
        description="Hugging Face names of the weights, such as q_proj, or patterns, such as "
        "*.0.mlp.*; all-linear = every projection of the blocks",
    )
    layers: tuple[int, ...] = Field((), description="indices of the blocks; empty = all")

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor on B A x of a part with this rank and alpha."""
        return alpha / rank**0.5 if self.is_rslora else alpha / rank

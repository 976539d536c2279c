"""The `parallel` section of a recipe. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ParallelConfig(BaseModel):
    """How many processes share the work, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dp: int | None = Field(
        None, gt=0, description="ranks with different rows; None = all that sp and tp leave"
    )
    sp: int = Field(1, gt=0, description="ranks that share one row, cut along the sequence")
    tp: int = Field(1, ge=1, le=1, description="ranks that share one weight; training has 1")
    ulysses: int | None = Field(
        None,
        gt=0,
        description="of the sp ranks, how many exchange heads for tokens; the others gather keys "
        "and values; None = as many as the heads allow",
    )
    shard: Literal["auto", "none", "full"] = Field(
        "auto",
        description="weights, gradients and optimiser states cut over dp x sp (FSDP2): full, or "
        "none = every rank holds all; auto = full on more than one rank",
    )
    timeout_s: float = Field(1800.0, gt=0, description="seconds a collective waits for a rank")

"""Which tier what a step needs only now and then waits in. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from sterna.train.longseq.config import Tier


class OffloadSection(BaseModel):
    """Optimizer states and weights away from where the model computes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    states: Tier = Field(
        "memory",
        description="where AdamW's moments and float32 masters wait: memory, host (pinned, for a "
        "GPU) or disk",
    )
    weights: Tier = Field(
        "memory",
        description="where the blocks' weights wait while other blocks run; needs "
        "longseq.checkpoint, and without an adapter the tier of the states",
    )
    folder: Path | None = Field(
        None, description="for tier disk: where its file lies; None = the run's folder"
    )

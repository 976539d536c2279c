"""How a long row is trained in little memory. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Tier = Literal["memory", "host", "disk"]
CHUNK_ROWS = 2048
# Bytes of one chunk's float32 logits: 2,048 rows of 65,536 tokens, 1,046 of Llama 3's 128,256.
CHUNK_BYTES = 512 << 20


def chunk_rows_of(vocab_size: int, chunk_rows: int | None = None) -> int:
    """Rows of a chunk of logits: what was asked for, else CHUNK_ROWS within CHUNK_BYTES."""
    if chunk_rows is not None:
        return max(chunk_rows, 1)
    return max(min(CHUNK_ROWS, CHUNK_BYTES // (4 * vocab_size)), 1)


class LongseqSection(BaseModel):
    """Activation checkpoints and tiles."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    auto: bool = Field(
        False,
        description="let the planner choose what is not set here, for the free memory; a run that "
        "meets the limit all the same goes on with more frugal settings",
    )
    checkpoint: bool = Field(
        False, description="keep one hidden row a block for the backward, compute the rest again"
    )
    every: int = Field(1, gt=0, description="blocks a checkpoint")
    tier: Tier = Field(
        "memory", description="where checkpoints wait: memory, host (pinned, for a GPU) or disk"
    )
    folder: Path | None = Field(
        None, description="for tier disk: where its file lies; None = the run's folder"
    )
    mlp_tile: int = Field(
        0, ge=0, description="tokens the half after attention runs at a time; 0 = all"
    )
    attention_tile: int = Field(
        0, ge=0, description="tokens the half before attention runs at a time; 0 = all"
    )
    head_rows: int = Field(0, ge=0, description="rows of logits at a time; 0 = by their bytes")

    @model_validator(mode="after")
    def _has_checkpoints(self) -> LongseqSection:
        if not self.checkpoint and (self.every > 1 or self.tier != "memory"):
            raise ValueError(
                "longseq.every and longseq.tier say how checkpoints are kept, but "
                "longseq.checkpoint is false; set it to true"
            )
        return self

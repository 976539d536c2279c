"""How much memory a run may take, and what waits elsewhere meanwhile. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sterna.train.config import Section
from sterna.train.longseq.config import Tier


class MemorySection(Section):
    """The budget of a run, and where frozen models wait while nobody asks them."""

    budget_gb: float = Field(
        default=0.0, ge=0, description="GB (10^9 bytes) of its device that the run may take, by "
        "the planner's count; 0 = what is free when it starts",
    )  # fmt: skip
    host_gb: float = Field(
        default=0.0, ge=0, description="with a GPU: GB of the host's memory; 0 = what is free"
    )
    fit: Literal["refuse", "adapt"] = Field(
        default="refuse", description="a plan over the budget, before any work: stop and say what "
        "would fit (without a stated budget: warn); or adapt micro_tokens, the KV cache, tiers",
    )  # fmt: skip
    reference: Tier = Field(
        default="memory", description="where the reference (or teacher) waits while nobody asks "
        "it: memory, host (pinned, for a GPU) or disk",
    )  # fmt: skip
    rewards: Tier = Field(default="memory", description="the same of reward models")
    folder: Path | None = Field(
        default=None, description="for tier disk: where its file lies; None = the run's folder"
    )

"""The recipe of a whole alignment: fine-tuning, a reward model, reinforcement learning.

Each step's table is the recipe of its kind (`inherit.py` lays the common tables under it).
Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sterna.align.config import RlRecipe
from sterna.align.memory.config import MemorySection
from sterna.align.offline.config import OfflineRecipe
from sterna.align.pipeline.inherit import FOLDERS, inherited, model_of_step
from sterna.data.config import DataConfig
from sterna.train.config import ModelSection, Recipe, Section

StepName = Literal["sft", "reward", "rl"]
StepRecipe = Recipe | RlRecipe


class PipelineRunSection(Section):
    """Where to, and what all steps share."""

    output: Path = Field(
        default=Path("runs/align"), description="folder of the run: 1-sft, 2-reward, 3-rl"
    )
    seed: int = Field(default=0, ge=0, description="run.seed of every step")
    threads: int = Field(default=0, ge=0, description="run.threads of every step")


class CompareSection(Section):
    """At the end both models, as step 3 found and left it, answer held-out prompts."""

    prompts: int = Field(default=64, ge=0, description="held-out prompts; 0 = no comparison")
    temperature: float = Field(default=1.0, ge=0, description="0 = greedy")


class AlignRecipe(Section):
    """Everything of a three-step alignment; `sterna align` reads it from TOML files."""

    steps: tuple[StepName, ...] = Field(
        default=(), description="which to run now, of those with a table; empty = all of them"
    )
    reward_from: Literal["sft", "model"] = Field(
        default="sft", description="what the reward model starts from, where [reward.model] has no "
        "path: step 1's model, or [model]",
    )  # fmt: skip
    model: ModelSection = Field(
        default=ModelSection(), description="of all steps; the others start from step 1's"
    )
    data: DataConfig | None = Field(
        default=None, description="of all steps; split has three shares, one a step"
    )
    run: PipelineRunSection = PipelineRunSection()
    compare: CompareSection = CompareSection()
    memory: MemorySection = Field(
        default=MemorySection(), description="of all steps; frozen models are step 3's"
    )
    sft: Recipe | None = Field(default=None, description="step 1: keys of `sterna train`")
    reward: OfflineRecipe | None = Field(
        default=None, description="step 2: keys of `sterna train`, kind = reward"
    )
    rl: RlRecipe | None = Field(
        default=None, description="step 3: keys of `sterna align` with one table; ppo by default"
    )

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        return inherited(values)

    @model_validator(mode="after")
    def _fits(self) -> AlignRecipe:
        tables = [name for name in FOLDERS if getattr(self, name) is not None]
        if not tables:
            raise ValueError("no step has a table; give [sft], [reward] or [rl]")
        without = [name for name in self.steps if name not in tables]
        if without:
            raise ValueError(f"steps names {', '.join(without)}, which has no table here")
        if self.reward is not None and self.reward.kind != "reward":
            raise ValueError(f"[reward] trains a reward model; its kind is {self.reward.kind!r}")
        if self.sft is not None and self.sft.kind not in ("sft", "pretrain"):
            raise ValueError(f"[sft] is fine-tuning; its kind is {self.sft.kind!r}")
        return self

    def chosen(self) -> list[StepName]:
        """The steps to run, in order."""
        tables = [name for name in FOLDERS if getattr(self, name) is not None]
        return [name for name in tables if not self.steps or name in self.steps]  # type: ignore[misc]

    def folder(self, step: str) -> Path:
        """The run folder of a step."""
        return self.run.output / FOLDERS[step]

    def recipe(self, step: str) -> StepRecipe:
        """The whole recipe of a step."""
        found: StepRecipe = getattr(self, step)
        return found

    def needs(self, step: str) -> list[str]:
        """The earlier steps whose models it reads."""
        named = {str(path) for path in _paths(self.recipe(step).model_dump(mode="json"))}
        return [
            one for one in FOLDERS if one != step and model_of_step(self.run.output, one) in named
        ]


def _paths(values: Any) -> list[str]:
    """All texts of a recipe."""
    if isinstance(values, dict):
        return [text for value in values.values() for text in _paths(value)]
    if isinstance(values, list):
        return [text for value in values for text in _paths(value)]
    return [values] if isinstance(values, str) else []

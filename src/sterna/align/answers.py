"""How answers to fixed prompts change: greedy, every few steps, kept as JSON lines and a page.

answers.jsonl   {"step": 10, "prompt": ..., "answer": ..., "tokens": 12, "truncated": false,
                 "reward": 0.5 or null}
answers.html    the same, steps side by side; also a part of report.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sterna.align.answers_page import answers_part
from sterna.align.config import ShowSection
from sterna.align.experience import Experience
from sterna.align.records import append_line, keep_until
from sterna.align.rlhooks import RlHook
from sterna.align.tasks.base import PromptRow
from sterna.core.rundir import write_atomic
from sterna.train.metrics import read_metrics
from sterna.train.report import page

if TYPE_CHECKING:
    from sterna.align.prompts import Prompt
    from sterna.align.rltrainer import RlTrainer

FILE = "answers.jsonl"


class Answers(RlHook):
    """Asks before the first step, every `show.every` steps, and at the end."""

    def __init__(self, folder: Path, settings: ShowSection) -> None:
        self._folder = folder
        self._settings = settings
        self._prompts: list[Prompt] = []
        self._shown = -1

    def on_start(self, trainer: RlTrainer) -> None:
        """The answers of the model as it starts; a resumed run has them."""
        step = trainer.counters.step
        keep_until(self._folder / FILE, step)
        self._prompts = self._fixed(trainer)
        if step == 0:
            self._ask(trainer, 0)

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """Ask again where it is time."""
        if step % self._settings.every == 0:
            self._ask(trainer, step)

    def on_end(self, trainer: RlTrainer) -> None:
        """The answers of the final model."""
        self._ask(trainer, trainer.counters.step)

    def _fixed(self, trainer: RlTrainer) -> list[Prompt]:
        if self._settings.prompts:
            made = trainer.parts.prompts.made
            return [made(i, PromptRow(text)) for i, text in enumerate(self._settings.prompts)]
        stream = trainer.parts.eval_prompts
        assert stream is not None, "built where answers are shown"
        stream.position = 0
        return stream.take(self._settings.count)

    def _ask(self, trainer: RlTrainer, step: int) -> None:
        if self._shown == step:
            return
        self._shown = step
        rollouts = trainer.answers(self._prompts)
        samples = trainer.samples(self._prompts, rollouts)
        # Prompts of the user's own have no columns that a reward could read.
        worth = None if self._settings.prompts else trainer.parts.rewards(samples).total.tolist()
        for i, sample in enumerate(samples):
            line = {
                "step": step,
                "prompt": sample.prompt,
                "answer": sample.completion,
                "tokens": len(sample.rollout.completion),
                "truncated": sample.rollout.is_truncated,
                "reward": None if worth is None else worth[i],
            }
            append_line(self._folder / FILE, line)
        part = answers_part(list(read_metrics(self._folder / FILE)))
        title = f"Answers over steps: {self._folder.name}"
        write_atomic(self._folder / "answers.html", page(title, "greedy", [part]))

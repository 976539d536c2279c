"""Two steps of a recipe in a process of its own, with the peak memory of each phase.

    python memory_step.py JOB.json -> one JSON line {"base": bytes, "phases": {name: bytes}}

A phase's figure is the high-water mark of resident memory while it lasts, less what the process had
with all libraries before it made a model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sterna.align.build import build
from sterna.align.config import RlRecipe
from sterna.align.learner import Learner
from sterna.align.reward import Sample
from sterna.kernels.load import load_kernels


class Small:
    """The share of small token ids: a reward that costs nothing."""

    name = "small"

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """One a sample."""
        return [float((s.rollout.completion < 4096).mean()) for s in samples]


class Marks:
    """The largest high-water mark of each phase."""

    def __init__(self) -> None:
        self.base = status("VmRSS")
        self.phases: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Restart the mark, and keep it."""
        Path("/proc/self/clear_refs").write_text("5")
        yield
        self.note(name)

    def note(self, name: str) -> None:
        """The mark since it was restarted, as the phase's; then restart it."""
        self.phases[name] = max(self.phases.get(name, 0), status("VmHWM") - self.base)
        Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main() -> int:
    """Run the job."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    load_kernels()
    recipe, marks = RlRecipe.model_validate(job["recipe"]), Marks()
    rewards = [] if any(r.kind == "model" for r in recipe.rewards) else [Small()]
    with marks.phase("start"):
        trainer = build(recipe, rewards=rewards)
    own = trainer.parts.learner
    assert isinstance(own, Learner)
    plain = own._critic_step

    def critic_step(*args: Any) -> dict[str, float]:
        marks.note("training")
        found = plain(*args)
        marks.note("critic")
        return found

    own._critic_step = critic_step  # type: ignore[method-assign]
    with trainer:
        trainer.start()
        while trainer.has_steps():
            prompts = trainer.next_prompts()
            with marks.phase("rollout"):
                rollouts = trainer.generate(prompts)
            with marks.phase("scoring"):
                rewarded = trainer.reward(prompts, rollouts)
                experience = trainer.make_experience(prompts, rollouts, rewarded)
            with marks.phase("training"):
                trainer.learn(experience)
            with marks.phase("saving"):
                trainer.after_step(experience)
            assert {len(r.completion) for r in rollouts} == {recipe.rollout.max_tokens}
    print(json.dumps({"base": marks.base, "phases": marks.phases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train one step again from its dump, without rollouts and rewards: the same gradient norm.

For looking into a step on another machine, and as a proof that nothing but the dump and the
weights before the step decides what the step does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sterna.align.build import build
from sterna.align.config import RlRecipe
from sterna.align.dump import read_dump


@dataclass(frozen=True, slots=True)
class Replay:
    """What a step logged when it was made, and now."""

    then: Mapping[str, float]
    now: Mapping[str, float]

    @property
    def is_identical(self) -> bool:
        """The same gradient norm and loss, to the bit."""
        return all(self.then[name] == self.now[name] for name in ("grad_norm", "loss"))


def replay(recipe: RlRecipe, dump: Path) -> Replay:
    """Replay `dump` on the newest checkpoint of `recipe.run.output`, the weights before its step.

    Nothing is written. Errors as `align_rl`; TrainError for a file that is no dump.
    """
    experience, figures = read_dump(dump)
    with build(recipe, resume=True) as trainer:
        trainer.start()
        return Replay(figures, trainer.relearn(experience))

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
from sterna.align.rlstate import restore
from sterna.core.errors import TrainError
from sterna.train import checkpoint

# The critic's are all there are of a step that warms it up.
_PROOF = ("grad_norm", "loss", "value_grad_norm", "value_loss")


@dataclass(frozen=True, slots=True)
class Replay:
    """What a step logged when it was made, and now."""

    then: Mapping[str, float]
    now: Mapping[str, float]

    @property
    def is_identical(self) -> bool:
        """The same gradient norms and losses, to the bit."""
        return all(self.then[name] == self.now[name] for name in _PROOF if name in self.then)


def replay(recipe: RlRecipe, dump: Path) -> Replay:
    """Replay `dump` on the checkpoint of `recipe.run.output` that was saved before its step.

    Nothing is written. Errors as `align_rl`; TrainError for a file that is no dump, or without that
    checkpoint.
    """
    experience, figures = read_dump(dump)
    before = _before(dump, recipe.run.output / "checkpoints")
    with build(recipe, at=before) as trainer:
        restore(before, trainer)
        return Replay(figures, trainer.relearn(experience))


def _before(dump: Path, folder: Path) -> Path:
    try:
        step = checkpoint.step_of(dump.with_suffix(""))
    except ValueError as error:
        raise TrainError(f"{dump}: its name says no step; a dump is step-NUMBER") from error
    found = checkpoint.folder_of(folder, step - 1)
    if fault := checkpoint.faults(found):
        kept = ", ".join(path.name for path in checkpoint.checkpoints(folder)) or "none"
        raise TrainError(
            f"step {step} is replayed on the checkpoint before it, {found} ({fault}; complete: "
            f"{kept}); replay a step after one of those, or run with checkpoint.every = 1"
        )
    return found

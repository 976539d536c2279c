"""`align_pipeline(recipe)`: the three steps of an alignment, one after the other.

    from sterna.align.pipeline.config import AlignRecipe
    from sterna.align.pipeline.run import align_pipeline

    result = align_pipeline(AlignRecipe.model_validate(values))
    print(result.model)

A finished step is skipped and one under way goes on from its own checkpoint, bit by bit on a CPU;
so a run killed at any point ends, once it is resumed, with the bits of one that was not.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from sterna.align.config import RlRecipe
from sterna.align.memory.steps import check_steps
from sterna.align.offline.config import OfflineRecipe
from sterna.align.offline.task import choose_task
from sterna.align.pipeline.compare import Comparison, compare_models
from sterna.align.pipeline.config import AlignRecipe
from sterna.align.pipeline.outcome import Outcome, outcome_of
from sterna.align.pipeline.record import FILE, check_same, read_record, record_of, weights_hash
from sterna.align.pipeline.report import write_report
from sterna.align.ranks import on_main
from sterna.align.rl import align_rl
from sterna.core.errors import ConfigError
from sterna.core.log import get_logger
from sterna.core.rundir import FolderLock, write_atomic
from sterna.parallel.config import ParallelConfig
from sterna.parallel.mesh import Mesh, close_mesh, open_mesh
from sterna.train import checkpoint
from sterna.train.loop import train
from sterna.train.recipe import to_toml
from sterna.train.report import Generate

_log = get_logger(__name__)
StepOutcome = Literal["done", "data ended", "stopped early", "interrupted", "terminated"]
_CUT_SHORT = ("interrupted", "terminated")


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """Where the run stands. `outcome` is "done" when every step that was asked for is finished."""

    outcome: StepOutcome
    step: str  # the last one that ran or was skipped
    output: Path
    model: Path  # of that step
    table: Outcome | None  # None for a run cut short


def align_pipeline(
    recipe: AlignRecipe, *, resume: bool = False, generate: Generate | None = None
) -> PipelineResult:
    """Run the steps of a recipe and say what came of them.

    `resume` skips finished steps and goes on with one that was cut short. `generate` answers the
    sample prompts of the reports. SIGINT and SIGTERM end the run after the current training step,
    with a checkpoint. Under torchrun every rank calls this and gets the same result.

    Raises what the steps raise, and ConfigError for a step over its memory budget, made by another
    recipe, without the models it begins with, or a folder that another process works in.
    """
    timeout_s = recipe.rl.run.timeout_s if recipe.rl is not None else 1800.0
    owns_mesh = not dist.is_initialized()
    mesh = open_mesh(ParallelConfig.model_validate({"timeout_s": timeout_s}), recipe.model.device)
    lock = FolderLock(recipe.run.output)
    try:
        on_main(mesh, lambda: _open(recipe, lock))
        return _run(recipe, resume, generate, mesh)
    finally:
        lock.release()
        if owns_mesh:
            close_mesh()


def _open(recipe: AlignRecipe, lock: FolderLock) -> None:
    """ConfigError for a plan over its budget, or a folder in use."""
    check_steps(recipe)
    output = recipe.run.output
    output.mkdir(parents=True, exist_ok=True)
    if not lock.take():
        raise ConfigError(f"another process aligns into {output}; give another run.output")
    write_atomic(output / "recipe.toml", to_toml(recipe))


def _run(
    recipe: AlignRecipe, resume: bool, generate: Generate | None, mesh: Mesh
) -> PipelineResult:
    step = ""
    for step in recipe.chosen():
        outcome = _run_step(recipe, step, resume, generate, mesh)
        gc.collect()  # a trainer is part of a cycle; the next step needs its memory
        if outcome in _CUT_SHORT:
            return _result(recipe, step, outcome, None)
    return _result(recipe, step, "done", on_main(mesh, lambda: _told(recipe)))


def _told(recipe: AlignRecipe) -> Outcome:
    """What came of it, written down."""
    found = outcome_of(recipe, _compared(recipe))
    write_atomic(recipe.run.output / "outcome.json", found.to_json())
    write_report(recipe, found)
    return found


def _result(
    recipe: AlignRecipe, step: str, outcome: StepOutcome, table: Outcome | None
) -> PipelineResult:
    model = recipe.folder(step) / "model"
    return PipelineResult(outcome, step, recipe.run.output, model, table)


def _run_step(
    recipe: AlignRecipe, step: str, resume: bool, generate: Generate | None, mesh: Mesh
) -> StepOutcome:
    """Run it, go on with it, or leave it as it is. All ranks train; the first one keeps books."""
    has_begun = on_main(mesh, lambda: _begin(recipe, step, resume))
    if has_begun is None:
        return "done"
    outcome = _train(recipe.recipe(step), has_begun, generate)
    if outcome not in _CUT_SHORT:
        on_main(mesh, lambda: _end(recipe, step))
    return outcome


def _begin(recipe: AlignRecipe, step: str, resume: bool) -> bool | None:
    """Whether the step goes on from a checkpoint of its own; None for a finished one."""
    folder, now = recipe.folder(step), record_of(recipe, step)
    before = read_record(folder)
    if before is not None:
        if not resume:
            raise ConfigError(
                f"{folder / FILE} says that this step has begun already; go on with --resume "
                "(finished steps are kept), or give another run.output",
                param="run.output",
            )
        check_same(recipe, step, before, now)
        if before.weights is not None:
            _log.info("%s is finished", folder)
            return None
    now.save(folder)
    _log.info("step %s in %s", step, folder)
    return resume and checkpoint.newest(folder / "checkpoints") is not None


def _end(recipe: AlignRecipe, step: str) -> None:
    folder, now = recipe.folder(step), record_of(recipe, step)
    replace(now, weights=weights_hash(folder / "model")).save(folder)


def _train(recipe: object, resume: bool, generate: Generate | None) -> StepOutcome:
    if isinstance(recipe, RlRecipe):
        return align_rl(recipe, resume=resume).outcome
    if isinstance(recipe, OfflineRecipe):
        return train(recipe, resume=resume, task=choose_task(recipe)).outcome
    return train(recipe, resume=resume, generate=generate).outcome  # type: ignore[arg-type]


def _compared(recipe: AlignRecipe) -> Comparison | None:
    """Step 3's model beside the one it began with; None where there is none, or none is asked."""
    record = read_record(recipe.folder("rl")) if recipe.rl is not None else None
    if recipe.rl is None or record is None or record.weights is None:
        return None
    return compare_models(recipe.rl, recipe.compare) if recipe.compare.prompts else None

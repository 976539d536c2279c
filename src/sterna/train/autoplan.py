"""`longseq.auto`: the planner chooses for a run, and chooses again when memory did not suffice."""

from __future__ import annotations

import torch

from sterna.core.errors import TrainError
from sterna.core.log import get_logger
from sterna.core.machine import available_memory_bytes
from sterna.model.hf import HFDecoder
from sterna.parallel.collectives import total
from sterna.parallel.mesh import Mesh
from sterna.train.config import Recipe
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.foreign_proof import experts_of
from sterna.train.memory import Job, Layout, Shape, estimate
from sterna.train.parts import Parts
from sterna.train.plan import GIB, MEMORY_ERROR, ladder, replan

_log = get_logger(__name__)


def is_chosen(settings: LongseqSection) -> bool:
    """Whether the settings say something beside `auto`."""
    return bool(settings.model_dump(exclude_defaults=True, exclude={"auto", "folder"}))


def chosen(recipe: Recipe, shape: Shape, mesh: Mesh, shards: int) -> LongseqSection:
    """The fastest rung whose predicted peak fits into the memory that is free now.

    The most frugal one, with a warning, when none does. All ranks call it and choose alike, by the
    rank with the least: their collectives must meet.
    """
    job, sp = job_of(recipe), mesh.sp.size
    mine = torch.tensor(free_memory(recipe.model.device), dtype=torch.float64, device=mesh.device)
    free = float(total(mine, mesh.data, "min"))
    away = recipe.offload
    rungs = list(ladder(recipe.model.device != "cpu", True, shards > 1, shape.has_experts))
    rungs = [rung for rung in rungs if rung.checkpoint or away.weights == "memory"]
    for settings in rungs:
        peak = estimate(shape, job, settings, Layout(sp, shards), away).peak * (1 + MEMORY_ERROR)
        if peak <= free:
            said = settings.model_dump(exclude_defaults=True) or "nothing"
            _log.info("longseq.auto: %s, %.1f of %.1f GiB", said, peak / GIB, free / GIB)
            return _as_auto(settings, recipe)
    _log.warning(
        "longseq.auto: the most frugal settings need %.1f GiB and %.1f are free; trying them",
        peak / GIB, free / GIB,
    )  # fmt: skip
    return _as_auto(rungs[-1], recipe)


def _as_auto(settings: LongseqSection, recipe: Recipe) -> LongseqSection:
    return settings.model_copy(update={"auto": True, "folder": recipe.longseq.folder})


def job_of(recipe: Recipe) -> Job:
    """What a recipe trains at once."""
    return Job(
        tokens=recipe.data.seq_len * recipe.run.micro_rows,
        dtype_bytes=2 if recipe.model.dtype == "bfloat16" else 4,
        states=recipe.optim.states,
        has_master=recipe.optim.master,
        sums_micros=recipe.run.rows_per_step > recipe.run.micro_rows,
        longest=recipe.data.seq_len,
    )


def free_memory(device: str) -> float:
    """Bytes that may still be taken."""
    if device == "cpu":
        return float(available_memory_bytes())
    return float(torch.cuda.mem_get_info(device)[0])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text
    )


def more_frugal(parts: Parts, error: BaseException) -> Recipe | None:
    """The recipe of a run that failed, on the next rung.

    None where that cannot help: another error, not asked for, or the last rung. TrainError with
    more than one rank: the others are at work on the step and would wait for this one forever.
    """
    recipe, shards = parts.recipe, parts.shards.size
    if not recipe.longseq.auto or not is_out_of_memory(error):
        return None
    has_experts = isinstance(parts.model, HFDecoder) and bool(experts_of(parts.model))
    is_gpu = recipe.model.device != "cpu"
    found = replan(recipe.longseq, is_gpu, True, shards > 1, has_experts)
    if found is None:
        return None
    said = found.model_dump(exclude_defaults=True, exclude={"auto", "folder"})
    if parts.mesh.world > 1:
        raise TrainError(
            f"out of memory on rank {parts.mesh.rank} of {parts.mesh.world}; longseq.auto goes on "
            f"by itself on one rank only. Set [longseq] to {said} or more frugal, and continue "
            "with --resume",
            param="longseq",
        ) from error
    _log.warning("out of memory; longseq.auto goes on with %s from the last checkpoint", said)
    settings = found.model_copy(update={"auto": True})
    return recipe.model_copy(update={"longseq": settings})

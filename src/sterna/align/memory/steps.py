"""Plans of recipes: reinforcement learning, training, or the three steps of a pipeline.

A step's models may not exist yet: the sizes of what an earlier step leaves are those of the model
that it starts from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sterna.align.config import RlRecipe
from sterna.align.memory.fit import Budget, Change, RlPlan, lacks, plan_rl
from sterna.align.memory.held import Held, Locate, Origin, config_of, located, parts_of, states_of
from sterna.align.memory.phases import Needs
from sterna.align.memory.start import budget_of, told
from sterna.align.memory.work import Load, update_parts
from sterna.align.offline.config import OfflineRecipe
from sterna.align.pipeline.config import AlignRecipe
from sterna.align.pipeline.inherit import model_of_step
from sterna.core.errors import ConfigError, UnsupportedModelError
from sterna.model.load import DTYPES
from sterna.train.autoplan import job_of
from sterna.train.config import Recipe
from sterna.train.foreign_shape import shape_of_folder
from sterna.train.memory import RUNTIME_BYTES, Layout, estimate
from sterna.train.plan import GIB, MEMORY_ERROR


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's memory. `reasons`: empty where it fits, if need be with `changes`."""

    step: str
    needs: Needs
    changes: Change = field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    proposals: tuple[tuple[Change, float], ...] = ()

    @property
    def peak(self) -> float:
        """Bytes of the device with the margin."""
        return self.needs.peak * (1 + MEMORY_ERROR)


def plan_recipe(recipe: Recipe | RlRecipe | AlignRecipe, budget: Budget) -> list[StepPlan]:
    """One plan a step. Errors of the loaders for unknown models."""
    if isinstance(recipe, AlignRecipe):
        locate = locator(recipe)
        steps = [(step, recipe.recipe(step)) for step in recipe.chosen()]
        return [_plan_step(step, each, budget, locate) for step, each in steps]
    name = "rl" if isinstance(recipe, RlRecipe) else str(recipe.kind)
    return [_plan_step(name, recipe, budget, located)]


def check_steps(recipe: AlignRecipe) -> None:
    """Every step's plan against the stated budget, before the first one begins.

    ConfigError naming the step; nothing without a budget: a step looks at what is free when it
    starts. Step 3 may be adapted then (memory.fit).
    """
    if not recipe.memory.budget_gb:
        return
    budget = budget_of(recipe.memory, recipe.model.device, recipe.run.output)
    for plan in plan_recipe(recipe, budget):
        is_adapted = plan.step == "rl" and recipe.memory.fit == "adapt" and not plan.reasons
        if plan.lacking and not is_adapted:
            words = "; ".join(plan.lacking)
            how = f"; it would fit with {told(plan.changes)}" if plan.changes else ""
            raise ConfigError(
                f"step {plan.step} does not fit into memory.budget_gb ({budget.device / GIB:.2f} "
                f"GiB): {words}{how}. `sterna plan` shows all parts",
                param="memory.budget_gb",
            )


def locator(recipe: AlignRecipe) -> Locate:
    """Where the sizes of the steps' models are."""
    origins: dict[str, Origin] = {}

    def locate(path: str) -> Origin:
        return origins.get(path) or located(path)

    for step in ("sft", "reward"):
        own = getattr(recipe, step)
        if own is not None:
            origins[model_of_step(recipe.run.output, step)] = _left_by(own, locate)
    return locate


def _left_by(recipe: Recipe, locate: Locate) -> Origin:
    start = _start_of(recipe, locate)
    if recipe.adapter is None:
        return start
    return Origin(start.path, parts_of(config_of(start.path), recipe.adapter)[2])


def _start_of(recipe: Recipe, locate: Locate) -> Origin:
    if recipe.model.config is not None:
        return Origin(recipe.model.config)
    return locate(recipe.model.path)


def _plan_step(step: str, recipe: Recipe | RlRecipe, budget: Budget, locate: Locate) -> StepPlan:
    if isinstance(recipe, RlRecipe):
        return _as_step(step, plan_rl(recipe, budget, locate))
    needs = training_needs(recipe, locate)
    lacking = () if recipe.longseq.auto else lacks(needs, budget)
    found: Change = {f"{step}.longseq.auto": True} if lacking else {}
    return StepPlan(step, needs, found, lacking, lacking)


def _as_step(step: str, plan: RlPlan) -> StepPlan:
    return StepPlan(step, plan.needs, plan.changes, plan.lacking, plan.reasons, plan.proposals)


def training_needs(recipe: Recipe, locate: Locate = located) -> Needs:
    """The memory of fine-tuning or of a reward model, with the copy of a save beside it."""
    job = job_of(recipe)
    path = _start_of(recipe, locate).path
    try:
        shape, matrices, adapter = parts_of(config_of(path), recipe.adapter)
    except UnsupportedModelError:  # behind transformers; an adapter there is counted as all weights
        shape, matrices, adapter = shape_of_folder(path, recipe.model.dtype), 0.0, 0.0
    size = DTYPES[recipe.model.dtype].itemsize
    is_adapted = bool(adapter)
    trained = adapter if is_adapted else float(shape.weights)
    states = states_of(recipe.optim, trained, 4 if is_adapted else size)
    own = float(shape.weights * size) + 4 * adapter
    model = Held("model", shape, size, own, matrices, trained, states, is_adapted)
    is_reward = isinstance(recipe, OfflineRecipe) and recipe.kind == "reward"
    if not (is_adapted or is_reward):
        return _whole_needs(recipe, model)
    micros = -(-recipe.run.rows_per_step // recipe.run.micro_rows)
    load = Load(job.tokens, job.tokens, micros, job.longest or job.tokens,
                recipe.model.device != "cpu")  # fmt: skip
    work = update_parts(model, load, has_head=not is_reward, settings=recipe.longseq)
    held = {"weights": own + model.ropes, "optimizer": states, "runtime": float(RUNTIME_BYTES)}
    return Needs(held, {"training": {**work, **_copy(recipe, model)}})


def _whole_needs(recipe: Recipe, model: Held) -> Needs:
    """Of all weights, as train/memory.py counts them."""
    found = estimate(model.shape, job_of(recipe), recipe.longseq, Layout(), recipe.offload)
    states = found.parts["states"]
    beside = {"gradients and activations": found.peak - states, **_copy(recipe, model)}
    away = {"offloaded": found.host}, {"offloaded": found.disk}
    return Needs({"states": states}, {found.peak_moment: beside}, host=away[0], disk=away[1])


def _copy(recipe: Recipe, model: Held) -> dict[str, float]:
    """What a background write reads; on the host where the model is not."""
    is_kept = recipe.checkpoint.is_async and recipe.offload.states == "memory"
    if not is_kept or recipe.model.device != "cpu":
        return {}
    weights = 4 * model.trained if model.is_adapted else model.own
    return {"checkpoint": model.states + weights}

"""Experiment trackers: TensorBoard, MLflow, Weights & Biases. Each is imported when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sterna.core.errors import ConfigError
from sterna.train.config import Recipe
from sterna.train.hooks import EvalStats, Hook, StepStats
from sterna.train.metrics import step_figures
from sterna.train.recipe import flatten

if TYPE_CHECKING:
    from sterna.train.trainer import Trainer


def _eval_figures(stats: EvalStats, prefix: str) -> dict[str, float]:
    return {prefix + name: value for name, value in {"loss": stats.loss, **stats.figures}.items()}


def _import(module: str, package: str, setting: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"log.{setting} is set, but {package} is not installed ({error}); "
            f"`pip install {package}`, or set log.{setting} = false"
        ) from error


def has_tensorboard() -> bool:
    """Whether the package is installed; asks without importing it."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoard(Hook):
    """Scalars under `tensorboard/` of the run; a resumed run replaces what came after."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._module = _import("torch.utils.tensorboard", "tensorboard", "tensorboard")
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the event file."""
        after = trainer.counters.step + 1
        self._writer = self._module.SummaryWriter(str(self._folder), purge_step=after)

    def after_step(self, trainer: Trainer, stats: StepStats) -> None:
        """One scalar a figure."""
        for name, value in step_figures(trainer, stats).items():
            self._writer.add_scalar(f"train/{name}", value, stats.step)

    def on_eval(self, trainer: Trainer, stats: EvalStats) -> None:
        """The eval loss and figures."""
        for name, value in _eval_figures(stats, "eval/").items():
            self._writer.add_scalar(name, value, stats.step)

    def close(self) -> None:
        """Flush."""
        if self._writer is not None:
            self._writer.close()


class MLflow(Hook):
    """Logs to the tracking server that MLflow itself is set up for."""

    def __init__(self, recipe: Recipe) -> None:
        self._mlflow = _import("mlflow", "mlflow", "mlflow")
        self._recipe = recipe

    def on_start(self, trainer: Trainer) -> None:
        """Open a run with the recipe as its parameters."""
        self._mlflow.set_experiment(self._recipe.log.project)
        self._mlflow.start_run(run_name=self._recipe.run.output.name)
        self._mlflow.log_params({key: str(value)[:500] for key, value in flatten(self._recipe)})

    def after_step(self, trainer: Trainer, stats: StepStats) -> None:
        """All figures of the step."""
        self._mlflow.log_metrics(step_figures(trainer, stats), step=stats.step)

    def on_eval(self, trainer: Trainer, stats: EvalStats) -> None:
        """The eval loss and figures."""
        self._mlflow.log_metrics(_eval_figures(stats, "eval_"), step=stats.step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class Wandb(Hook):
    """Logs to Weights & Biases, in the mode that it is set up for."""

    def __init__(self, recipe: Recipe) -> None:
        self._wandb = _import("wandb", "wandb", "wandb")
        self._recipe = recipe
        self._run: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open a run with the recipe as its config."""
        recipe = self._recipe
        self._run = self._wandb.init(
            project=recipe.log.project,
            name=recipe.run.output.name,
            dir=str(recipe.run.output),
            config=recipe.model_dump(mode="json"),
        )

    def after_step(self, trainer: Trainer, stats: StepStats) -> None:
        """All figures of the step."""
        self._run.log(step_figures(trainer, stats), step=stats.step)

    def on_eval(self, trainer: Trainer, stats: EvalStats) -> None:
        """The eval loss and figures."""
        self._run.log(_eval_figures(stats, "eval/"), step=stats.step)

    def close(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.finish()

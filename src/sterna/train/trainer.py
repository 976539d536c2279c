"""The state of a run and the only one who changes it: one method a line of the loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from sterna.core.errors import ConfigError, NonFiniteError
from sterna.core.log import get_logger
from sterna.core.rundir import FolderLock
from sterna.data.pack import PackedRow
from sterna.parallel.collectives import broadcast_object, gather_objects, total
from sterna.parallel.mesh import close_mesh
from sterna.train.baddump import dump_rows, name_rows
from sterna.train.checkpoint import newest, publish
from sterna.train.checkpointer import Checkpointer
from sterna.train.hooks import EvalStats, StepStats
from sterna.train.parts import Parts
from sterna.train.result import Outcome, TrainResult
from sterna.train.schedule import lr_at
from sterna.train.signals import StopSignals
from sterna.train.snapshot import gathered, restore, take_snapshot
from sterna.train.state import Counters
from sterna.train.step import StepLoss
from sterna.train.task import Weights

_log = get_logger(__name__)
_STOPS: dict[str, Outcome] = {"SIGINT": "interrupted", "SIGTERM": "terminated"}


class Trainer:
    """One run. Hooks may read everything; `stop`, `evaluate` and `save` are theirs to call."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.recipe = parts.recipe
        self.mesh = parts.mesh
        self.output = parts.recipe.run.output
        self.counters = Counters()
        self.last: StepStats | None = None
        self.last_eval: EvalStats | None = None
        self.outcome: Outcome | None = None
        self._checkpointer = Checkpointer(
            self.output / "checkpoints", parts.recipe.checkpoint, parts.mesh, self._saved
        )
        self._lock = FolderLock(self.output)
        self._saved_step = -1
        self._data_seconds = 0.0
        self._started = 0.0
        self._norm = 0.0
        self._lr = 0.0
        self._rows: Sequence[PackedRow] = ()
        self._position: dict[str, Any] = {}  # of the loader, before the rows of the step

    def start(self) -> None:
        """Restore the checkpoint that is continued, if any, and tell the hooks."""
        if self.parts.source is not None:
            restore(self.parts.source, self.parts, self.counters)
            self._saved_step = self.counters.step
            _log.info("continuing from %s", self.parts.source)
        for hook in self.parts.hooks:
            hook.on_start(self)

    def steps(self) -> Iterator[list[PackedRow]]:
        """This rank's rows of each step, until the recipe's end, the data's end or a stop."""
        rows = iter(self.parts.loader)
        per_rank = self.recipe.run.rows_per_step // self.mesh.dp.size
        while self.outcome is None:
            if self.counters.step >= self.recipe.run.steps:
                self.stop("done")
                return
            self._started = time.perf_counter()
            self._position = self.parts.loader.state_dict()
            taken = list(islice(rows, per_rank))
            self._data_seconds = time.perf_counter() - self._started
            if not taken:
                self.stop("data ended")
                return
            for hook in self.parts.hooks:
                hook.before_step(self, taken)
            yield taken

    def compute_gradients(self, rows: Sequence[PackedRow]) -> StepLoss:
        """Forward and backward; the loss over all ranks."""
        self._rows = rows
        return self.parts.step.run(rows, self.counters.step)

    def check_finite(self, loss: StepLoss, rows: Sequence[PackedRow]) -> None:
        """NonFiniteError for a NaN or infinite loss or gradient, after dumping the rows.

        The state before the step is saved, so nothing is lost.
        """
        self._norm = float(total(self.parts.step.gradients.square_sum(), self.parts.shards)) ** 0.5
        if np.isfinite(loss.loss) and np.isfinite(self._norm):
            return
        self.parts.step.gradients.clear()
        step, mesh = self.counters.step, self.mesh
        dump = dump_rows(self.output / "bad", step + 1, mesh.rank, rows)
        self._save(self._position)
        self._checkpointer.wait()
        what = f"loss {loss.loss}" if not np.isfinite(loss.loss) else f"gradient norm {self._norm}"
        raise NonFiniteError(
            f"step {step + 1}: {what} in {self._name(rows, loss.bad_micro)}; the step's rows are "
            f"in {dump}, the state before it in {newest(self._checkpointer.parent)}; mend the "
            "sample or lower optim.lr, then start a new run with model.path = that checkpoint"
        )

    def update_weights(self, loss: StepLoss) -> None:
        """Clip, AdamW, EMA; the step is then done."""
        recipe, counters = self.recipe, self.counters
        self._lr = lr_at(counters.step, recipe.optim.lr, recipe.schedule, self.parts.horizon)
        limit = recipe.optim.grad_clip
        scale = limit / self._norm if limit and self._norm > limit else 1.0
        self.parts.optimizer.step(self.parts.step.gradients, counters.step, self._lr, scale)
        if self.parts.ema is not None:
            self.parts.ema.update(self.parts.optimizer)
        counters.step += 1
        counters.num_tokens += loss.num_tokens
        counters.num_targets += loss.num_targets
        counters.num_rows += recipe.run.rows_per_step

    def after_step(self, loss: StepLoss) -> None:
        """Tell the hooks, which log, evaluate and save."""
        seconds = time.perf_counter() - self._started
        self.counters.seconds += seconds
        self.last = StepStats(
            step=self.counters.step,
            loss=loss.loss,
            grad_norm=self._norm,
            lr=self._lr,
            num_tokens=loss.num_tokens,
            num_targets=loss.num_targets,
            seconds=seconds,
            data_seconds=self._data_seconds,
            model_flops=self.parts.flops.of(self._rows) * self.mesh.dp.size,
            figures=loss.figures,
        )
        for hook in self.parts.hooks:
            hook.after_step(self, self.last)
        self._checkpointer.poll()

    def heed(self, signals: StopSignals) -> None:
        """End the run when some rank was asked to."""
        caught = torch.tensor(int(signals.caught or 0), device=self.mesh.device)
        number = int(total(caught, self.mesh.data, "max"))
        if number:
            self.stop(
                _STOPS.get(signals.caught.name if signals.caught else "SIGTERM", "terminated")
            )

    def stop(self, outcome: Outcome) -> None:
        """End the run after this step; the first reason counts."""
        self.outcome = self.outcome or outcome

    def evaluate(self) -> EvalStats | None:
        """Loss on the held-out rows, of averaged weights where kept; None without such rows."""
        if not self.parts.eval_rows:
            return None
        started, counters = time.perf_counter(), self.counters
        with self.parts.ema.in_place() if self.parts.ema is not None else nullcontext():
            found = self.parts.step.evaluate(self.parts.eval_rows)
        loss = found.loss
        least = counters.best_loss
        is_best = least is None or loss < least - self.recipe.eval.min_delta
        if is_best:
            counters.best_loss, counters.best_step = loss, counters.step
        counters.evals_since_best = 0 if is_best else counters.evals_since_best + 1
        seconds = time.perf_counter() - started
        self.last_eval = EvalStats(
            counters.step, loss, found.num_targets, seconds, is_best, found.figures
        )
        for hook in self.parts.hooks:
            hook.on_eval(self, self.last_eval)
        return self.last_eval

    def save(self) -> None:
        """Write a checkpoint of the state as it is; nothing when this step has one."""
        self._save(self.parts.loader.state_dict())

    def _save(self, position: dict[str, Any]) -> None:
        if self._saved_step == self.counters.step:
            return
        self._saved_step = self.counters.step
        snapshot = take_snapshot(self.parts, self.counters, position)
        self._checkpointer.save(snapshot, self.counters.best_step)
        if self.parts.optimizer.is_offloaded:  # the snapshot is what the next step changes
            self._checkpointer.wait()

    def _saved(self, folder: Path) -> None:
        for hook in self.parts.hooks:
            hook.on_save(self, folder)

    def _name(self, rows: Sequence[PackedRow], micro: int | None) -> str:
        """The documents of the micro-batch at fault, or of the step, of every rank at fault.

        The n-th row of rank r is row n * dp + r of the stream. All ranks call it.
        """
        size, dp = self.recipe.run.micro_rows, self.mesh.dp
        low, high = (0, len(rows)) if micro is None else (micro * size, (micro + 1) * size)
        first = self.counters.num_rows + low * dp.size + dp.rank
        own = (micro is not None, name_rows(rows[low:high], first, dp.size))
        found = gather_objects(own, self.mesh.data)
        at_fault = [name for is_bad, name in found if is_bad] or [name for _, name in found]
        return "; ".join(dict.fromkeys(at_fault))

    def finish(self) -> TrainResult:
        """Save the end, write the final model, tell the hooks."""
        if self.mesh.is_main and (lost := self.parts.loader.counts.lost()):
            _log.warning("data: %s", lost)
        self.save()
        self._checkpointer.wait()
        latest = newest(self._checkpointer.parent)
        self._publish(latest)
        for hook in self.parts.hooks:
            hook.on_end(self)
        return TrainResult(
            outcome=self.outcome or "done",
            steps=self.counters.step,
            loss=self.last.loss if self.last else None,
            eval_loss=self.last_eval.loss if self.last_eval else None,
            output=self.output,
            model=self.output / "model",
            checkpoint=latest,
        )

    def _publish(self, latest: Path | None) -> None:
        """Write the final model: averaged where there is an average, merged where adapted."""
        task, model, ema = self.parts.task, self.parts.model, self.parts.ema
        with ema.in_place() if ema is not None else nullcontext():
            own = task.final(model)
            final = task.weights(model) if own is None and ema is not None else own
            if final is not None:
                tensors = gathered(final.tensors, self.mesh)
                final = Weights(tensors.items(), final.config, final.files)
        if latest is None or not self.mesh.is_main:
            return
        publish(latest, self.output / "model", final, self.parts.files)
        if own is not None:
            publish(latest, self.output / "adapter")

    def __enter__(self) -> Trainer:
        """Keep the run's folder to this run. ConfigError while another process writes there."""
        is_ours = not self.mesh.is_main or self._lock.take()
        if not broadcast_object(is_ours, self.mesh.data):
            self.__exit__(None, None, None)
            raise ConfigError(
                f"another process is training into {self.output}; wait for it, or give another "
                "run.output",
                param="run.output",
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self.parts.hooks:
            hook.close()
        self._checkpointer.close()
        self._lock.release()
        self.parts.loader.close()
        if self.parts.owns_mesh:
            close_mesh()

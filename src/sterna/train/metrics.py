"""metrics.jsonl: one JSON object a line, appended as it happens.

    {"kind": "step", "step": 12, "loss": ..., "grad_norm": ..., "lr": ..., "tokens_per_s": ..., ...}
    {"kind": "eval", "step": 100, "loss": ..., "targets": ...}

A line is one write, so a killed run leaves at most one torn line. A resumed run first drops it and
every line of steps after its checkpoint: each step is in the file once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sterna.core.rundir import write_atomic
from sterna.train.hooks import EvalStats, Hook, StepStats

if TYPE_CHECKING:
    from sterna.train.trainer import Trainer

FILE = "metrics.jsonl"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; a torn last line is left out."""
    if not path.exists():
        return
    for line in path.read_text().split("\n"):  # splitlines would cut texts at U+2028 and its kin
        try:
            yield json.loads(line)
        except ValueError:
            continue


def step_figures(trainer: Trainer, stats: StepStats) -> dict[str, float]:
    """The figures of a step that are logged: of all ranks together, memory of this one."""
    seconds = max(stats.seconds, 1e-9)
    return {
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": stats.lr,
        "tokens": stats.num_tokens,
        "targets": stats.num_targets,
        "seconds": round(stats.seconds, 6),
        "data_seconds": round(stats.data_seconds, 6),
        "tokens_per_s": round(stats.num_tokens / seconds, 1),
        "mfu": stats.model_flops / seconds / trainer.parts.peak_flops,
        "memory_gib": memory_bytes(trainer.mesh.device) / 2**30,
        **stats.figures,
    }


def memory_bytes(device: torch.device) -> int:
    """Peak memory of the device, or what this process has in RAM (its own pages) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


class MetricsFile(Hook):
    """Appends to metrics.jsonl of the run; the main rank only."""

    def __init__(self, folder: Path, every: int) -> None:
        self._path = folder / FILE
        self._every = every

    def on_start(self, trainer: Trainer) -> None:
        """Drop what a killed run logged after the checkpoint that is continued."""
        last = trainer.counters.step or -1  # a run from the beginning keeps nothing
        kept = [line for line in read_metrics(self._path) if line["step"] <= last]
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def after_step(self, trainer: Trainer, stats: StepStats) -> None:
        """A line every `every` steps."""
        if stats.step % self._every == 0:
            self._append("step", stats.step, step_figures(trainer, stats))

    def on_eval(self, trainer: Trainer, stats: EvalStats) -> None:
        """A line."""
        figures = {"loss": stats.loss, "targets": stats.num_targets, "seconds": stats.seconds}
        self._append("eval", stats.step, {**figures, **stats.figures})

    def _append(self, kind: str, step: int, figures: dict[str, float]) -> None:
        line = json.dumps({"kind": kind, "step": step, **figures}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

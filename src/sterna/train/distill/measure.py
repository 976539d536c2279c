"""What the held-out rows say: a student beside its teacher, drafts beside the text.

After every eval one more line goes to distill.jsonl of the run; the file is read for the report and
by the quality gate. A resumed run drops the lines after its checkpoint.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sterna.core.log import get_logger
from sterna.core.rundir import write_atomic
from sterna.data.pack import IGNORE, PackedRow
from sterna.kernels import ops
from sterna.parallel.collectives import total
from sterna.parallel.mesh import Mesh
from sterna.parallel.shard_rows import shard_batch
from sterna.train.distill.speculator import Acceptance, SpeculatorPair, acceptance
from sterna.train.distill.swiftkv import SwiftKVPair
from sterna.train.hooks import EvalStats, Hook
from sterna.train.metrics import read_metrics
from sterna.train.step import as_batch

if TYPE_CHECKING:
    from sterna.train.trainer import Trainer

FILE = "distill.jsonl"
_log = get_logger(__name__)
_ROWS = 512  # logits of teacher and student at a time


@dataclass(frozen=True, slots=True)
class StudentQuality:
    """Means over the held-out trained tokens; losses and KL in nats, accuracies as shares.

    `accuracy_error`: standard error of the difference of the two accuracies, over tokens.
    """

    num_tokens: int
    teacher_loss: float
    student_loss: float
    kl: float
    teacher_accuracy: float
    student_accuracy: float
    agreement: float
    accuracy_error: float

    @property
    def drop(self) -> float:
        """Points of accuracy that the student is below its teacher."""
        return 100 * (self.teacher_accuracy - self.student_accuracy)

    @property
    def loss_rise(self) -> float:
        """Percent by which the student's loss is above its teacher's."""
        return 100 * (self.student_loss / self.teacher_loss - 1)


@torch.no_grad()
def student_quality(pair: SwiftKVPair, rows: Sequence[PackedRow], mesh: Mesh) -> StudentQuality:
    """Compare student and teacher on rows; over all ranks."""
    sums = torch.zeros(7, dtype=torch.float64, device=pair.device)
    for row in rows:
        batch, targets = shard_batch(*as_batch([row], mesh.device, mesh.sp.size), mesh.sp)
        (_, student), (_, teacher) = pair.both(batch)
        at = (targets != IGNORE).nonzero().flatten()
        for some in torch.split(at, _ROWS):
            sums += _compare(pair, student[some], teacher[some], targets[some])
    count, *means = total(sums, mesh.data).tolist()
    teacher_loss, student_loss, kl, right_t, right_s, same = (x / max(count, 1.0) for x in means)
    return StudentQuality(
        num_tokens=int(count),
        teacher_loss=teacher_loss,
        student_loss=student_loss,
        kl=kl,
        teacher_accuracy=right_t,
        student_accuracy=right_s,
        agreement=same,
        # Only tokens on which the two differ carry the difference; at most all of those do.
        accuracy_error=math.sqrt(max(0.0, 1 - same) / max(count, 1.0)),
    )


def _compare(pair: SwiftKVPair, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    weight, cap = pair.head_weight(), pair.config.logits_softcap
    z_s, z_t = (ops.logits(h.contiguous(), weight, len(weight), cap) for h in (student, teacher))
    log_q, log_p = torch.log_softmax(z_s, -1), torch.log_softmax(z_t, -1)
    wanted, best_s, best_t = targets[:, None], log_q.argmax(-1), log_p.argmax(-1)
    sums = (
        torch.tensor(float(len(targets))),
        -log_p.gather(1, wanted).double().sum(),
        -log_q.gather(1, wanted).double().sum(),
        (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64),
        (best_t == targets).sum(),
        (best_s == targets).sum(),
        (best_s == best_t).sum(),
    )
    return torch.stack([value.double().to(student.device) for value in sums])


class _Measure(Hook, ABC):
    """Appends a line of figures after every eval; subclasses compute them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    @abstractmethod
    def figures(self, trainer: Trainer) -> dict[str, Any]:
        """The figures of the held-out rows. All ranks call it."""

    def on_start(self, trainer: Trainer) -> None:
        """Drop the lines that a killed run wrote after its checkpoint."""
        if trainer.mesh.is_main:
            last = trainer.counters.step or -1
            self._write([line for line in read_metrics(self._path) if line["step"] <= last])

    def on_eval(self, trainer: Trainer, stats: EvalStats) -> None:
        """One line."""
        figures = {"step": stats.step, **self.figures(trainer)}
        if trainer.mesh.is_main:
            lines = [line for line in read_metrics(self._path) if line["step"] != stats.step]
            self._write([*lines, figures])
            text = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float))
            _log.info("step %d: %s", stats.step, text)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in lines))


class MeasureStudent(_Measure):
    """Held-out loss, KL, accuracy of a SwiftKV student and its teacher."""

    def figures(self, trainer: Trainer) -> dict[str, Any]:
        """See StudentQuality."""
        pair = trainer.parts.model
        assert isinstance(pair, SwiftKVPair)
        found = student_quality(pair, trainer.parts.eval_rows, trainer.mesh)
        return {**asdict(found), "drop": found.drop, "loss_rise": found.loss_rise}


class MeasureDrafts(_Measure):
    """Simulated acceptance of a speculator."""

    def figures(self, trainer: Trainer) -> dict[str, Any]:
        """Tokens a verification step yields, and how often each draft is right."""
        pair = trainer.parts.model
        assert isinstance(pair, SpeculatorPair)
        count = pair.speculator.config.num_drafts
        found = Acceptance(0, 0, [0] * count, [0] * count)
        for row in trainer.parts.eval_rows:
            found.add(acceptance(pair, *as_batch([row], trainer.mesh.device)))
        sums = torch.tensor(
            [found.steps, found.tokens, *found.tried, *found.right], device=trainer.mesh.device
        )
        steps, tokens, *rest = total(sums, trainer.mesh.dp).tolist()
        merged = Acceptance(steps, tokens, rest[:count], rest[count:])
        rates = {f"draft_{i + 1}": rate for i, rate in enumerate(merged.rates())}
        return {"tokens_per_step": merged.tokens_per_step, "steps": steps, **rates}


def last_quality(run: Path) -> StudentQuality | None:
    """The last line of a SwiftKV run's file; None when there is none."""
    lines = list(read_metrics(run / FILE))
    if not lines:
        return None
    names = StudentQuality.__dataclass_fields__
    return StudentQuality(**{name: lines[-1][name] for name in names})

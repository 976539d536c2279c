"""What a reward model is worth on pairs it did not see, and on pairs of another kind.

After every eval one line goes to reward.jsonl of the run: figures of the held-out pairs, those of
`reward.out_of_domain` and the calibration of both; the report draws the last one.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from sterna.align.offline.config import OfflineRecipe
from sterna.align.offline.ranking import RewardLoss
from sterna.core.log import get_logger
from sterna.core.rundir import write_atomic
from sterna.data.loader import Loader
from sterna.data.pack import PackedRow
from sterna.text.tokenizer import load_tokenizer
from sterna.train.build import positions_of, tokenizer_path
from sterna.train.curves import draw
from sterna.train.hooks import EvalStats, Hook
from sterna.train.metrics import read_metrics

if TYPE_CHECKING:
    from sterna.train.trainer import Trainer

FILE = "reward.jsonl"
_log = get_logger(__name__)


class MeasureReward(Hook):
    """Writes the file and the report's section."""

    def __init__(self, recipe: OfflineRecipe, loss: RewardLoss) -> None:
        self._recipe = recipe
        self._loss = loss
        self._path = recipe.run.output / FILE
        self._others: list[PackedRow] = []

    def on_start(self, trainer: Trainer) -> None:
        """Read the pairs of another kind; drop lines that a killed run wrote too late."""
        data, mesh = self._recipe.reward.out_of_domain, trainer.mesh
        if data is not None:
            tokenizer = load_tokenizer(tokenizer_path(self._recipe))
            count = -(-self._recipe.eval.max_rows // mesh.dp.size)
            limit = positions_of(self._recipe, trainer.parts.model)
            rank, world = mesh.dp.rank, mesh.dp.size
            own = Loader(data, tokenizer, rank=rank, world=world, max_document=limit)
            with own as loader:
                self._others = list(islice(loader, count))
        if mesh.is_main:
            last = trainer.counters.step or -1
            self._write([line for line in read_metrics(self._path) if line["step"] <= last])

    def on_eval(self, trainer: Trainer, stats: EvalStats) -> None:
        """One line. All ranks evaluate."""
        line: dict[str, Any] = {"step": stats.step, "loss": stats.loss, **stats.figures}
        line["calibration"] = self._loss.calibration
        if self._others:
            found = trainer.parts.step.evaluate(self._others)
            line["out_of_domain"] = {
                "loss": found.loss, "pairs": found.num_targets, **found.figures,
                "calibration": self._loss.calibration,
            }  # fmt: skip
        if trainer.mesh.is_main:
            lines = [one for one in read_metrics(self._path) if one["step"] != stats.step]
            self._write([*lines, line])
            other = line.get("out_of_domain", {}).get("accuracy")
            beside = "" if other is None else f", out of domain {other:.3f}"
            _log.info("step %d: accuracy %.3f%s", stats.step, line.get("accuracy", 0.0), beside)

    def report(self, trainer: Trainer) -> str:
        """The last line's figures and calibration."""
        lines = list(read_metrics(self._path))
        if not lines:
            return ""
        last = lines[-1]
        sets = {"held out": last, "out of domain": last.get("out_of_domain")}
        found = {name: figures for name, figures in sets.items() if figures}
        curves = {
            name: [(sure, right) for sure, right, _ in figures["calibration"]]
            for name, figures in found.items()
        }
        title = "calibration: share right over the probability that was predicted"
        charts = [
            draw(f"{title} ({name})", {"exact": [(0.5, 0.5), (1, 1)], name: points}, "p")
            for name, points in curves.items()
        ]
        rows = "".join(f"<tr><th>{name}</th>{_cells(of)}</tr>" for name, of in found.items())
        head = "".join(f"<th>{name}</th>" for name in ("pairs", *_SHOWN))
        table = f"<table><tr>{head}</tr>{rows}</table>"
        return f"<h2>Ranking of answers</h2>{table}<div class=charts>{''.join(charts)}</div>"

    def _write(self, lines: list[dict[str, Any]]) -> None:
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in lines))


_SHOWN = ("loss", "accuracy", "margin", "rewards/chosen", "rewards/rejected", "ece")


def _cells(figures: dict[str, Any]) -> str:
    return "".join(f"<td>{figures[name]:.4f}</td>" for name in _SHOWN if name in figures)

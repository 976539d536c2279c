"""What came of a pipeline, read from the files of its steps: one table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sterna.align.offline.measure import FILE as REWARD_FILE
from sterna.align.pipeline.compare import Comparison
from sterna.align.pipeline.config import AlignRecipe
from sterna.train.metrics import FILE, read_metrics

Row = tuple[str, str, str]  # what, before step 3, after


@dataclass(frozen=True, slots=True)
class Outcome:
    """None where a step is not there, or nothing was held out."""

    sft_loss: float | None  # held out
    reward_accuracy: float | None  # of held-out pairs
    reward_margin: float | None
    reward_ece: float | None
    comparison: Comparison | None

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def rows(self) -> list[Row]:
        """The table."""
        singles = (
            ("step 1: held-out loss", self.sft_loss),
            ("step 2: accuracy on held-out pairs", self.reward_accuracy),
            ("step 2: margin between the answers", self.reward_margin),
            ("step 2: calibration error", self.reward_ece),
        )
        found: list[Row] = [
            (what, "", _show(value)) for what, value in singles if value is not None
        ]
        return found + (_compared(self.comparison) if self.comparison is not None else [])


def outcome_of(recipe: AlignRecipe, comparison: Comparison | None) -> Outcome:
    """Of the steps whose folders are there."""
    ranking = _last(recipe.folder("reward") / REWARD_FILE, "accuracy")
    return Outcome(
        sft_loss=_last(recipe.folder("sft") / FILE, "loss", "eval").get("loss"),
        reward_accuracy=ranking.get("accuracy"),
        reward_margin=ranking.get("margin"),
        reward_ece=ranking.get("ece"),
        comparison=comparison,
    )


def _last(path: Path, key: str, kind: str | None = None) -> dict[str, Any]:
    """The last line with a key (of a kind); empty without one."""
    lines = [
        line for line in read_metrics(path) if key in line and kind in (None, line.get("kind"))
    ]
    return lines[-1] if lines else {}


def _compared(found: Comparison) -> list[Row]:
    before, after = found.before, found.after
    rows: list[Row] = [("step 3: reward", _show(before.reward), _show(after.reward))]
    rows += [
        (f"step 3: {name}", _show(value), _show(after.parts[name]))
        for name, value in before.parts.items()
    ]
    rows.append(
        ("step 3: tokens of an answer", _show(before.mean_length), _show(after.mean_length))
    )
    rows.append(("step 3: cut off by length", _show(before.truncated), _show(after.truncated)))
    if found.kl is not None:
        rows.append(("step 3: KL to the start, nats an answer", "0", _show(found.kl)))
    rows.append((f"step 3: win rate by {found.win_metric}", "0.5", _show(found.win_rate)))
    return rows


def _show(value: float) -> str:
    return f"{value:.4g}"

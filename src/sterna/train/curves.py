"""The curves of a run as SVG text, for the report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

Points = Sequence[tuple[float, float]]
_COLORS = ("#2463a6", "#c1571b", "#3b8a4b", "#8a4ba6", "#8c7a1f")
_SPANS = 40  # a running mean reaches back over a 40th of the curve


def smoothed(points: Points) -> list[tuple[float, float]]:
    """An exponential mean over a 40th of the points, corrected for its start (as Adam's)."""
    keep = 1 - 1 / max(1, len(points) / _SPANS)
    mean, weight, result = 0.0, 0.0, []
    for step, value in points:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append((step, mean / weight))
    return result


def draw(title: str, lines: dict[str, Points], x: str = "step") -> str:
    """One chart over `x`, a line a name; those ending in " (raw)" are faint. SVG, no header."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 2.9), layout="constrained")
    axes: Any = figure.subplots()
    shown = [name for name in lines if not name.endswith(" (raw)")]
    for name, points in lines.items():
        color = _COLORS[shown.index(name.removesuffix(" (raw)")) % len(_COLORS)]
        is_raw = name not in shown
        steps, values = [p[0] for p in points], [p[1] for p in points]
        axes.plot(
            steps, values, color=color, linewidth=0.8 if is_raw else 1.6,
            alpha=0.45 if is_raw else 1.0, label=None if is_raw else name,
            marker="o" if len(points) < 3 else None, markersize=3,
        )  # fmt: skip
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if len(shown) > 1:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

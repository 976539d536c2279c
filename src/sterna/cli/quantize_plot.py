"""The error of every weight of a quantised model, as a PNG."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from sterna.quant.report import ModelReport

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def draw_errors(report: ModelReport, path: Path) -> None:
    """Relative error over layers, one line a kind of weight; those outside layers as levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    is_calibrated = any(w.output_error is not None for w in report.weights)
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    levels: dict[str, float] = {}
    for weight in report.weights:
        error = weight.output_error if is_calibrated else weight.weight_error
        match = _LAYER.fullmatch(weight.name)
        if error is None:
            continue
        if match:
            lines[match[2]].append((int(match[1]), error))
        else:
            levels[weight.name] = error
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    for i, (name, error) in enumerate(levels.items()):
        axis.axhline(error, color=f"C{len(lines) + i}", linestyle="--", label=name)
    axis.set_xlabel("layer")
    kind = "output (predicted)" if is_calibrated else "weight"
    axis.set_ylabel(f"relative {kind} error")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.suptitle(f"{report.format}, {report.bits_per_weight:.3f} bits a weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

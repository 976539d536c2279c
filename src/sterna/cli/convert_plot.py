"""How a SwiftKV student came near its teacher while it was distilled, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_student(lines: list[dict[str, Any]], max_drop: float, path: Path) -> None:
    """Held-out accuracy and loss by step beside the teacher's; `lines` as in distill.jsonl.

    The dotted line is the least accuracy that --max-drop lets pass.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    steps = [line["step"] for line in lines]
    for axis, name, unit in ((left, "accuracy", 100.0), (right, "loss", 1.0)):
        for who, style in (("student", "-o"), ("teacher", "--")):
            values = [unit * line[f"{who}_{name}"] for line in lines]
            axis.plot(steps, values, style, markersize=3, label=who)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    least = 100 * lines[-1]["teacher_accuracy"] - max_drop
    left.axhline(least, color="gray", linestyle=":", label=f"--max-drop {max_drop:g}")
    left.set_ylabel("held-out next tokens right, %")
    right.set_ylabel("held-out loss, nats")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

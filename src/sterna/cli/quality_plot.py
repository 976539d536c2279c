"""The picture of `sterna quality`: KL and top-1 agreement by text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sterna.eval.quality import Quality


def draw_quality(found: Mapping[str, Quality], title: str, path: Path) -> None:
    """Two panels of bars with standard errors, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, rows = list(found), list(found.values())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    left.bar(names, [q.kl for q in rows], yerr=[q.kl_se for q in rows], capsize=3)
    left.set_ylabel("mean KL, nats")
    top1 = [100 * q.top1 for q in rows]
    right.bar(names, top1, yerr=[100 * q.top1_se for q in rows], capsize=3, color="C1")
    right.set_ylabel("same most likely token, %")
    right.set_ylim(max(0.0, min(top1) - 10), 100)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""The latency-throughput curve of a sweep, as a PNG (FastGen's figure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sterna.core.errors import SternaError

Curve = Sequence[Mapping[str, Any]]


def draw_curves(
    curves: Mapping[str, Curve],
    path: Path,
    title: str,
    over: tuple[str, str] = ("request_throughput", "requests/s"),
) -> None:
    """One line a system: mean latency, p99 gap and effective throughput over requests/s.

    `over`: key and label of the horizontal axis.

    Raises SternaError when `path` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, results in curves.items():
        rates = [result[over[0]] for result in results]
        for axis, key in zip(axes, ("mean_e2el_ms", "p99_itl_ms"), strict=False):
            axis.plot(rates, [result[key] / 1000 for result in results], marker="o", label=name)
        for sla in results[0]["effective_throughput"]:
            effective = [result["effective_throughput"][sla] for result in results]
            axes[2].plot(rates, effective, marker="o", label=f"{name}, {sla} tok/s")
    labels = ("mean latency (s)", "p99 inter-token gap (s)", "effective requests/s")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(over[1])
        axis.set_ylabel(label)
        top = max(value for line in axis.lines for value in line.get_ydata())
        axis.set_ylim(0, 1.08 * top or 1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # a full disk; an ending that is no picture format
        raise SternaError(f"cannot draw {path}: {error}; give --plot another path") from error
    finally:
        pyplot.close(figure)

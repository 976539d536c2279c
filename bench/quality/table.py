"""The study's Markdown tables and its picture.

    python bench/quality/table.py QUALITY.json [MORE.json ...] [--speeds COMPARE.json]
        [--plot docs/img/quality.png]

Writes the table beside every file. The picture: bits against KL of the first file, and KL against
the decode speed of `bench/compare.py`'s rows. A speed belongs to a format, not to a subject:
compare.py times the default model, which has the same sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from peer import is_peer

from sterna.core.rundir import write_atomic

# compare.py's peers and the quality rows that have their weights.
SPEED_ROWS = {"sterna-fp6": "fp6/rtn", "llamacpp-q6_k": "Q6_K", "llamacpp-q4_0": "Q4_0"}

_COLOURS = {"o": "C0", "s": "C1", "^": "C2"}


def markdown(report: dict[str, Any]) -> str:
    """Rows by falling bits; KL by domain with the error of the mean over windows."""
    names = report["protocol"]["domains"]
    head = ["row", "bits a weight", "KL", "KL p99", "top-1", "ln PPL ratio",
            *(f"KL {name}" for name in names)]  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for name, row in sorted(report["rows"].items(), key=lambda item: -item[1]["bits_per_weight"]):
        q = row["domains"]["all"]
        lines.append(_line([
            f"llama.cpp {name}" if is_peer(name.split("/")[0]) else name,
            f"{row['bits_per_weight']:.3f}", f"{q['kl']:.5f} ± {q['kl_se']:.5f}",
            f"{q['kl_p99']:.3f}", f"{q['top1']:.1%}",
            f"{q['ln_ratio']:+.4f} ± {q['ln_ratio_se']:.4f}",
            *(f"{row['domains'][d]['kl']:.5f}" for d in names),
        ]))  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(report: dict[str, Any], speeds: dict[str, float], path: Path) -> None:
    """Bits against mean KL over all domains, both methods and llama.cpp; KL against tokens/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(14, 6), width_ratios=(5, 2), sharey=True, layout="constrained"
    )
    for series, marker, picked in _series(report["rows"]):
        _points(left, series, marker, {n: row["bits_per_weight"] for n, row in picked.items()},
                picked)  # fmt: skip
        fast = {name: speeds[name] for name in picked if name in speeds}
        _points(right, series, marker, fast, {name: picked[name] for name in fast})
    left.set_yscale("log")
    left.set_xlabel("bits a weight, all included")
    left.set_ylabel("mean KL to bfloat16, nats")
    right.set_xlabel("decode of one stream, tokens/s")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    left.legend()
    left.margins(x=0.08)
    right.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _points(axis: Any, label: str, marker: str, x: dict[str, float], rows: dict[str, Any]) -> None:
    if not rows:
        return
    found = [row["domains"]["all"] for row in rows.values()]
    y, error = [q["kl"] for q in found], [q["kl_se"] for q in found]
    color = _COLOURS[marker]
    axis.errorbar(list(x.values()), y, yerr=error, fmt=marker, label=label, capsize=2, color=color)
    for name, kl in zip(rows, y, strict=True):
        # Six bits are crowded: rounding to the left, a budget below its neighbour.
        side = -1 if marker == "o" else 1
        down = -9 if name.startswith("bits=") else 3
        axis.annotate(name.split("/")[0], (x[name], kl), fontsize=7, color=color,
                      xytext=(6 * side, down), textcoords="offset points",
                      ha="right" if side < 0 else "left")  # fmt: skip


def _series(rows: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, marker, rows) of round to nearest, GPTQ and llama.cpp's kernels."""
    kinds = (("round to nearest", "o", "rtn"), ("GPTQ", "s", "gptq"))
    found = [(label, marker, {n: r for n, r in rows.items() if n.split("/")[1:] == [method]})
             for label, marker, method in kinds]  # fmt: skip
    return [*found, ("llama.cpp", "^", {n: r for n, r in rows.items() if is_peer(n)})]


def main() -> int:
    """Tables of all files, the picture of the first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--speeds", type=Path, help="a result of bench/compare.py with decode")
    parser.add_argument("--plot", type=Path, default=Path("docs/img/quality.png"))
    args = parser.parse_args()
    reports = [json.loads(file.read_text()) for file in args.files]
    for file, report in zip(args.files, reports, strict=True):
        write_atomic(file.with_suffix(".md"), markdown(report))
    decode = json.loads(args.speeds.read_text())["medians"]["decode"] if args.speeds else {}
    speeds = {SPEED_ROWS[peer]: speed for peer, speed in decode.items() if peer in SPEED_ROWS}
    plot(reports[0], speeds, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

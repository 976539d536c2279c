"""The study's Markdown table and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer import is_peer


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


def plot(report: dict[str, Any], path: Path) -> None:
    """Bits against mean KL over all domains, both methods and llama.cpp, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for series, marker, picked in _series(report["rows"]):
        x = [row["bits_per_weight"] for row in picked.values()]
        q = [row["domains"]["all"] for row in picked.values()]
        y, error = [d["kl"] for d in q], [d["kl_se"] for d in q]
        axis.errorbar(x, y, yerr=error, fmt=marker, label=series, capsize=2)
        for name, bits, kl in zip(picked, x, y, strict=True):
            axis.annotate(name.split("/")[0], (bits, kl), fontsize=7,
                          xytext=(4, 3), textcoords="offset points")  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("bits a weight, all included")
    axis.set_ylabel("mean KL to bfloat16, nats")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _series(rows: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, marker, rows) of round to nearest, GPTQ and llama.cpp's kernels."""
    kinds = (("round to nearest", "o", "rtn"), ("GPTQ", "s", "gptq"))
    found = [(label, marker, {n: r for n, r in rows.items() if n.split("/")[1:] == [method]})
             for label, marker, method in kinds]  # fmt: skip
    return [*found, ("llama.cpp", "^", {n: r for n, r in rows.items() if is_peer(n)})]

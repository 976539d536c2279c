"""The medians of a comparison as one markdown table, Sterna against the best peer."""

from __future__ import annotations

from typing import Any

# figure -> (title, whether more is better)
ROWS = {
    "decode": ("decode, one stream (tok/s)", True),
    "prefill_512": ("prefill 512 (tok/s)", True),
    "prefill_2048": ("prefill 2,048 (tok/s)", True),
    "batch_16_decode": ("16 streams, decode only (tok/s)", True),
    "batch_16_end_to_end": ("16 streams 128+64, end to end (tok/s)", True),
    "batch_32_decode": ("32 streams, decode only (tok/s)", True),
    "batch_32_end_to_end": ("32 streams 128+64, end to end (tok/s)", True),
    "first_token_s": ("start to first token (s)", False),
    "server_output_throughput": ("server, closed loop of 8 (tok/s)", True),
    "server_p99_itl_ms": ("server, p99 gap (ms)", False),
    "server_median_ttft_ms": ("server, median TTFT (ms)", False),
}
OURS = "sterna"


def as_markdown(result: dict[str, Any]) -> str:
    """The whole page: machine, versions, table, output check."""
    medians = result["medians"]
    names = list(dict.fromkeys(name for by_peer in medians.values() for name in by_peer))
    lines = [
        f"Measured {result['date']} on {_machine(result['machine'])}; cores {result['cores']}, "
        f"{result['repeats']} interleaved repeats, medians.",
        "",
        "| | " + " | ".join(names) + " | Sterna / best peer |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for figure, (title, is_more_better) in ROWS.items():
        if figure in medians:
            lines.append(_row(title, medians[figure], names, is_more_better))
    lines += ["", *_notes(result)]
    return "\n".join(lines) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['num_cpus']} CPUs, {machine['memory_gib']:.0f} GiB"


def _row(title: str, by_peer: dict[str, float], names: list[str], is_more_better: bool) -> str:
    cells = [_number(by_peer[name]) if name in by_peer else "-" for name in names]
    return f"| {title} | " + " | ".join(cells) + f" | {_ratio(by_peer, is_more_better)} |"


def _ratio(by_peer: dict[str, float], is_more_better: bool) -> str:
    ours = [value for name, value in by_peer.items() if name.startswith(OURS)]
    others = [value for name, value in by_peer.items() if not name.startswith(OURS)]
    if not ours or not others:
        return "-"
    best = max(others) if is_more_better else min(others)
    return f"{ours[0] / best:.2f}x"  # the first of ours that was named


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _notes(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, finding in result.get("sanity", {}).items():
        lines.append(f"- {name}: {finding['equal_tokens']} leading greedy tokens equal Sterna's")
    for name, found in result["versions"].items():
        if found:
            listed = ", ".join(f"{key} {value}" for key, value in sorted(found.items()))
            lines.append(f"- {name}: {listed}")
    return lines + [f"- fault: {fault}" for fault in result["faults"]]

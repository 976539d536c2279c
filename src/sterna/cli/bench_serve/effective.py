"""FastGen's effective throughput: requests/s that also met their service level (arXiv 2401.08671).

A request counts when TTFT <= prompt_tokens / 512 s (times a stated scale for slower machines) and
the moving average of its inter-token gaps never exceeds 1 / SLA. The average is exponential with
span 16, each point normalised by its own weights, so early gaps count fully.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sterna.cli.bench_serve.record import Record

PROMPT_TOKENS_PER_S = 512.0
EMA_SPAN = 16


def worst_ema(gaps: Iterable[float], span: int = EMA_SPAN) -> float:
    """The largest value of the weight-normalised exponential average; 0 without gaps."""
    keep = 1 - 2 / (span + 1)
    total = weight = worst = 0.0
    for gap in gaps:
        total = total * keep + gap
        weight = weight * keep + 1
        worst = max(worst, total / weight)
    return worst


def is_effective(record: Record, sla: float, ttft_scale: float) -> bool:
    """Whether an answered request met `sla` tokens/s and its prompt's TTFT allowance."""
    allowance = record.prompt_len / PROMPT_TOKENS_PER_S * ttft_scale
    return record.is_success and record.ttft <= allowance and worst_ema(record.itls) <= 1 / sla


def effective_throughput(
    records: Sequence[Record], duration: float, slas: Iterable[float], ttft_scale: float
) -> dict[str, float]:
    """{"SLA in tokens/s": requests/s that met it}."""
    return {
        f"{sla:g}": sum(is_effective(record, sla, ttft_scale) for record in records) / duration
        for sla in slas
    }

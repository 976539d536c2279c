"""When each request is sent: at once, by a gamma process, ramped up, or as a trace says."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from sterna.cli.bench_serve.datasets import Sample
from sterna.cli.bench_serve.options import LoadOptions


def send_times(samples: Sequence[Sample], options: LoadOptions) -> list[float]:
    """Seconds after the start at which each sample is due, not decreasing.

    Gaps are gamma distributed with shape `burstiness` and mean 1/rate (shape 1 = Poisson).
    """
    has_own_times = all(sample.at_s is not None for sample in samples)
    is_paced = options.ramp_up_strategy is not None or not math.isinf(options.request_rate)
    if has_own_times and options.self_timed and not is_paced:
        return [sample.at_s or 0.0 for sample in samples]
    draw = random.Random(f"{options.seed}/arrivals")
    times: list[float] = []
    now = 0.0
    for index in range(len(samples)):
        rate = rate_at(index, len(samples), options)
        if not math.isinf(rate):
            now += draw.gammavariate(options.burstiness, 1 / (rate * options.burstiness))
        times.append(now)
    return times


def rate_at(index: int, count: int, options: LoadOptions) -> float:
    """Requests/s when request `index` of `count` is due."""
    start, end = options.ramp_up_start_rps, options.ramp_up_end_rps
    if options.ramp_up_strategy is None or start is None or end is None:
        return options.request_rate
    progress = index / max(1, count - 1)
    if options.ramp_up_strategy == "linear":
        return start + (end - start) * progress
    return float(start * (end / start) ** progress)

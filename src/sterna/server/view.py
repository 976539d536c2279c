"""What the live page shows: recent steps, latencies of recent requests, totals.

Steps come at hundreds a second. They are kept in a ring, and a watcher's stream is fed from it
ten times a second, so watching costs the engine nothing and the event loop little.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import asdict, dataclass, field

from sterna.engine.request import StepStats
from sterna.server.metrics import RequestMeter, ServerMetrics

_RING = 4096  # steps; 10-20 s of a small model
_REQUESTS = 256  # requests behind the percentiles
_GAPS = 8192  # inter-token gaps behind the percentiles
_POLL_S = 0.1
_KEEPALIVE_S = 15.0  # proxies close silent streams after 30 to 60 s
_PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Totals:
    """Counts since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(slots=True)
class LiveView:
    """Recent history of one engine. `note_step` and `note_request` are its only writers."""

    metrics: ServerMetrics
    totals: Totals = field(default_factory=Totals)
    is_draining: bool = False
    is_closed: bool = False
    _steps: deque[StepStats] = field(default_factory=lambda: deque(maxlen=_RING))
    _ttfts: deque[float] = field(default_factory=lambda: deque(maxlen=_REQUESTS))
    _itls: deque[float] = field(default_factory=lambda: deque(maxlen=_GAPS))

    def note_step(self, step: StepStats) -> None:
        """Add one step."""
        self._steps.append(step)
        self.totals.steps += 1
        self.totals.preemptions += step.num_preempted
        self.totals.draft_tokens += sum(draft.num_tokens for draft in step.drafts)
        self.totals.accepted_draft_tokens += sum(draft.num_accepted for draft in step.drafts)
        self.metrics.note_step(step)

    def note_request(self, meter: RequestMeter) -> None:
        """Add one ended request."""
        self.totals.requests += 1
        self.totals.completion_tokens += meter.completion_tokens
        if meter.last is not None:
            self.totals.prompt_tokens += meter.last.num_prompt_tokens
            self.totals.cached_tokens += meter.last.num_cached_tokens
        if meter.ttft is not None:
            self._ttfts.append(meter.ttft)
        self._itls.extend(meter.itls)

    def latencies(self) -> dict[str, dict[str, float | None]]:
        """Percentiles in milliseconds; null before the first request."""
        return {"ttft_ms": _percentiles(self._ttfts), "itl_ms": _percentiles(self._itls)}

    def steps_since(self, since: int) -> list[StepStats]:
        """The kept steps with a number above `since`, oldest first."""
        newest_first: list[StepStats] = []
        for step in reversed(self._steps):
            if step.step <= since:
                break
            newest_first.append(step)
        return newest_first[::-1]

    async def stream(self, since: int) -> AsyncGenerator[bytes, None]:
        """Server-sent events of all steps above `since`, until the server closes."""
        silent_s = 0.0
        yield b": steps\n\n"
        while not self.is_closed:
            steps = self.steps_since(since)
            if steps:
                since, silent_s = steps[-1].step, 0.0
                yield b"".join(_event(step) for step in steps)
            elif silent_s >= _KEEPALIVE_S:
                silent_s = 0.0
                yield b": alive\n\n"
            await asyncio.sleep(_POLL_S)
            silent_s += _POLL_S


def _event(step: StepStats) -> bytes:
    return f"id: {step.step}\nevent: step\ndata: {json.dumps(asdict(step))}\n\n".encode()


def _percentiles(seconds: Iterable[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)
    return {f"p{percent}": _percentile(ordered, percent) for percent in _PERCENTILES}


def _percentile(ordered: list[float], percent: int) -> float | None:
    """Nearest rank, in milliseconds."""
    if not ordered:
        return None
    rank = min(len(ordered) - 1, len(ordered) * percent // 100)
    return round(ordered[rank] * 1e3, 3)

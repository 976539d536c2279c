"""What is kept of one request that was sent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sterna.cli.bench_serve.wire import Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request's lengths and times. Seconds; `start` counts from the start of the run.

    `ttft` is send to first text, `itls` the gaps between pieces of text, `latency` send to end.
    """

    prompt_len: int
    output_len: int = 0
    start: float = 0.0
    queued: float = 0.0  # how long it waited here for a place under max_concurrency
    ttft: float = 0.0
    itls: tuple[float, ...] = ()
    latency: float = 0.0
    text: str = ""
    error: str = ""

    @property
    def is_success(self) -> bool:
        """Whether it was answered."""
        return not self.error

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None with fewer than two tokens."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None


def read_reply(
    reply: Reply, prompt_len: int, sent: float, ended: float, run_start: float, queued: float
) -> Record:
    """The record of a streamed answer; `sent`, `ended` and `run_start` are on one clock."""
    base: dict[str, Any] = {"start": sent - run_start, "queued": queued, "latency": ended - sent}
    if reply.status != 200:
        return Record(prompt_len=prompt_len, error=_http_error(reply), **base)
    times: list[float] = []
    texts: list[str] = []
    usage: dict[str, Any] = {}
    for arrived, payload in reply.events:
        if payload == b"[DONE]":
            continue
        event = json.loads(payload)
        if "error" in event:
            return Record(prompt_len=prompt_len, error=str(event["error"]), **base)
        usage = event.get("usage") or usage
        if text := _text_of(event):
            times.append(arrived)
            texts.append(text)
    first = times[0] if times else ended
    # The last piece ends the answer; the usage event and [DONE] after it are bookkeeping.
    base["latency"] = (times[-1] if times else ended) - sent
    return Record(
        prompt_len=int(usage.get("prompt_tokens") or prompt_len),
        output_len=int(usage.get("completion_tokens") or len(times)),
        ttft=first - sent,
        itls=tuple(after - before for before, after in pairwise(times)),
        text="".join(texts),
        **base,
    )


def _text_of(event: dict[str, Any]) -> str:
    choices = event.get("choices")
    if not choices:
        return ""
    delta = choices[0].get("delta")
    if delta is None:
        return str(choices[0].get("text") or "")
    return str(delta.get("content") or delta.get("reasoning_content") or "")


def _http_error(reply: Reply) -> str:
    return f"HTTP {reply.status}: {bytes(reply.body[:300]).decode(errors='replace')}"

"""One HTTP request's work in the engine: admitted, measured, answered or aborted, exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from sterna.core.errors import ShuttingDownError
from sterna.engine.request import Delta, EngineRequest, FinishReason, RequestOutput
from sterna.server.metrics import RequestMeter
from sterna.server.replies import CachedTokens, Timing, Usage
from sterna.server.view import LiveView

if TYPE_CHECKING:
    from sterna.engine.aio import AsyncEngine

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


class Generation:
    """Runs the engine requests of one HTTP request (a completion may have several prompts)."""

    def __init__(
        self, engine: AsyncEngine, view: LiveView, requests: Sequence[EngineRequest]
    ) -> None:
        self._engine = engine
        self._view = view
        self._requests = requests
        self._meters = [RequestMeter(view.metrics, request) for request in requests]
        self._is_gone = False

    async def outputs(self) -> Outputs:
        """(prompt index, output) in order of time.

        Raises the SternaError of the first sample that failed (all others are then aborted) and
        ClientDisconnect when the client went away.
        """
        try:
            merged = self._one() if len(self._requests) == 1 else self._many()
            async with aclosing(merged):
                async for prompt_idx, output in merged:
                    self._meters[prompt_idx].note(output)
                    failure = self._failure(output.deltas)
                    # What was said before the failure may come in the same output as the failure.
                    yield prompt_idx, output if failure is None else _unfinished(output)
                    if failure is not None:
                        raise failure
        finally:
            self.abort()
            self._finish()

    def disconnect(self) -> None:
        """The client is gone: abort, within one step."""
        self._is_gone = True
        self.abort()

    def abort(self) -> None:
        """Abort whatever still runs; finished requests are left alone."""
        for request, meter in zip(self._requests, self._meters, strict=True):
            if not meter.is_complete:
                self._engine.abort(request.request_id)

    def usage(self) -> Usage:
        """Token counts so far."""
        lasts = [meter.last for meter in self._meters if meter.last is not None]
        prompt = sum(last.num_prompt_tokens for last in lasts)
        completion = sum(meter.completion_tokens for meter in self._meters)
        cached = sum(last.num_cached_tokens for last in lasts)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )

    def timing(self) -> Timing:
        """Seconds from the first arrival: first schedule, first token, last end."""
        timings = [meter.last.timing for meter in self._meters if meter.last is not None]
        if not timings:
            return Timing()
        start = min(timing.arrival for timing in timings)
        scheduled = [t.scheduled - start for t in timings if t.scheduled is not None]
        first = [t.first_token - start for t in timings if t.first_token is not None]
        ends = [t.finished - start for t in timings if t.finished is not None]
        return Timing(
            queue_s=round(min(scheduled), 6) if scheduled else None,
            ttft_s=round(min(first), 6) if first else None,
            e2e_s=round(max(ends), 6) if ends else None,
        )

    def _failure(self, deltas: tuple[Delta, ...]) -> Exception | None:
        for delta in deltas:
            if delta.error is not None:
                return delta.error
            if delta.finish_reason is FinishReason.ABORT:
                if self._is_gone:
                    return ClientDisconnect()
                return ShuttingDownError("the server stopped before the request was finished")
        return None

    def _finish(self) -> None:
        for meter in self._meters:
            meter.finish()
            self._view.note_request(meter)

    async def _one(self) -> Outputs:
        async for output in self._engine.generate(self._requests[0]):
            yield 0, output

    async def _many(self) -> Outputs:
        """Outputs of all prompts as they come; the first error ends all."""
        for request in self._requests:  # a bad one is told before anything is computed
            self._engine.check_admission(request)
        queue: asyncio.Queue[tuple[int, RequestOutput] | asyncio.Task[None]] = asyncio.Queue()

        async def pump(prompt_idx: int, request: EngineRequest) -> None:
            async for output in self._engine.generate(request):
                queue.put_nowait((prompt_idx, output))

        pumps = [asyncio.create_task(pump(i, r)) for i, r in enumerate(self._requests)]
        for task in pumps:
            task.add_done_callback(queue.put_nowait)  # behind the task's last output
        try:
            num_left = len(pumps)
            while num_left:
                item = await queue.get()
                if isinstance(item, asyncio.Task):
                    item.result()
                    num_left -= 1
                else:
                    yield item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


def _unfinished(output: RequestOutput) -> RequestOutput:
    deltas = (replace(delta, finish_reason=None, error=None) for delta in output.deltas)
    return replace(output, deltas=tuple(deltas))

"""Send a file of requests through an endpoint, several at a time, and write each result down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from sterna.cli.batchfile import (
    BatchRequest,
    ResultFile,
    count_requests,
    read_requests,
    result_line,
)
from sterna.cli.endpoint import Endpoint, EndpointError, refusal
from sterna.core.errors import ConfigError, SternaError

# A lost connection is tried again after 1, 2, 4 s; then the run stops and can be resumed.
_NUM_RECONNECTS = 3
_MAX_RETRY_AFTER_S = 60.0


@dataclass(slots=True)
class BatchSummary:
    """What a run did. `failed` have a result line that tells why."""

    total: int = 0
    skipped: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """For --json."""
        return asdict(self)


class BatchRun:
    """One pass over an input file. `on_result` is called after each result is on disk."""

    def __init__(
        self,
        endpoint: Endpoint,
        defaults: dict[str, Any],
        concurrency: int,
        on_result: Callable[[BatchSummary], None],
    ) -> None:
        self._endpoint = endpoint
        self._defaults = {"model": endpoint.model, **defaults}
        self._concurrency = concurrency
        self._on_result = on_result
        self.summary = BatchSummary()

    async def run(self, source: Path, output: Path) -> BatchSummary:
        """Answer every request of `source` that `output` does not hold yet.

        Raises ConfigError (files), EndpointError (nobody answers; what is done stays done).
        """
        if source.resolve() == output.resolve():
            raise ConfigError(f"--input and --output are one file, {source}; give another --output")
        self.summary.total = count_requests(read_requests(source))
        with ResultFile(output) as results:
            todo = (r for r in read_requests(source) if r.custom_id not in results.finished)
            self.summary.skipped = len(results.finished)
            self._on_result(self.summary)
            await self._pump(todo, results)
        return self.summary

    async def _pump(self, todo: Iterator[BatchRequest], results: ResultFile) -> None:
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._concurrency):
                    workers.create_task(self._work(todo, results))
        except* SternaError as errors:
            raise _first(errors) from None

    async def _work(self, todo: Iterator[BatchRequest], results: ResultFile) -> None:
        for request in todo:
            line = await self._answer(request)
            # On the loop's thread on purpose: a sync takes about 1 ms, and a write that nothing
            # can cancel is what makes a line whole.
            results.append(line)
            self._on_result(self.summary)

    async def _answer(self, request: BatchRequest) -> bytes:
        if request.fault:
            self.summary.failed += 1
            return result_line(request.custom_id, 0, None, fault=request.fault)
        response = await self._send(request)
        body = _json_body(response)
        self._count(response.status_code, body)
        request_id = response.headers.get("x-request-id", "")
        return result_line(request.custom_id, response.status_code, body, request_id=request_id)

    async def _send(self, request: BatchRequest) -> httpx.Response:
        body = {**self._defaults, **request.body, "stream": False}
        num_failures = 0
        while True:
            try:
                response = await self._endpoint.post(request.path, body)
                if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                    # It drains or restarts: no answer to the request, so nothing to write down.
                    raise refusal(response.status_code, response.content)
            except EndpointError:
                num_failures += 1
                if num_failures > _NUM_RECONNECTS:
                    raise
                await asyncio.sleep(2.0 ** (num_failures - 1))
                continue
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                return response
            await asyncio.sleep(_retry_after_s(response))

    def _count(self, status: int, body: Any) -> None:
        if status != httpx.codes.OK:
            self.summary.failed += 1
            return
        self.summary.completed += 1
        usage = (body.get("usage") if isinstance(body, dict) else None) or {}
        self.summary.prompt_tokens += usage.get("prompt_tokens", 0)
        self.summary.completion_tokens += usage.get("completion_tokens", 0)


def _json_body(response: httpx.Response) -> Any:
    with contextlib.suppress(ValueError):
        return response.json()
    return {"text": response.text}


def _retry_after_s(response: httpx.Response) -> float:
    with contextlib.suppress(ValueError):
        return min(max(float(response.headers.get("retry-after", "1")), 0.05), _MAX_RETRY_AFTER_S)
    return 1.0


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first

"""Send the samples when they are due and keep a record of each."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sterna.cli.bench_serve.datasets import Sample
from sterna.cli.bench_serve.options import LoadOptions, TargetOptions
from sterna.cli.bench_serve.record import Record, read_reply
from sterna.cli.bench_serve.wire import WireError, WirePool
from sterna.cli.endpoint import EndpointError

_POLL_S = 0.2


@dataclass(slots=True)
class RunResult:
    """The records of one run in sample order, its wall time, and the probes' latencies (s)."""

    records: list[Record]
    duration: float
    probe_latencies: list[float] = field(default_factory=list)


def base_url_of(target: TargetOptions) -> str:
    """The server's address."""
    return (target.base_url or f"http://{target.host}:{target.port}").rstrip("/")


def path_of(target: TargetOptions) -> str:
    """The route that is loaded."""
    is_chat = target.backend == "openai-chat"
    return target.endpoint or ("/v1/chat/completions" if is_chat else "/v1/completions")


def open_pool(target: TargetOptions) -> WirePool:
    """Connections to the target, with its headers."""
    return WirePool(base_url_of(target), target.headers())


async def wait_until_ready(pool: WirePool, target: TargetOptions) -> str:
    """Wait for GET /v1/models to answer; returns the model to ask for.

    Raises EndpointError when nothing answers in `ready_check_timeout_sec`.
    """
    deadline = time.monotonic() + target.ready_check_timeout_sec
    while True:
        try:
            reply = await pool.exchange(pool.request("GET", "/v1/models"))
            if reply.status == 200:
                models = json.loads(reply.body)["data"]
                return target.model or str(models[0]["id"])
            reason = f"HTTP {reply.status}"
        except (OSError, WireError) as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise EndpointError(f"no server answers at {base_url_of(target)}: {reason}")
        await asyncio.sleep(_POLL_S)


class Driver:
    """Runs loads against one target."""

    def __init__(
        self, pool: WirePool, target: TargetOptions, load: LoadOptions, model: str
    ) -> None:
        self._pool = pool
        self._target = target
        self._load = load
        self._model = model
        self._path = path_of(target)
        self._start = 0.0

    async def warm_up(self, samples: Sequence[Sample]) -> None:
        """Send the first `num_warmups` samples; EndpointError when none is answered."""
        self._start = time.perf_counter()
        chosen = samples[: self._load.num_warmups]
        records = [await self._send(sample, time.perf_counter()) for sample in chosen]
        if records and not any(record.is_success for record in records):
            raise EndpointError(f"the warm-up request failed: {records[0].error}")

    async def run(
        self,
        samples: Sequence[Sample],
        times: Sequence[float],
        max_concurrency: int | None,
        on_done: Callable[[Record], None],
    ) -> RunResult:
        """Send sample i at `times[i]` seconds, at most `max_concurrency` at once."""
        places = asyncio.Semaphore(max_concurrency or len(samples))
        requests = [self._bytes_of(sample) for sample in samples]  # built before the clock runs
        probes: list[float] = []
        prober = asyncio.create_task(self._probe(probes))
        self._start = time.perf_counter()

        async def one(index: int) -> Record:
            await self._sleep_until(times[index])
            due = time.perf_counter()
            async with places:
                record = await self._send(samples[index], due, requests[index])
            on_done(record)
            return record

        records = list(await asyncio.gather(*(one(i) for i in range(len(samples)))))
        duration = time.perf_counter() - self._start
        prober.cancel()
        return RunResult(records, duration, probes)

    async def _sleep_until(self, offset: float) -> None:
        delay = self._start + offset - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)

    async def _send(self, sample: Sample, due: float, request: bytes | None = None) -> Record:
        request = request or self._bytes_of(sample)
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(self._target.timeout_s):
                reply = await self._pool.exchange(request)
        except TimeoutError:
            fault = f"no complete answer within {self._target.timeout_s:g} s"
        except (OSError, WireError) as error:
            fault = f"connection: {error}"
        else:
            ended = time.perf_counter()
            try:
                return read_reply(reply, sample.prompt_len, sent, ended, self._start, sent - due)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                fault = f"answer is no OpenAI stream: {error!r}"
        latency = time.perf_counter() - sent
        return Record(
            prompt_len=sample.prompt_len, start=sent - self._start, latency=latency, error=fault
        )

    def _bytes_of(self, sample: Sample) -> bytes:
        return self._pool.request("POST", self._path, self._body(sample))

    def _body(self, sample: Sample) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self._model,
            "max_tokens": sample.output_len,
            "temperature": self._load.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._load.ignore_eos:
            body["ignore_eos"] = True
        if self._target.backend == "openai-chat":
            return {**body, "messages": [{"role": "user", "content": sample.prompt}]}
        return {**body, "prompt": sample.prompt}

    async def _probe(self, latencies: list[float]) -> None:
        if not self._load.probe_request_rate:
            return
        probe = Sample("Hi", 1, 1)
        while True:
            await asyncio.sleep(1 / self._load.probe_request_rate)
            record = await self._send(probe, time.perf_counter())
            if record.is_success:
                latencies.append(record.latency)

"""The engine behind asyncio: it computes in its own thread, coroutines get the outputs.

Commands (add, abort) go to the engine's thread through a queue that it empties before each step,
so an abort frees its blocks within one step. Outputs come back once a step, in one call of the
loop's `call_soon_threadsafe`, whatever the number of requests (one call a request would wake the
loop dozens of times a step and take the GIL from the engine each time).
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from sterna.core.errors import (
    EngineDownError,
    OverloadedError,
    RequestError,
    ShuttingDownError,
    SternaError,
)
from sterna.core.log import get_logger
from sterna.engine.audience import Audience
from sterna.engine.drafters.learner import LearnStats
from sterna.engine.engine import Engine
from sterna.engine.request import EngineRequest, RequestOutput, StepStats
from sterna.engine.stats import RetrySlots
from sterna.engine.stream import Stream
from sterna.engine.validate import Limits
from sterna.text.tokenizer import Tokenizer

log = get_logger(__name__)

# A kernel call gives up the GIL and wants it back when it returns. With CPython's 5 ms interval a
# busy event loop would keep it that long, as long as a whole decode step; 0.5 ms bounds the loss.
SWITCH_INTERVAL_S = 0.0005
# How long `shutdown` waits for the step in progress.
JOIN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Add:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Do:
    """Work for the engine's thread between two steps; the future gets what comes of it."""

    act: Callable[[], object]
    done: asyncio.Future[object]


class _Stop:
    """Ends the engine's thread; what still runs is aborted."""


_Command = _Add | _Abort | _Do | _Stop


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is. `kv_usage`: share of blocks held by sequences."""

    num_running: int
    num_waiting: int
    kv_usage: float


class AsyncEngine:
    """Every method but the engine's own thread runs on one event loop, that of `start`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="sterna-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, Stream] = {}
        self._audience = Audience()
        self._stats: list[StepStats] = []  # of the steps since the last delivery
        self._num_added = 0  # requests and tokens sent to the thread ...
        self._tokens_added = 0
        self._num_taken = 0  # ... and those it has queued in the engine
        self._tokens_taken = 0
        self._last_progress = time.monotonic()
        self._slots = RetrySlots()
        self._is_draining = False
        self._failure: BaseException | None = None
        self._all_done = asyncio.Event()
        self._all_done.set()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def limits(self) -> Limits:
        """Vocabulary, context length, cache size."""
        return self.engine.limits

    async def start(self) -> None:
        """Start the engine's thread. Once."""
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.engine.on_step.append(self._stats.append)
        self._thread.start()

    async def generate(self, request: EngineRequest) -> AsyncIterator[RequestOutput]:
        """The request's outputs as they come; the last one has `is_finished`.

        Closing the iterator, or cancelling the task that reads it, aborts the request within one
        step. Raises what `check_admission` raises, and EngineDownError when the engine dies.
        """
        self.check_admission(request)
        stream = self._send(request)
        try:
            while True:
                output = await stream.get()
                yield output
                if output.is_finished:
                    return
        finally:
            if not stream.is_finished:
                self._commands.put(_Abort(request.request_id))

    async def between_steps(self, act: Callable[[], object]) -> object:
        """What `act` returns, called by the engine's thread between two steps; raises its errors.

        ShuttingDownError, EngineDownError where no step follows.
        """
        if self._failure is not None:
            raise self._down_error()
        if self._is_draining or self._loop is None:
            raise ShuttingDownError("the server is shutting down; ask another one")
        done: asyncio.Future[object] = self._loop.create_future()
        self._commands.put(_Do(act, done))
        return await done

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output. Nothing happens if it has ended."""
        stream = self._streams.get(request_id)
        if stream is not None and not stream.is_finished:
            self._commands.put(_Abort(request_id))

    def check_admission(self, request: EngineRequest) -> None:
        """Raise if the request would not be queued now.

        RequestError, ContextLengthError: it can never be served. OverloadedError: the queue is
        full, with the predicted wait. ShuttingDownError, EngineDownError: nothing is served.
        """
        self.check_room()
        self.engine.check(request)
        self._check_queue(len(request.prompt_token_ids))

    def check_room(self) -> None:
        """Raise if no request at all would be queued now, as `check_admission` does.

        To be asked before a prompt is rendered and tokenized: refusing must stay cheap.
        """
        if self._failure is not None:
            raise self._down_error()
        if self._is_draining:
            raise ShuttingDownError("the server is shutting down; ask another one")
        self._check_queue(0)

    def health(self) -> None:
        """Raise EngineDownError when the thread has ended or makes no progress; else return."""
        if self._failure is not None or (self._loop is not None and not self._thread.is_alive()):
            raise self._down_error()
        limit = self.engine.config.stall_timeout_s
        silent = time.monotonic() - self._last_progress
        if silent > limit and self._has_work:
            raise EngineDownError(f"no step has finished for {silent:.0f} s (limit {limit:g} s)")

    def load(self) -> Load:
        """A snapshot for metrics."""
        pool = self.engine.pool
        return Load(
            num_running=self.engine.num_running,
            num_waiting=self.engine.num_waiting + self._num_added - self._num_taken,
            kv_usage=1 - pool.num_free / pool.num_usable,
        )

    def learning(self) -> LearnStats | None:
        """How the speculator learns from what is served; None when it does not."""
        learner = self.engine.learner
        return None if learner is None else learner.stats

    def subscribe(self) -> AsyncIterator[StepStats]:
        """Every step from now on. A subscriber that lags loses the oldest."""
        return self._audience.subscribe()

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for the running ones; after `timeout_s` abort them.

        True when all finished by themselves.
        """
        self._is_draining = True
        try:
            await asyncio.wait_for(self._all_done.wait(), timeout_s)
        except TimeoutError:
            for request_id in list(self._streams):
                self.abort(request_id)
            return False
        return True

    async def shutdown(self) -> None:
        """Abort what runs and end the thread. Further calls do nothing."""
        self._is_draining = True
        if not self._thread.is_alive():
            return
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
        self.engine.close()
        await asyncio.sleep(0)  # the thread's last delivery is already on the loop

    # ---- on the event loop -----------------------------------------------------------------

    @property
    def _has_work(self) -> bool:
        return self.engine.has_work or self._num_added > self._num_taken

    def _check_queue(self, num_tokens: int) -> None:
        config, load = self.engine.config, self.load()
        queued_tokens = self.engine.num_waiting_tokens + self._tokens_added - self._tokens_taken
        for what, count, new, limit in (
            ("requests", load.num_waiting, 1, config.max_queued_requests),
            ("prompt tokens", queued_tokens, num_tokens, config.max_queued_tokens),
        ):
            # A prompt longer than the limit is taken when nothing else waits.
            if count and count + new > limit:
                wait = self.engine.predict_wait_s(load.num_waiting, queued_tokens)
                # Half the places that become free are left to clients who come for the first time.
                interval = 2 * wait / max(load.num_waiting, 1)
                wait = self._slots.take(time.monotonic(), wait, interval)
                raise OverloadedError(
                    f"the queue holds {count:,} {what}, limit {limit:,}; "
                    f"try again in about {wait:.1f} s",
                    retry_after_s=wait,
                )

    def _send(self, request: EngineRequest) -> Stream:
        if self._loop is None:
            raise ShuttingDownError("the engine has not been started; await start() first")
        if request.request_id in self._streams:
            raise RequestError(
                f"request id {request.request_id!r} is in use; choose another", param="request_id"
            )
        stream = self._streams[request.request_id] = Stream()
        self._all_done.clear()
        if not self._has_work:
            self._last_progress = time.monotonic()
        self._num_added += 1
        self._tokens_added += len(request.prompt_token_ids)
        self._commands.put(_Add(request))
        return stream

    def _drop(self, request_id: str) -> None:
        """The engine has answered. Not before: a late output must not meet a new namesake."""
        self._streams.pop(request_id, None)
        if not self._streams:
            self._all_done.set()

    def _deliver(self, outputs: list[RequestOutput], stats: list[StepStats]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
            if output.is_finished:
                self._drop(output.request_id)
        for step in stats:
            self._audience.show(step)

    def _fail_stream(self, request_id: str, error: SternaError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail(error)
        self._drop(request_id)

    def _fail_all(self) -> None:
        for request_id in list(self._streams):
            self._fail_stream(request_id, self._down_error())

    def _down_error(self) -> EngineDownError:
        return EngineDownError(f"the engine has stopped: {self._failure!r}; restart the server")

    # ---- on the engine's thread ------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._obey():
                if self.engine.has_work:
                    self._publish(self.engine.step())
                self._last_progress = time.monotonic()
        except BaseException as error:
            log.exception("the engine's thread died")
            self._failure = error
            self._call(self._fail_all)

    def _obey(self) -> bool:
        """Carry out all commands; with nothing else to do, wait for one. False to stop."""
        is_idle = not self.engine.has_work
        while True:
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            is_idle = False
            if isinstance(command, _Stop):
                self._abort_all()
                return False
            if isinstance(command, _Add):
                self._add(command.request)
            elif isinstance(command, _Do):
                self._do(command)
            else:
                last = self.engine.abort(command.request_id)
                self._publish([last] if last is not None else [])

    def _add(self, request: EngineRequest) -> None:
        try:
            self.engine.add(request)
        except SternaError as error:
            self._call(self._fail_stream, request.request_id, error)
        finally:
            self._num_taken += 1
            self._tokens_taken += len(request.prompt_token_ids)

    def _do(self, command: _Do) -> None:
        try:
            result = command.act()
        except Exception as error:  # noqa: BLE001 - the caller's, the engine goes on
            self._call(_settle, command.done, None, error)
        else:
            self._call(_settle, command.done, result, None)

    def _abort_all(self) -> None:
        lasts = [self.engine.abort(request_id) for request_id in self.engine.request_ids]
        self._publish([last for last in lasts if last is not None])

    def _publish(self, outputs: list[RequestOutput]) -> None:
        stats = self._stats[:]
        self._stats.clear()
        if outputs or stats:
            self._call(self._deliver, outputs, stats)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """Run on the loop; a loop that was closed has no listeners left."""
        assert self._loop is not None, "the thread is started by start()"
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.debug("the event loop is closed; outputs are dropped")


def _settle(done: asyncio.Future[object], result: object, error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)

"""The embedder behind asyncio: it computes in its own thread, coroutines get whole results.

Requests share steps: each gets an equal part of the token budget, what is left goes to the oldest,
so a text behind a batch of thousands waits one step. A request that is cancelled (its client has
gone) leaves the queue before the next step.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sterna.core.errors import EngineDownError, OverloadedError, ShuttingDownError, SternaError
from sterna.core.log import get_logger
from sterna.engine.aio import JOIN_TIMEOUT_S, SWITCH_INTERVAL_S, Load
from sterna.engine.audience import Audience
from sterna.engine.config import EngineConfig
from sterna.engine.embed import Embedder, Floats
from sterna.engine.request import StepStats
from sterna.engine.stats import RetrySlots, SpeedMeter
from sterna.text.inputs import EncodedText
from sterna.text.tokenizer import Tokenizer

log = get_logger(__name__)
# Tokens a second assumed before the first second of work has been measured.
START_SPEED = 10_000.0


@dataclass(eq=False)
class _Job:
    """One request's texts; `order` holds the indices still to compute, the next one last."""

    texts: Sequence[EncodedText]
    out: Floats
    future: asyncio.Future[Floats]
    order: list[int] = field(default_factory=list)
    num_done: int = 0
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.order = sorted(range(len(self.texts)), key=lambda i: len(self.texts[i]))

    @property
    def num_tokens(self) -> int:
        """Tokens that wait."""
        return sum(len(self.texts[i]) for i in self.order)


_Step = list[tuple[_Job, list[int]]]


class AsyncEmbedder:
    """Every method but the thread's own runs on one event loop, that of `start`."""

    def __init__(self, embedder: Embedder, config: EngineConfig) -> None:
        self.embedder = embedder
        self.config = config
        self._lock = threading.Condition()
        self._jobs: list[_Job] = []  # those with texts that wait
        self._open: dict[_Job, None] = {}  # those not answered, oldest first; the loop's own
        self._queued_tokens = 0
        self._num_running = 0
        self._is_stopped = False
        self._is_draining = False
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="sterna-embedder", daemon=True)
        self._audience = Audience()
        self._speed = SpeedMeter(START_SPEED)
        self._slots = RetrySlots()
        self._num_steps = 0
        self._last_progress = time.monotonic()
        self._all_done = asyncio.Event()
        self._all_done.set()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.embedder.encoder.tokenizer

    async def start(self) -> None:
        """Start the thread. Once."""
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._thread.start()

    async def run(self, texts: Sequence[EncodedText]) -> Floats:
        """float32 [N, width] in the order of the texts. Cancelling the caller cancels the work.

        Raises what `check_room` raises, EngineDownError, StepError when a result is not finite.
        """
        self.check_room(sum(map(len, texts)))
        if not texts:
            return np.empty((0, self.embedder.width), np.float32)
        assert self._loop is not None, "the thread is started by start()"
        out = np.empty((len(texts), self.embedder.width), np.float32)
        job = _Job(texts, out, self._loop.create_future())
        self._add(job)
        try:
            return await job.future
        finally:
            if job.order:
                self._cancel(job)

    def check_room(self, num_tokens: int = 0) -> None:
        """Raise if a request of so many tokens would not be queued now.

        OverloadedError: the queue is full, with the predicted wait. ShuttingDownError,
        EngineDownError: nothing is served.
        """
        if self._failure is not None:
            raise self._down_error()
        if self._is_draining:
            raise ShuttingDownError("the server is shutting down; ask another one")
        config = self.config
        for what, count, new, limit in (
            ("requests", len(self._open), 1, config.max_queued_requests),
            ("tokens", self._queued_tokens, num_tokens, config.max_queued_tokens),
        ):
            if count and count + new > limit:
                raise self._overloaded(what, count, limit)

    def _overloaded(self, what: str, count: int, limit: int) -> OverloadedError:
        wait = self._speed.predict_wait_s(len(self._open), self._queued_tokens, True)
        wait = self._slots.take(time.monotonic(), wait, 2 * wait / max(len(self._open), 1))
        return OverloadedError(
            f"the queue holds {count:,} {what}, limit {limit:,}; try again in about {wait:.1f} s",
            retry_after_s=wait,
        )

    def health(self) -> None:
        """Raise EngineDownError when the thread has ended or makes no progress; else return."""
        if self._failure is not None or (self._loop is not None and not self._thread.is_alive()):
            raise self._down_error()
        silent, limit = time.monotonic() - self._last_progress, self.config.stall_timeout_s
        if silent > limit and self._open:
            raise EngineDownError(f"no step has finished for {silent:.0f} s (limit {limit:g} s)")

    def load(self) -> Load:
        """A snapshot for metrics: requests with texts in the step under way, and the others."""
        running = self._num_running
        return Load(running, max(len(self._open) - running, 0), 0.0)

    def subscribe(self) -> AsyncIterator[StepStats]:
        """Every step from now on. A subscriber that lags loses the oldest."""
        return self._audience.subscribe()

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for the running ones; after `timeout_s` drop them.

        True when all finished by themselves.
        """
        self._is_draining = True
        try:
            await asyncio.wait_for(self._all_done.wait(), timeout_s)
        except TimeoutError:
            self._fail_all(ShuttingDownError("the server is shutting down; ask another one"))
            return False
        return True

    async def shutdown(self) -> None:
        """Drop what runs and end the thread. Further calls do nothing."""
        self._is_draining = True
        if not self._thread.is_alive():
            return
        with self._lock:
            self._is_stopped = True
            self._lock.notify()
        await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
        await asyncio.sleep(0)  # the thread's last delivery is already on the loop
        self._fail_all(ShuttingDownError("the server is shutting down; ask another one"))

    # ---- on the event loop -----------------------------------------------------------------

    def _add(self, job: _Job) -> None:
        if not self._open:
            self._last_progress = time.monotonic()
        self._open[job] = None
        self._all_done.clear()
        with self._lock:
            self._jobs.append(job)
            self._queued_tokens += job.num_tokens
            self._lock.notify()

    def _cancel(self, job: _Job) -> None:
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)
                self._queued_tokens -= job.num_tokens
            job.is_cancelled = True
            job.order.clear()
        self._close(job)

    def _close(self, job: _Job) -> None:
        self._open.pop(job, None)
        if not self._open:
            self._all_done.set()

    def _fail_all(self, error: SternaError) -> None:
        for job in list(self._open):
            self._finish(job, error)

    def _finish(self, job: _Job, error: SternaError | None) -> None:
        """Answer a request and take it out of the queue."""
        if error is not None:
            self._cancel(job)
        if not job.future.done():
            if error is None:
                job.future.set_result(job.out)
            else:
                job.future.set_exception(error)
        self._close(job)

    def _deliver(self, finished: list[tuple[_Job, SternaError | None]], stats: StepStats) -> None:
        for job, error in finished:
            self._finish(job, error)
        self._audience.show(stats)

    def _down_error(self) -> EngineDownError:
        return EngineDownError(f"the engine has stopped: {self._failure!r}; restart the server")

    # ---- on the thread ---------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while (step := self._take()) is not None:
                self._do(step)
        except BaseException as error:
            log.exception("the embedder's thread died")
            self._failure = error
            self._call(lambda: self._fail_all(self._down_error()))

    def _take(self) -> _Step | None:
        """The texts of the next step; None to stop. Waits while there are none."""
        with self._lock:
            self._lock.wait_for(lambda: self._is_stopped or self._jobs)
            if self._is_stopped:
                return None
            step = take_fairly(self._jobs, self.embedder.token_budget, self.embedder.max_seqs)
            self._queued_tokens -= sum(len(job.texts[i]) for job, part in step for i in part)
            self._num_running = len(step)
            # A job whose last texts are in this step no longer waits.
            self._jobs = [job for job in self._jobs if job.order]
        return step

    def _do(self, step: _Step) -> None:
        started = time.monotonic()
        errors: dict[_Job, SternaError] = {}
        try:
            self._compute(step)
        except SternaError:
            errors = self._one_by_one(step)
        self._last_progress = time.monotonic()
        self._num_running = 0
        stats = self._stats(step, started)
        self._speed.note_step(stats)
        finished: list[tuple[_Job, SternaError | None]] = []
        for job, part in step:
            job.num_done += len(part)
            if job in errors or (job.num_done == len(job.texts) and not job.is_cancelled):
                finished.append((job, errors.get(job)))
        self._call(lambda: self._deliver(finished, stats))

    def _compute(self, step: _Step) -> None:
        rows = self.embedder.run([job.texts[i] for job, part in step for i in part])
        at = 0
        for job, part in step:
            job.out[part] = rows[at : at + len(part)]
            at += len(part)

    def _one_by_one(self, step: _Step) -> dict[_Job, SternaError]:
        """A step that failed, request by request: only the guilty one fails."""
        errors: dict[_Job, SternaError] = {}
        for job, part in step:
            try:
                self._compute([(job, part)])
            except SternaError as error:
                errors[job] = error
        return errors

    def _stats(self, step: _Step, started: float) -> StepStats:
        self._num_steps += 1
        return StepStats(
            step=self._num_steps,
            started=started,
            duration=self._last_progress - started,
            num_decode_tokens=0,
            num_prompt_tokens=sum(len(job.texts[i]) for job, part in step for i in part),
            num_running=len(step),
            num_waiting=len(self._jobs),
            num_preempted=0,
            kv_usage=0.0,
            token_budget=self.embedder.token_budget,
        )

    def _call(self, function: object) -> None:
        """Run on the loop; a loop that was closed has no listeners left."""
        assert self._loop is not None and callable(function)
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            log.debug("the event loop is closed; results are dropped")


def take_fairly(jobs: Sequence[_Job], budget: int, max_seqs: int) -> _Step:
    """Takes texts out of the jobs' `order` for one step.

    First an equal share of the budget each, at least one text while there is room; then what is
    left in order of arrival. Raises nothing; never empty when a job has a text.
    """
    parts: dict[_Job, list[int]] = {}
    room, places = budget, max_seqs
    for share in (budget // max(len(jobs), 1), budget):
        for job in jobs:
            left = share
            part = parts.setdefault(job, [])
            while job.order and places:
                size = len(job.texts[job.order[-1]])
                if size > room or (size > left and (part or share == budget)):
                    break
                part.append(job.order.pop())
                room, left, places = room - size, left - size, places - 1
    return [(job, part) for job, part in parts.items() if part]

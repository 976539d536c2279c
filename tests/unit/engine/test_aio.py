"""The engine's thread and the event loop: delivery, cancel, overload, drain, death, stall."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from sterna.core.errors import (
    ContextLengthError,
    EngineDownError,
    OverloadedError,
    RequestError,
    ShuttingDownError,
    SternaError,
)
from sterna.engine.aio import AsyncEngine
from sterna.engine.request import EngineRequest, FinishReason, SamplingParams
from sterna.engine.stream import Stream, merge_outputs


def request(name, prompt=(1, 2, 3), **params):
    params = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, **params}
    return EngineRequest(
        request_id=name, prompt_token_ids=tuple(prompt), params=SamplingParams(**params)
    )


async def read(engine, req):
    return [output async for output in engine.generate(req)]


def tokens(outputs):
    return [token for o in outputs for d in o.deltas for token in d.token_ids]


class Gate:
    """Holds the engine's thread in its forward until it is opened."""

    def __init__(self, engine):
        self.opened = threading.Event()
        self.reached = threading.Event()
        engine.on_forward.append(self)

    def __call__(self, chunks):
        self.reached.set()
        assert self.opened.wait(20)

    async def wait_reached(self):
        assert await asyncio.to_thread(self.reached.wait, 20)


def run(harness, body, **settings):
    """Start an AsyncEngine on the fake model, run `body(async_engine)`, shut down, check blocks."""

    async def main():
        engine = AsyncEngine(harness(**settings).engine)
        await engine.start()
        try:
            await asyncio.wait_for(body(engine), 30)
        finally:
            await engine.shutdown()
        return engine

    engine = asyncio.run(main())
    assert engine.engine.num_free_blocks == engine.engine.pool.num_usable
    return engine


def test_many_requests_at_once(harness, greedy):
    async def body(engine):
        results = await asyncio.gather(
            *(read(engine, request(str(i), [i + 1, 5], max_tokens=15)) for i in range(20))
        )
        for i, outputs in enumerate(results):
            assert tokens(outputs) == greedy([i + 1, 5], 15, stop_at_eos=False)
            assert [o.is_finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        engine.health()
        assert engine.load().num_running == 0

    run(harness, body)


def test_closing_the_iterator_aborts_within_a_step(harness):
    async def body(engine):
        stream = engine.generate(request("a", max_tokens=400))
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(read(engine, request("b", max_tokens=400)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate = Gate(engine.engine)
        gate.opened.set()
        await read(engine, request("c", max_tokens=2))
        assert engine.engine.request_ids == []

    run(harness, body)


def test_a_thousand_aborts_leave_no_block_held(harness):
    async def body(engine):
        async def start_and_stop(i):
            stream = engine.generate(request(str(i), [i % 90] * 30, max_tokens=100))
            if i % 3:
                await anext(stream)
            await stream.aclose()

        for start in range(0, 1000, 50):
            await asyncio.gather(*(start_and_stop(i) for i in range(start, start + 50)))

    engine = run(harness, body)
    engine.engine.check_integrity()


def test_abort_gives_the_reader_a_last_output(harness):
    async def body(engine):
        outputs = []
        async for output in engine.generate(request("a", max_tokens=400, n=2)):
            outputs.append(output)
            engine.abort("a")
        assert outputs[-1].is_finished
        assert {d.finish_reason for d in outputs[-1].deltas} == {FinishReason.ABORT}
        engine.abort("a")
        engine.abort("unknown")

    run(harness, body)


def test_bad_requests_raise_before_they_are_queued(harness):
    async def body(engine):
        with pytest.raises(RequestError, match="temperature"):
            await read(engine, request("a", temperature=-1))
        with pytest.raises(ContextLengthError):
            await read(engine, request("a", [1] * 600))
        first = engine.generate(request("a", max_tokens=300))
        await anext(first)
        with pytest.raises(SternaError, match="in use"):
            await read(engine, request("a"))
        await first.aclose()

    run(harness, body)


def test_overload_is_refused_with_a_prediction(harness):
    async def body(engine):
        gate = Gate(engine.engine)
        tasks = [asyncio.create_task(read(engine, request("0")))]
        await gate.wait_reached()
        tasks += [asyncio.create_task(read(engine, request(str(i)))) for i in range(1, 4)]
        await asyncio.sleep(0.02)
        assert engine.load().num_waiting == 3
        with pytest.raises(OverloadedError, match="3 requests, limit 3") as caught:
            engine.check_admission(request("x"))
        assert 0 < caught.value.retry_after_s <= 600
        gate.opened.set()
        await asyncio.gather(*tasks)
        engine.check_admission(request("x"))

    run(harness, body, max_queued_requests=3)


def test_queued_prompt_tokens_are_bounded_too(harness):
    async def body(engine):
        gate = Gate(engine.engine)
        tasks = [asyncio.create_task(read(engine, request("0")))]
        await gate.wait_reached()
        tasks.append(asyncio.create_task(read(engine, request("1", [1] * 90))))
        await asyncio.sleep(0.02)
        with pytest.raises(OverloadedError, match="prompt tokens, limit 100"):
            engine.check_admission(request("x", [1] * 20))
        engine.check_admission(request("x", [1] * 10))
        gate.opened.set()
        await asyncio.gather(*tasks)
        engine.check_admission(request("x", [1] * 300))  # alone it is taken

    run(harness, body, max_queued_tokens=100)


def test_a_slow_reader_stalls_nobody_and_loses_nothing(harness, greedy):
    async def body(engine):
        slow = engine.generate(request("slow", max_tokens=200, logprobs=1))
        first = await anext(slow)
        assert len(tokens(await read(engine, request("fast", max_tokens=200)))) == 200
        rest = [output async for output in slow]
        assert len(rest) < 50  # what was missed came merged
        assert tokens([first, *rest]) == greedy([1, 2, 3], 200, stop_at_eos=False)
        entries = [e.token_id for o in [first, *rest] for d in o.deltas for e in d.logprobs]
        assert entries == tokens([first, *rest])

    run(harness, body)


def test_drain_finishes_what_runs_and_refuses_what_comes(harness):
    async def body(engine):
        task = asyncio.create_task(read(engine, request("a", max_tokens=100)))
        await asyncio.sleep(0)
        drained = asyncio.create_task(engine.drain(20))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDownError):
            await read(engine, request("b"))
        assert await drained
        assert len(tokens(await task)) == 100

    run(harness, body)


def test_drain_aborts_after_its_timeout(harness):
    async def body(engine):
        gate = Gate(engine.engine)
        task = asyncio.create_task(read(engine, request("a", max_tokens=400)))
        await gate.wait_reached()
        assert not await engine.drain(0.05)
        gate.opened.set()
        outputs = await task
        assert outputs[-1].deltas[0].finish_reason is FinishReason.ABORT

    run(harness, body)


def test_shutdown_answers_everyone(harness):
    async def main():
        engine = AsyncEngine(harness().engine)
        await engine.start()
        task = asyncio.create_task(read(engine, request("a", max_tokens=500)))
        await asyncio.sleep(0.02)
        await engine.shutdown()
        await engine.shutdown()
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(main())[-1].deltas[0].finish_reason is FinishReason.ABORT


def test_death_of_the_thread_is_told_to_all(harness):
    async def main():
        engine = AsyncEngine(harness().engine)
        await engine.start()

        def die(stats):
            raise SystemError("injected")

        engine.engine.on_step.append(die)
        with pytest.raises(EngineDownError, match="injected"):
            await asyncio.wait_for(read(engine, request("a")), 10)
        with pytest.raises(EngineDownError):
            engine.health()
        with pytest.raises(EngineDownError):
            await read(engine, request("b"))
        await engine.shutdown()

    asyncio.run(main())


def test_health_turns_red_when_no_step_finishes(harness):
    async def body(engine):
        gate = Gate(engine.engine)
        task = asyncio.create_task(read(engine, request("a")))
        await gate.wait_reached()
        engine.health()
        await asyncio.sleep(0.3)
        with pytest.raises(EngineDownError, match="no step has finished"):
            engine.health()
        gate.opened.set()
        await task
        engine.health()
        time.sleep(0.3)
        engine.health()  # idle is healthy

    run(harness, body, stall_timeout_s=0.2)


def test_subscribers_see_every_step(harness):
    async def body(engine):
        seen = []

        async def follow():
            async for stats in engine.subscribe():
                seen.append(stats)

        task = asyncio.create_task(follow())
        await asyncio.sleep(0)
        await read(engine, request("a", max_tokens=30))
        await asyncio.sleep(0.02)
        task.cancel()
        assert [stats.step for stats in seen] == list(range(1, 31))

    run(harness, body)


def test_merging_outputs_equals_reading_them(harness):
    h = harness()
    h.add("a", range(20), n=3, temperature=1.0, max_tokens=30, logprobs=2, prompt_logprobs=0)
    h.run()
    merged = merge_outputs(h.outputs["a"])
    for delta in merged.deltas:
        assert list(delta.token_ids) == h.tokens("a", delta.index)
        assert delta.text == h.text("a", delta.index)
        assert delta.finish_reason is h.end("a", delta.index).finish_reason
        assert len(delta.logprobs) == len(delta.token_ids)
    assert merged.is_finished
    assert len(merged.prompt_logprobs) == 20


def test_a_failed_stream_gives_what_it_has_and_then_raises():
    async def main():
        stream = Stream()
        stream.fail(EngineDownError("gone"))
        for _ in range(2):
            with pytest.raises(EngineDownError):
                await stream.get()

    asyncio.run(main())

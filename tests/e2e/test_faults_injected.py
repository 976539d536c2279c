"""Faults injected into a real engine behind a real server: only the culprit pays.

The server runs in this process, because faults are injected through engine hooks that no client
can reach.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import uvicorn

from sterna.engine.aio import AsyncEngine
from sterna.engine.build import build_engine
from sterna.engine.config import EngineConfig
from sterna.server.app import create_app
from sterna.server.config import ServerConfig

URL = "/v1/completions"
MARK = "culprit"  # the salt of the request that fails; the others have none
SETTINGS = {"token_budget": 64, "threads": 1, "kv_cache_bytes": 8 << 20}


class InProcess:
    """A server on a thread; `engine` is open to the test."""

    def __init__(self, model, **settings):
        config = EngineConfig.model_validate({**SETTINGS, **settings})
        self.core = build_engine(str(model), config)
        self.engine = AsyncEngine(self.core)
        app = create_app(self.engine, ServerConfig.model_validate({"model": str(model)}))
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        asyncio.run(self.server.serve(sockets=[self.listener]))

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()
        assert not self.thread.is_alive()

    def complete(self, prompt="abc", **fields):
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}
        return httpx.post(self.url + URL, json=body, timeout=60)

    def wait_idle(self):
        end = time.monotonic() + 10
        while self.core.has_work:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert self.core.num_free_blocks == self.core.pool.num_usable
        self.core.check_integrity()


@pytest.fixture
def server(tiny_model):
    running = InProcess(tiny_model)
    yield running
    running.stop()


def explode(chunks) -> None:
    """A forward that raises whenever the culprit is in it."""
    if any(chunk.seq.state.request.cache_salt == MARK for chunk in chunks):
        raise RuntimeError("injected failure")


def run_together(server, culprit: dict, count: int = 6):
    """The culprit's reply, and those of `count` others that run beside it."""
    with ThreadPoolExecutor(count + 1) as pool:
        others = [pool.submit(server.complete, f"prompt {i}") for i in range(count)]
        bad = pool.submit(server.complete, "prompt", cache_salt=MARK, **culprit)
        return bad.result(), [other.result() for other in others]


def test_injected_failure_in_a_step_fails_only_its_requests(server):
    alone = [server.complete(f"prompt {i}").json()["choices"][0]["text"] for i in range(6)]
    server.core.on_forward.append(explode)
    bad, others = run_together(server, {})
    assert bad.status_code == 500 and bad.json()["error"]["code"] == "step_failed"
    assert [reply.status_code for reply in others] == [200] * 6
    assert [reply.json()["choices"][0]["text"] for reply in others] == alone
    server.core.on_forward.clear()
    server.wait_idle()
    assert server.complete().status_code == 200
    assert httpx.get(server.url + "/health").status_code == 200


def test_nan_logits_kill_only_that_request(server):
    alone = [server.complete(f"prompt {i}").json()["choices"][0]["text"] for i in range(6)]
    run = server.core.runner.run

    def poisoned(chunks):
        logits = run(chunks)
        sampling = [chunk for chunk in chunks if chunk.samples]
        for chunk, row in zip(sampling, logits.rows, strict=True):
            # In mid-answer, so that a stream has begun.
            if chunk.seq.state.request.cache_salt == MARK and len(chunk.seq.output) >= 12:
                logits.values[row] = np.nan
        return logits

    server.core.runner.run = poisoned
    bad, others = run_together(server, {})
    assert bad.status_code == 500 and bad.json()["error"]["code"] == "step_failed"
    assert [reply.json()["choices"][0]["text"] for reply in others] == alone
    # In a stream, what came before the fault is delivered and the fault is the last event.
    streamed, _ = run_together(server, {"stream": True})
    assert streamed.status_code == 200
    assert '"code": "step_failed"' in streamed.text and streamed.text.count('"text"') >= 1
    server.core.runner.run = run
    server.wait_idle()
    assert server.complete().status_code == 200


def test_a_stuck_engine_turns_health_red_and_green_again(tiny_model):
    server = InProcess(tiny_model, stall_timeout_s=0.3)
    release = threading.Event()

    def stuck(chunks):
        release.wait(20)

    try:
        server.core.on_forward.append(stuck)
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(server.complete)
            time.sleep(0.8)
            ill = httpx.get(server.url + "/health")
            release.set()
            assert reply.result().status_code == 200
        assert ill.status_code == 503 and "no step has finished" in ill.json()["error"]["message"]
        assert httpx.get(server.url + "/health").status_code == 200
    finally:
        release.set()
        server.stop()


def test_a_dead_engine_thread_answers_everyone(tiny_model):
    server = InProcess(tiny_model)

    def die():
        raise SystemError("injected death")

    try:
        server.core.step = die
        first = server.complete()
        assert first.status_code == 503 and first.json()["error"]["code"] == "engine_down"
        assert server.complete().status_code == 503
        assert httpx.get(server.url + "/health").status_code == 503
    finally:
        server.stop()

"""A scripted stand-in for the server, so that the page's behaviour is tested without a model.

It serves the real page files and speaks the same wire: SSE chat, OpenAI errors, engine state and
steps. What it answers depends on the last user message (see `SCRIPTS`) and on `FakeServer`'s
switches, which tests flip while it runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

WEB = Path(__file__).parents[2] / "src" / "sterna" / "server" / "web"
CSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
TOKEN_BUDGET = 256

MARKDOWN = """### Terns

The **arctic tern** flies *far*: about `70,000 km` a year.

1. Summer in the north
2. Summer in the south
   - and back

```python
def reverse(text: str) -> str:
    return text[::-1]  # <b>not bold</b>
```

| Bird | Distance |
|---|---:|
| Tern | 70,000 |

<img src=x onerror="document.title='broken'"> [bad](javascript:alert(1)) [good](https://example.org/)
"""


@dataclass
class FakeServer:
    """Switches and records shared between a test and the server thread."""

    api_key: str | None = None
    busy: int = 0  # so many next requests get 429
    retry_after: str = "2"
    is_draining: bool = False
    pause_s: float = 0.01  # between pieces of an answer
    is_loaded: bool = False  # the engine shows fused steps instead of resting
    bodies: list[dict[str, Any]] = field(default_factory=list)
    cancelled: int = 0
    watchers: int = 0  # open streams of steps
    url: str = ""


def _error(status: int, message: str, kind: str, **headers: str) -> JSONResponse:
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def _refusal(fake: FakeServer, request: Request) -> JSONResponse | None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if fake.api_key and fake.api_key not in (given, request.cookies.get("sterna_api_key")):
        return _error(401, "No valid API key was given.", "authentication_error")
    return None


def _answer(text: str) -> str:
    if "markdown" in text:
        return MARKDOWN
    if "long" in text:
        return "One more sentence about the sea. " * 120
    return "The sky is blue because air scatters short wavelengths more. You asked: " + text


def _pieces(text: str) -> list[str]:
    """About one word a piece, as tokens would arrive."""
    return [word + " " for word in text.split(" ")]


def _chunk(**fields: Any) -> str:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [], **fields})}\n\n"


async def _stream(fake: FakeServer, text: str) -> AsyncIterator[str]:
    pieces = _pieces(_answer(text))
    is_cancelled = True
    try:
        for piece in pieces[:8] if "cut" in text or "break" in text else pieces:
            await asyncio.sleep(fake.pause_s)
            yield _chunk(choices=[{"index": 0, "delta": {"content": piece}}])
        is_cancelled = False
    finally:
        fake.cancelled += is_cancelled
    if "break" in text:
        yield f"data: {json.dumps({'error': {'message': 'This step failed.'}})}\n\n"
    if "cut" in text or "break" in text:
        return
    yield _chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    usage = {
        "prompt_tokens": 52,
        "completion_tokens": len(pieces),
        "total_tokens": 52 + len(pieces),
    }
    yield _chunk(usage={**usage, "prompt_tokens_details": {"cached_tokens": 48}})
    yield "data: [DONE]\n\n"


def fused_step(i: int, started: float) -> dict[str, Any]:
    """Step `i` of an endless load: 6-12 decodes, and every 40 steps a long prompt in chunks."""
    phase = i % 40
    decode = 6 + (i // 40 * 5) % 7
    chunk = TOKEN_BUDGET - decode if phase < 5 else 120 if phase == 5 else 36 * (phase % 17 == 0)
    return {
        "step": i,
        "started": started,
        "duration": 0.009 + 0.0004 * decode + 0.00021 * chunk,
        "num_decode_tokens": decode,
        "num_prompt_tokens": chunk,
        "num_running": decode + (phase < 6),
        "num_waiting": max(0, 3 - phase // 4),
        "num_preempted": int(i % 160 == 90),
        "kv_usage": 0.3 + 0.004 * phase + 0.02 * decode,
        "token_budget": TOKEN_BUDGET,
    }


async def _steps(fake: FakeServer) -> AsyncIterator[str]:
    fake.watchers += 1
    try:
        yield ": open\n\n"
        for i in itertools.count():
            while not fake.is_loaded:
                await asyncio.sleep(0.05)
            step = fused_step(i, time.monotonic())
            yield f"event: step\r\ndata: {json.dumps(step)}\r\n\r\n"
            await asyncio.sleep(step["duration"])
    finally:
        fake.watchers -= 1


def _state() -> dict[str, Any]:
    now = time.monotonic()
    return {
        "model": "smollm2-135m-instruct",
        "machine": "2 cores, AVX-512 BF16, 8 GiB",
        "kernels": "cpu avx512_bf16, 2 threads",
        "policy": "splitfuse",
        "token_budget": TOKEN_BUDGET,
        "num_kv_blocks": 4096,
        "block_size": 16,
        "max_model_len": 8192,
        "running": 9,
        "waiting": 1,
        "kv_usage": 0.41,
        "ttft_ms": {"p50": 84.2 + 20 * (now % 3), "p90": 190.5 + 30 * (now % 2), "p99": 412.0},
        "itl_ms": {"p50": 13.1 + now % 2, "p90": 24.8 + now % 5, "p99": 71.3},
        "totals": {"requests": 1284, "prompt_tokens": 412_000, "completion_tokens": 96_400},
    }


def _chat(fake: FakeServer, body: dict[str, Any]) -> Response:
    fake.bodies.append(body)
    text = body["messages"][-1]["content"]
    if fake.is_draining:
        return _error(503, "The server is shutting down.", "server_error")
    if fake.busy:
        fake.busy -= 1
        headers = {"Retry-After": fake.retry_after}
        return _error(429, "The queue is full.", "rate_limit_error", **headers)
    if "too long" in text:
        message = "prompt has 9,000 tokens, limit 8,192; shorten it"
        return _error(400, message, "invalid_request_error")
    return StreamingResponse(_stream(fake, text), media_type="text/event-stream")


def create_fake_app(fake: FakeServer) -> FastAPI:
    """The routes the page uses; the page itself needs no key, the API does."""
    app = FastAPI()

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        is_page = request.url.path == "/" or request.url.path.startswith("/web")
        refusal = None if is_page else _refusal(fake, request)
        response: Response = refusal or await call_next(request)
        response.headers["Content-Security-Policy"] = CSP
        return response

    app.get("/")(lambda: FileResponse(WEB / "index.html"))
    app.get("/v1/models")(
        lambda: {"data": [{"id": "smollm2-135m-instruct", "max_model_len": 8192}]}
    )
    app.get("/version")(lambda: {"version": "0.1.0"})
    app.get("/engine/state")(_state)

    @app.get("/engine/steps")
    async def steps() -> StreamingResponse:
        return StreamingResponse(_steps(fake), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return _chat(fake, await request.json())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        fake.bodies.append(await request.json())
        fake.is_loaded = True
        return JSONResponse({"choices": []})

    app.mount("/web", StaticFiles(directory=WEB))
    return app


def start(fake: FakeServer) -> uvicorn.Server:
    """Serve on a free loopback port in a thread; sets `fake.url`. Stop with `should_exit`."""
    listener = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(create_fake_app(fake), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return server

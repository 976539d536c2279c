"""A tiny OpenAI server for the command's tests: every token is a word, speeds are settable."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse


class FakeServer:
    """What the fake was asked, and how it behaves."""

    def __init__(self, first_s=0.0, gap_s=0.0):
        self.first_s, self.gap_s = first_s, gap_s
        self.bodies = []
        self.refusals = []  # statuses to answer with, first in first out
        self.num_running = 0
        self.most_running = 0
        self.app = self._build()

    def _build(self):
        app = FastAPI()

        @app.get("/v1/models")
        async def models():
            return {"data": [{"id": "fake"}]}

        @app.post("/v1/completions")
        async def completions(request: Request):
            return await self._answer(await request.json(), is_chat=False)

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            return await self._answer(await request.json(), is_chat=True)

        return app

    async def _answer(self, body, is_chat):
        self.bodies.append(body)
        if self.refusals:
            status = self.refusals.pop(0)
            error = {
                "message": f"refused {status} [/red] [0]",
                "type": "x",
                "code": None,
                "param": None,
            }
            headers = {"retry-after": "0.05"}
            return JSONResponse({"error": error}, status_code=status, headers=headers)
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": body["max_tokens"]}
        if body.get("stream"):
            pieces = self._pieces(body["max_tokens"], is_chat, usage)
            return StreamingResponse(pieces, media_type="text/event-stream")
        await asyncio.sleep(self.first_s)
        text = "word " * body["max_tokens"]
        part = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        return {"choices": [{**part, "finish_reason": "length"}], "usage": usage}

    async def _pieces(self, count, is_chat, usage):
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await asyncio.sleep(self.first_s)
        if is_chat:  # a role-only piece comes first and is no token
            yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for index in range(count):
            if index and self.gap_s:
                await asyncio.sleep(self.gap_s)
            part = {"delta": {"content": "word "}} if is_chat else {"text": "word "}
            yield _event({"choices": [part]})
        yield _event({"choices": [], "usage": usage})
        self.num_running -= 1
        yield b"data: [DONE]\n\n"


def _event(payload):
    return f"data: {json.dumps(payload)}\n\n".encode()


@contextmanager
def serving(fake):
    """Run the fake on a free port of loopback; yields its base URL."""
    server = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)

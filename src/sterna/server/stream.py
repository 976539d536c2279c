"""Server-sent events: the ASGI response and the bytes of one chunk.

A chunk is assembled from parts that are fixed for the whole answer; only the text (and logprobs)
is encoded anew. At 32 streams of 100 tokens a second each, a chunk may cost 30 us at the most;
measured 2 us to build, the rest is the socket.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sterna.server.replies import Timing, Usage

DONE = b"data: [DONE]\n\n"
# Line ends to Unicode but not to an event stream, inside JSON only ever in strings. Many a client
# splits lines by Unicode's rule (Python's str.splitlines, httpx's iter_lines), so they are escaped.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# One encoder for all: json.dumps with options would build one a call.
encode_json: Callable[[object], str] = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":")
).encode


class EventStream(Response):
    """Sends pieces as they come and tells `on_disconnect` when the client has gone.

    `send` waits while the client's buffer is full; only this stream waits, and the engine's
    outputs for it are merged meanwhile.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], on_disconnect: Callable[[], None]
    ) -> None:
        super().__init__(media_type="text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        # Buffering by a proxy would turn a stream into one late answer.
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._pieces = pieces
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with watching(receive, self._on_disconnect), aclosing(self._pieces) as pieces:
            # The status goes out with the first piece: an error before it has a status of its own.
            first = await anext(pieces, b"")
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def watching(receive: Receive, on_disconnect: Callable[[], None]) -> AsyncIterator[None]:
    """Call `on_disconnect` when the client goes while the block runs. Costs nothing a token."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_disconnect()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


@dataclass(frozen=True, slots=True)
class ChunkWriter:
    """Builds the chunks of one answer."""

    head: str  # everything before the choices
    with_usage: bool  # OpenAI: with include_usage every chunk has a `usage`, null but in the last

    @classmethod
    def open(
        cls, reply_id: str, kind: str, created: int, model: str, *, with_usage: bool
    ) -> ChunkWriter:
        """The writer for one answer; `kind` is OpenAI's `object`."""
        fixed = encode_json({"id": reply_id, "object": kind, "created": created, "model": model})
        return cls(f"data: {fixed[:-1]},", with_usage)

    def chunk(self, choice: str, usage: Usage | None = None) -> bytes:
        """One chunk with one choice, given as JSON text."""
        tail = self._usage(usage)
        return _one_line(f'{self.head}"choices":[{choice}]{tail}}}')

    def last(self, usage: Usage, timing: Timing) -> bytes:
        """The chunk without choices: token counts and timings."""
        return _one_line(
            f'{self.head}"choices":[],"usage":{usage.model_dump_json()},'
            f'"sterna":{timing.model_dump_json()}}}'
        )

    def _usage(self, usage: Usage | None) -> str:
        if usage is not None:
            return f',"usage":{usage.model_dump_json()}'
        return ',"usage":null' if self.with_usage else ""


def _one_line(event: str) -> bytes:
    """The bytes of one event."""
    if not event.isascii():  # 0.1 us; the rest 1 us a chunk of other scripts
        event = event.translate(_LINE_ENDS)
    return f"{event}\n\n".encode()


def chat_choice(
    index: int, delta: str, *, logprobs: str = "null", finish: str = "null", stop: str = "null"
) -> str:
    """One chat choice as JSON text; the arguments are JSON texts too."""
    end = "" if finish == "null" else f',"stop_reason":{stop}'
    return (
        f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}{end}}}'
    )


def text_choice(
    index: int, text: str, *, logprobs: str = "null", finish: str = "null", stop: str = "null"
) -> str:
    """One completion choice as JSON text; `text` is plain, the rest JSON texts."""
    end = "" if finish == "null" else f',"stop_reason":{stop}'
    return (
        f'{{"index":{index},"text":{encode_json(text)},"logprobs":{logprobs},'
        f'"finish_reason":{finish}{end}}}'
    )

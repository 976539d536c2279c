"""A small HTTP/1.1 client for streams, so that the load generator takes little of the CPU it tests.

One asyncio protocol a connection, kept alive and reused. Arrival times are taken when the bytes
arrive, once for all events in them. Measured against a local server: about 10 us of client CPU a
streamed token.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit


@dataclass(slots=True)
class Reply:
    """One response: `events` are (arrival time, payload of a `data:` line)."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    events: list[tuple[float, bytes]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)


class WireError(Exception):
    """The connection broke, or the bytes were no HTTP."""


class Wire(asyncio.Protocol):
    """One connection that carries one exchange at a time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._line = bytearray()
        self._reply = Reply()
        self._done: asyncio.Future[Reply] | None = None
        self._is_in_body = False
        self._is_chunked = False
        self._left = 0  # bytes of the current chunk or body still to come; -1 = until close
        self.is_usable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        # A stream transport by contract; uvloop's is none by inheritance.
        self._transport = cast(asyncio.Transport, transport)
        self.is_usable = True

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: gone; ends a body that has no length, else fails the exchange."""
        self.is_usable = False
        if self._done is None or self._done.done():
            return
        if self._is_in_body and self._left < 0:
            self._done.set_result(self._reply)
        else:
            self._done.set_exception(WireError(f"connection lost: {exc or 'closed by the server'}"))

    async def exchange(self, request: bytes) -> Reply:
        """Send one request and wait for its whole response. WireError when it breaks off."""
        if self._transport is None or not self.is_usable:
            raise WireError("connection is closed")
        self._reply = Reply()
        self._is_in_body = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._done
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Drop the connection."""
        self.is_usable = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes came."""
        now = self._clock()
        self._buffer += data
        try:
            if not self._is_in_body and not self._take_head():
                return
            while self._take_body(now):
                pass
        except (ValueError, IndexError) as error:
            self._fail(WireError(f"no HTTP response: {error!r}"))

    def _take_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        self._reply.status = int(lines[0].split(b" ", 2)[1])
        pairs = (line.split(b":", 1) for line in lines[1:])
        self._reply.headers = {name.strip().lower(): value.strip() for name, value in pairs}
        headers = self._reply.headers
        self._is_chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._left = 0 if self._is_chunked else int(headers.get(b"content-length", b"-1"))
        self._is_in_body = True
        if self._left == 0 and not self._is_chunked:
            self._finish()
        return self._is_in_body

    def _take_body(self, now: float) -> bool:
        """Take one chunk (or all there is of a plain body); True when more may be ready."""
        if self._is_chunked:
            return self._take_chunk(now)
        self._feed(bytes(self._buffer), now)
        if self._left > 0:
            self._left -= len(self._buffer)
        self._buffer.clear()
        if self._left == 0:
            self._finish()
        return False

    def _take_chunk(self, now: float) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        size = int(bytes(self._buffer[:end]).split(b";")[0], 16)
        if len(self._buffer) < end + 2 + size + 2:
            return False
        self._feed(bytes(self._buffer[end + 2 : end + 2 + size]), now)
        del self._buffer[: end + 2 + size + 2]
        if size == 0:
            self._finish()
        return size > 0 and bool(self._buffer)

    def _feed(self, data: bytes, now: float) -> None:
        if not self._reply.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            self._reply.body += data
            return
        self._line += data
        *lines, rest = self._line.split(b"\n")
        self._line = bytearray(rest)
        for line in lines:
            if line.startswith(b"data:"):
                self._reply.events.append((now, bytes(line[5:]).strip()))

    def _finish(self) -> None:
        self._is_in_body = False
        self._line.clear()
        if self._reply.headers.get(b"connection", b"").lower() == b"close":
            self.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._reply)

    def _fail(self, error: WireError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        self.close()


class WirePool:
    """Connections to one server, reused."""

    def __init__(self, base_url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(base_url)
        self._host = parts.hostname or "127.0.0.1"
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._prefix = parts.path.rstrip("/")
        common = {"Host": parts.netloc, "Content-Type": "application/json", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in common.items())
        self._idle: list[Wire] = []

    def request(self, method: str, path: str, body: object | None = None) -> bytes:
        """The bytes of one request."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    async def exchange(self, request: bytes) -> Reply:
        """Send over an idle or new connection. WireError or OSError when that fails.

        A kept-alive connection may have been closed by the server in between, so a failure on a
        reused one is tried once more on a new one.
        """
        while self._idle:
            wire = self._idle.pop()
            if wire.is_usable:
                try:
                    return await self._on(wire, request)
                except WireError:
                    break
        return await self._on(await self._connect(), request)

    async def _on(self, wire: Wire, request: bytes) -> Reply:
        reply = await wire.exchange(request)
        if wire.is_usable:
            self._idle.append(wire)
        return reply

    async def _connect(self) -> Wire:
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(Wire, self._host, self._port, ssl=self._ssl)
        return wire

    def close(self) -> None:
        """Drop all idle connections."""
        for wire in self._idle:
            wire.close()
        self._idle.clear()

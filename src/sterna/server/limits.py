"""Reading a request body within the server's limits."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from sterna.core.errors import BodyTooLargeError, DeadlineError, RequestError
from sterna.server.config import ServerConfig


async def read_body(scope: Scope, receive: Receive, config: ServerConfig) -> bytes:
    """The whole body.

    Raises BodyTooLargeError before reading when `content-length` tells, else as soon as the
    bytes pass the limit; DeadlineError when the client is slower than `body_timeout_s`.
    """
    _check_length(scope, config.max_body_bytes)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await _collect(receive, config.max_body_bytes)
    except TimeoutError:
        raise DeadlineError(
            f"the body did not arrive within {config.body_timeout_s:g} s; send it faster"
        ) from None


def _check_length(scope: Scope, limit: int) -> None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            raise _too_large(int(value), limit)
        if name == b"content-encoding" and value.lower() != b"identity":
            raise RequestError(
                f"content-encoding {value.decode('latin-1')!r} is not supported; send plain JSON"
            )


async def _collect(receive: Receive, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise _too_large(size, limit)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def _too_large(size: int, limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the body has {size:,} bytes or more, the limit is {limit:,}; "
        "send less, or start the server with a larger max_body_bytes"
    )

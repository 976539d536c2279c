"""The outermost layer: a request id for every answer, also for a failure nobody foresaw, and one
log line for every request.

Pure ASGI. A layer that buffers (Starlette's BaseHTTPMiddleware) would hide disconnects and cost
a task switch a chunk.
"""

from __future__ import annotations

import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sterna.core.log import get_logger
from sterna.server.errors import internal_error

_log = get_logger(__name__)
_MAX_ID_CHARS = 128
# Asked for every few seconds by machines; they would drown the rest.
_QUIET = ("/health", "/metrics", "/engine/", "/web/")


class ContextMiddleware:
    """Echoes the client's `x-request-id` or makes one."""

    def __init__(self, app: ASGIApp, log_requests: bool) -> None:
        self._app = app
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log.exception("%s %s failed", scope["method"], request_id)
            if status:  # half an answer is out: closing the connection is all that can be said
                raise
            await internal_error(error)(scope, receive, send_with_id)
        finally:
            self._note(scope, request_id, status, time.monotonic() - started)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        # The path without its query: that may hold a key.
        path = ascii(scope["path"])[1:-1]
        log = _log.debug if not self._log_requests or path.startswith(_QUIET) else _log.info
        log("%s %s %d %.0f ms %s", scope["method"], path, status, seconds * 1e3, request_id)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    is_fit = 0 < len(given) <= _MAX_ID_CHARS and given.isascii() and given.isprintable()
    return given if is_fit else uuid.uuid4().hex

"""Errors on the wire: every status of every route carries OpenAI's body.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from sterna.core.errors import OverloadedError, SternaError
from sterna.core.log import get_logger

_log = get_logger(__name__)


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    """The JSON bytes of one OpenAI error."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def sterna_error_body(error: SternaError) -> bytes:
    """The JSON bytes of one of our errors; also sent inside a stream that has begun."""
    return error_body(error.message, error.error_type, error.code, error.param)


def error_response(error: SternaError) -> Response:
    """The whole HTTP answer for one of our errors, with Retry-After where it applies."""
    return _json(error.http_status, sterna_error_body(error), _headers(error))


def internal_error(error: Exception) -> Response:
    """The answer for an exception that nobody foresaw; its text may hold secrets and stays here."""
    message = f"internal error ({type(error).__name__}); the server's log has the details"
    return _json(500, error_body(message, "server_error", "internal_error"))


def install_error_handlers(app: FastAPI, count: Callable[[str], None]) -> None:
    """Route every exception of `app` through the functions above; `count` gets each code."""

    async def on_sterna_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, SternaError)
        count(error.code)
        if error.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.warning("%s %s: %s", request.method, request.url.path, error.message)
        return error_response(error)

    app.add_exception_handler(SternaError, on_sterna_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


def _headers(error: SternaError) -> dict[str, str]:
    if isinstance(error, OverloadedError):
        # Retry-After has whole seconds; the openai client prefers the exact header.
        wait = max(error.retry_after_s, 0.001)
        return {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1e3))}
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        return {"www-authenticate": "Bearer"}
    return {}


def _json(status: int, body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's number for "client closed"


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, code = _http_words(request, error)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return _json(error.status_code, error_body(message, kind, code), dict(error.headers or {}))


def _http_words(request: Request, error: HTTPException) -> tuple[str, str]:
    where = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return f"no such route: {where}; GET /docs lists the routes", "not_found"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{where} is not allowed; use {allowed}", "method_not_allowed"
    return f"{where}: {error.detail}", HTTPStatus(error.status_code).name.lower()

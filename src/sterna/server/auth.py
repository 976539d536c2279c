"""API keys: every route but /health needs one when any key is set.

A key comes as `Authorization: Bearer KEY` or, for the web page, as a cookie. `GET /?api_key=KEY`
sets that cookie once and redirects to `/`, so the key stays in no address bar, history or Referer.
The cookie holds an HMAC of the key, not the key: cookies are shared by all ports of a host, so
another local server may see it. It is HttpOnly and SameSite=Strict, so neither a script nor
another site can use it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sterna.core.errors import AuthError
from sterna.server.errors import error_response

COOKIE = "sterna_key"
OPEN_PATHS = frozenset({"/health"})
PAGE_PATH = "/"

_ASK_FOR_KEY = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Sterna: key</title>
<meta name="viewport" content="width=device-width"><style>:root{color-scheme:light dark}
body{font:1rem system-ui;max-width:24rem;margin:20vh auto;padding:0 1rem}
input,button{font:inherit;padding:.5rem}</style>
<form method="get" action="/"><p><label for="k">API key of this server</label></p>
<input id="k" name="api_key" type="password" autocomplete="current-password" required autofocus>
<button>Open</button></form></html>"""


class ApiKeys:
    """The accepted keys. All are compared, in constant time, whatever was given."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def has(self, key: str) -> bool:
        """True when `key` is one of the accepted keys."""
        given = key.encode("utf-8", "surrogateescape")
        return sum(hmac.compare_digest(given, known) for known in self._keys) > 0

    def has_cookie(self, value: str) -> bool:
        """True when `value` is the cookie of one of the accepted keys."""
        given = value.encode("utf-8", "surrogateescape")
        return sum(hmac.compare_digest(given, _cookie_of(known)) for known in self._keys) > 0


def cookie_value(key: str) -> str:
    """What the page's cookie holds for `key`."""
    return _cookie_of(key.encode()).decode()


def _cookie_of(key: bytes) -> bytes:
    return hmac.new(key, b"sterna page", hashlib.sha256).hexdigest().encode()


class AuthMiddleware:
    """Pure ASGI; answers 401 itself and lets the rest through untouched."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._check(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _check(self, scope: Scope) -> Response | None:
        if scope["path"] in OPEN_PATHS:
            return None
        headers = Headers(scope=scope)
        if self._has_bearer(headers) or self._has_cookie(headers):
            return None
        if scope["path"] == PAGE_PATH and scope.get("method") == "GET":
            return self._open_page(scope)
        return error_response(_missing_or_wrong(headers))

    def _has_bearer(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Header bytes arrive as latin-1 text; keys are compared as the bytes that were sent.
        sent = key.strip().encode("latin-1").decode("utf-8", "surrogateescape")
        return scheme.lower() == "bearer" and self._keys.has(sent)

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and self._keys.has_cookie(cookie.value)

    def _open_page(self, scope: Scope) -> Response:
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        key = query.get("api_key", [""])[0]
        if not self._keys.has(key):
            return HTMLResponse(_ASK_FOR_KEY, 401, {"www-authenticate": "Bearer"})
        answer = RedirectResponse(PAGE_PATH, 303, {"cache-control": "no-store"})
        secure = scope.get("scheme") == "https"
        answer.set_cookie(
            COOKIE, cookie_value(key), path="/", httponly=True, samesite="strict", secure=secure
        )
        return answer


def _missing_or_wrong(headers: Headers) -> AuthError:
    if "authorization" not in headers:
        return AuthError("no API key; send the header 'Authorization: Bearer <key>'")
    return AuthError("the API key is not one of this server's keys")

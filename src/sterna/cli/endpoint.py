"""One way to talk to a model: OpenAI requests, to a server or to the same app in this process.

`chat` and `complete` write OpenAI bodies and read OpenAI answers. With --url they go to a server;
without, the server's own app answers them in this process over ASGI, no socket in between. So a
prompt, a tool call or a JSON schema means the same thing in both, and no second path can differ.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from sterna.cli.adapted import with_adapter
from sterna.cli.flags import changed
from sterna.core.errors import ModelNotFoundError, RequestError, SternaError
from sterna.core.log import get_logger
from sterna.engine.config import EngineConfig

_log = get_logger(__name__)

AsgiApp = Callable[..., Awaitable[None]]

# A long prompt on a slow CPU may take minutes to its first token; connecting may not.
_TIMEOUT = httpx.Timeout(None, connect=5.0)


class EndpointError(SternaError):
    """The endpoint answered with an error, or not at all."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A connected model: `model` is the name that requests carry."""

    client: httpx.AsyncClient
    model: str

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """One whole answer, whatever its status. EndpointError when nobody answers."""
        try:
            return await self.client.post(path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of one streamed answer. RequestError or EndpointError when refused."""
        try:
            async with self.client.stream("POST", path, json={**body, "stream": True}) as response:
                if response.status_code != httpx.codes.OK:
                    raise refusal(response.status_code, await response.aread())
                async for event in _events(response):
                    yield event
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.TransportError) -> EndpointError:
        reason = str(error) or type(error).__name__
        return EndpointError(f"no answer from {self.client.base_url}: {reason}; is it running?")


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in _lines(response):
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            raise EndpointError(str(event["error"].get("message", event["error"])))
        yield event


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """By the event stream's rule; httpx's `aiter_lines` also cuts at U+2028, inside a text."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    yield rest


def refusal(status: int, content: bytes) -> SternaError:
    """The error an OpenAI error body speaks of; 4xx is the request's fault, 5xx the endpoint's."""
    try:
        body = json.loads(content)
        message = str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = content[:200].decode(errors="replace") or "no explanation"
    kind = RequestError if 400 <= status < 500 else EndpointError
    return kind(f"{message} (HTTP {status})")


@asynccontextmanager
async def open_endpoint(
    url: str, api_key: str, model: str, engine: EngineConfig
) -> AsyncIterator[Endpoint]:
    """A server's endpoint when `url` is given, else the model in this process."""
    if api_key and not url:
        _log.warning("--api-key has no effect without --url")
    if url and (names := changed(engine)):
        _log.warning("%s: engine settings have no effect with --url", ", ".join(sorted(names)))
    opened = remote(url, api_key, model) if url else in_process(model, engine)
    async with opened as endpoint:
        yield endpoint


@asynccontextmanager
async def remote(url: str, api_key: str, model: str) -> AsyncIterator[Endpoint]:
    """The server at `url` (with or without /v1); its first model when none is named."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=base, headers=headers, timeout=_TIMEOUT, limits=limits
    ) as client:
        yield Endpoint(client, model or (await served(client))[0])


async def served(client: httpx.AsyncClient) -> list[str]:
    """The models that may be asked, adapters among them. EndpointError, ModelNotFoundError."""
    try:
        response = await client.get("/v1/models")
    except httpx.TransportError as error:
        raise EndpointError(f"no server at {client.base_url}: {error}; is it running?") from error
    if response.status_code != httpx.codes.OK:
        raise refusal(response.status_code, response.content)
    models = response.json().get("data") or []
    if not models:
        raise ModelNotFoundError(f"{client.base_url} serves no model")
    return [str(one["id"]) for one in models]


@asynccontextmanager
async def in_process(model: str, config: EngineConfig) -> AsyncIterator[Endpoint]:
    """The model loaded here, behind the server's own app. Imports torch.

    An adapter that was named (adapted.py) answers in the model's place.
    """
    from sterna.engine.aio import AsyncEngine
    from sterna.engine.build import build_engine
    from sterna.server.app import create_app
    from sterna.server.config import ServerConfig

    model, config, adapter = with_adapter(model, config)
    engine = AsyncEngine(await asyncio.to_thread(build_engine, model, config))
    app = create_app(engine, ServerConfig.model_validate({"model": model, "log_requests": False}))
    async with (
        app.router.lifespan_context(app),  # starts the engine, and shuts it down
        httpx.AsyncClient(
            transport=InProcessTransport(app), base_url="http://in-process", timeout=None
        ) as client,
    ):
        yield Endpoint(client, adapter or (await served(client))[0])


class InProcessTransport(httpx.AsyncBaseTransport):
    """httpx over an ASGI app, streaming: httpx's own ASGI transport waits for the whole body."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Run the app on one request; the response's stream yields as the app sends."""
        exchange = _Exchange(request, await request.aread())
        exchange.start(self._app)
        status, headers = await exchange.head()
        return httpx.Response(status, headers=headers, stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One request and its response on the way through the app."""

    def __init__(self, request: httpx.Request, body: bytes) -> None:
        self._scope = _scope(request)
        self._body = body
        self._sent: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self._closed = asyncio.Event()
        self._is_body_read = False
        self._task: asyncio.Task[None] | None = None

    def start(self, app: AsgiApp) -> None:
        self._task = asyncio.create_task(self._run(app))

    async def _run(self, app: AsgiApp) -> None:
        try:
            await app(self._scope, self._receive, self._sent.put)
        finally:
            self._sent.put_nowait({"type": "end"})

    async def _receive(self) -> dict[str, Any]:
        if not self._is_body_read:
            self._is_body_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._closed.wait()
        return {"type": "http.disconnect"}

    async def head(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Status and headers; the app's own exception when it fails before them."""
        message = await self._sent.get()
        if message["type"] == "end":
            await self._finish()
            raise httpx.ReadError("the app ended without an answer")
        return message["status"], list(message.get("headers", ()))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self._sent.get())["type"] != "end":
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                break

    async def aclose(self) -> None:
        """The client has gone: tell the app, let it clean up."""
        self._closed.set()
        await self._finish()

    async def _finish(self) -> None:
        if self._task is not None:
            await self._task


def _scope(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.url.path,
        "raw_path": request.url.raw_path,
        "query_string": request.url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "server": ("in-process", 80),
        "client": ("in-process", 0),
    }

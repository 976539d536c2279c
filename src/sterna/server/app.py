"""The HTTP application over one engine: routes, layers and lifetime.

Layers from the outside in: request id and log, CORS, API key, routes. All are pure ASGI, so a
client that goes away is seen at once and a chunk passes them without a task switch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from sterna.server import pages, replies, schema, status
from sterna.server.adapters import answer_load, answer_unload
from sterna.server.auth import ApiKeys, AuthMiddleware
from sterna.server.chat import answer_chat
from sterna.server.completions import answer_completion
from sterna.server.config import ServerConfig
from sterna.server.context import ContextMiddleware
from sterna.server.embed_app import add_refusals
from sterna.server.embed_service import EmbedService
from sterna.server.errors import install_error_handlers
from sterna.server.openapi import ERRORS, body_of, install_openapi, responses_of
from sterna.server.service import Service, build_service
from sterna.server.tokens import answer_detokenize, answer_tokenize
from sterna.version import __version__

if TYPE_CHECKING:
    from sterna.engine.aio import AsyncEngine

_DESCRIPTION = (
    "OpenAI's API over Sterna's engine. Every route but /health needs the API key when one is set."
)
_Endpoint = Callable[..., Coroutine[Any, Any, Response]]
_Decorator = Callable[[_Endpoint], _Endpoint]


def create_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """The application. Its lifespan starts `engine` and shuts it down.

    Raises ConfigError when the key file cannot be read.
    """
    service = build_service(engine, config)
    app = new_app(service, config)
    _add_generation_routes(app, service)
    add_refusals(app, service.model.names[0])
    add_shared_routes(app, service)
    return app


def new_app(service: Service | EmbedService, config: ServerConfig) -> FastAPI:
    """An application with layers, lifetime and error answers, but no route yet."""
    app = FastAPI(
        title="Sterna",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        middleware=_layers(config),
        lifespan=lambda _: _lifespan(service),
    )
    app.state.service = service
    install_error_handlers(app, service.view.metrics.refused)
    install_openapi(app)
    return app


def add_shared_routes(app: FastAPI, service: Service | EmbedService) -> None:
    """What every server answers: models, health, metrics, the live view and the pages."""
    _add_model_routes(app, service)
    _add_engine_routes(app, service)
    _add_pages(app)


def _layers(config: ServerConfig) -> list[Middleware]:
    layers = [Middleware(ContextMiddleware, log_requests=config.log_requests)]
    if config.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "retry-after-ms"],
        )
        layers.append(cors)
    keys = ApiKeys(config.keys())
    if keys:
        layers.append(Middleware(AuthMiddleware, keys=keys))
    return layers


@asynccontextmanager
async def _lifespan(service: Service | EmbedService) -> AsyncIterator[None]:
    await service.engine.start()
    watcher = asyncio.create_task(_follow_steps(service))
    try:
        yield
    finally:
        service.view.is_closed = True
        watcher.cancel()
        await service.engine.shutdown()


async def _follow_steps(service: Service | EmbedService) -> None:
    async for step in service.engine.subscribe():
        service.view.note_step(step)


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    def post(path: str, body: type[schema.Body], reply: type[replies.Reply]) -> _Decorator:
        return app.post(
            path,
            response_class=Response,
            responses=responses_of(reply, *ERRORS),
            openapi_extra=body_of(body),
        )

    @post("/v1/chat/completions", schema.ChatBody, replies.ChatReply)
    async def chat_completions(request: Request) -> Response:
        return await answer_chat(service, request)

    @post("/v1/completions", schema.CompletionBody, replies.CompletionReply)
    async def completions(request: Request) -> Response:
        return await answer_completion(service, request)

    def change(path: str, body: type[schema.Body]) -> _Decorator:
        answers, extra = responses_of(None, 400, 401, 413, 503), body_of(body)
        return app.post(path, response_class=Response, responses=answers, openapi_extra=extra)

    @change("/v1/load_lora_adapter", schema.LoadAdapterBody)
    async def load_adapter(request: Request) -> Response:
        return await answer_load(service, request)

    @change("/v1/unload_lora_adapter", schema.UnloadAdapterBody)
    async def unload_adapter(request: Request) -> Response:
        return await answer_unload(service, request)

    @post("/tokenize", schema.TokenizeBody, replies.TokenizeReply)
    async def tokenize(request: Request) -> Response:
        return await answer_tokenize(service, request)

    @post("/detokenize", schema.DetokenizeBody, replies.DetokenizeReply)
    async def detokenize(request: Request) -> Response:
        return await answer_detokenize(service, request)


def _add_model_routes(app: FastAPI, service: Service | EmbedService) -> None:
    def get(path: str, reply: type[replies.Reply], *errors: int) -> _Decorator:
        responses = responses_of(reply, 401, *errors)
        return app.get(path, response_class=Response, responses=responses)

    @get("/v1/models", replies.ModelList)
    async def list_models() -> Response:
        return status.list_models(service)

    @get("/v1/models/{model_id:path}", replies.ModelCard, 404)
    async def show_model(model_id: str) -> Response:
        return status.show_model(service, model_id)

    @get("/health", replies.HealthReply, 503)
    async def health() -> Response:
        return status.show_health(service)

    @get("/version", replies.VersionReply)
    async def version() -> Response:
        return status.show_version()


def _add_engine_routes(app: FastAPI, service: Service | EmbedService) -> None:
    @app.get("/metrics", response_class=Response, responses=responses_of(None, 401))
    async def metrics() -> Response:
        return status.show_metrics(service)

    @app.get("/engine/state", response_class=Response, responses=responses_of(None, 401))
    async def engine_state() -> Response:
        return status.show_state(service)

    @app.get("/engine/steps", response_class=Response, responses=responses_of(None, 400, 401))
    async def engine_steps(request: Request) -> Response:
        return status.stream_steps(service, request)


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return pages.show_page()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return pages.show_docs(app)

    app.mount("/web", pages.PageFiles(directory=pages.WEB, check_dir=False))

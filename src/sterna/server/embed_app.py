"""The HTTP application over an embedder: layers, errors, metrics and lifetime as in app.py."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from sterna.core.errors import TaskError
from sterna.server import replies_embed, schema_embed
from sterna.server.config import ServerConfig
from sterna.server.embed_service import EmbedService, build_embed_service
from sterna.server.embeddings import answer_embeddings
from sterna.server.openapi import ERRORS, body_of, responses_of
from sterna.server.replies import Reply, TokenizeReply
from sterna.server.rerank import answer_rerank, answer_score
from sterna.server.schema import Body, TokenizeBody

if TYPE_CHECKING:
    from sterna.engine.embed_aio import AsyncEmbedder

Answer = Callable[[Request], Coroutine[Any, Any, Response]]
_Routes = tuple[tuple[str, type[Body], type[Reply]], ...]

ROUTES: _Routes = (
    ("/v1/embeddings", schema_embed.EmbeddingBody, replies_embed.EmbeddingReply),
    ("/v1/rerank", schema_embed.RerankBody, replies_embed.RerankReply),
    ("/v1/score", schema_embed.ScoreBody, replies_embed.ScoreReply),
)
_GENERATING = ("/v1/chat/completions", "/v1/completions", "/detokenize")


def create_embed_app(engine: AsyncEmbedder, config: ServerConfig) -> FastAPI:
    """The application. Its lifespan starts `engine` and shuts it down.

    Raises ConfigError when the key file cannot be read.
    """
    from sterna.server.app import add_shared_routes, new_app

    service = build_embed_service(engine, config)
    app = new_app(service, config)
    answers: tuple[Answer, ...] = (
        lambda request: answer_embeddings(service, request),
        lambda request: answer_rerank(service, request),
        lambda request: answer_score(service, request),
    )
    for (path, body, reply), answer in zip(ROUTES, answers, strict=True):
        add_post(app, path, body, reply, answer)
    add_post(app, "/tokenize", TokenizeBody, TokenizeReply, lambda r: _tokenize(service, r))
    for path in _GENERATING:
        app.add_api_route(path, _refusal(service), methods=["POST"], include_in_schema=False)
    add_shared_routes(app, service)
    return app


def add_post(app: FastAPI, path: str, body: type[Body], reply: type[Reply], answer: Answer) -> None:
    """A route that reads `body` and answers with `reply`, both in the OpenAPI document."""

    async def endpoint(request: Request) -> Response:
        return await answer(request)

    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        name=path,
        response_class=Response,
        responses=responses_of(reply, *ERRORS),
        openapi_extra=body_of(body),
    )


def add_refusals(app: FastAPI, model_name: str) -> None:
    """The routes of embedding models on a server whose model generates: a clear error."""

    async def refuse(request: Request) -> Response:
        raise TaskError(
            f"{model_name} is served to generate and answers no {request.url.path}; serve an "
            "embedding model, or this one with --task embed"
        )

    for path, _, _ in ROUTES:
        app.add_api_route(path, refuse, methods=["POST"], include_in_schema=False)


def _refusal(service: EmbedService) -> Answer:
    async def refuse(request: Request) -> Response:
        raise TaskError(
            f"{service.model.names[0]} is an embedding model and answers no {request.url.path}; "
            "use /v1/embeddings, /v1/rerank or /v1/score, or serve a model that generates"
        )

    return refuse


async def _tokenize(service: EmbedService, request: Request) -> Response:
    body = await service.body(TokenizeBody, request)
    service.model.check(body.model)
    if body.prompt is None:
        raise TaskError("an embedding model has no chat template; give prompt", param="prompt")
    tokenizer = service.engine.tokenizer
    ids = tokenizer.encode(body.prompt, body.add_special_tokens is not False)
    texts = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    reply = TokenizeReply(
        count=len(ids), max_model_len=service.model.max_model_len, tokens=ids, token_strs=texts
    )
    return Response(reply.to_json(), media_type="application/json")

"""The OpenAPI document. Routes parse and write their bodies themselves, so schemas are added here.

Giving FastAPI the models would make it build validators that nobody uses (0.2 s at start).
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sterna.server import replies, replies_embed, schema, schema_embed

_REF = "#/components/schemas/{model}"
BODIES = (
    schema.ChatBody,
    schema.CompletionBody,
    schema.TokenizeBody,
    schema.DetokenizeBody,
    schema.LoadAdapterBody,
    schema.UnloadAdapterBody,
    schema_embed.EmbeddingBody,
    schema_embed.RerankBody,
    schema_embed.ScoreBody,
)
REPLIES = (
    replies.ChatReply,
    replies.CompletionReply,
    replies.TokenizeReply,
    replies.DetokenizeReply,
    replies.ModelList,
    replies.ModelCard,
    replies.HealthReply,
    replies.VersionReply,
    replies.ErrorReply,
    replies_embed.EmbeddingReply,
    replies_embed.RerankReply,
    replies_embed.ScoreReply,
)
ERRORS = {
    400: "The request has to change.",
    401: "No key, or a wrong one.",
    404: "No such model.",
    408: "The deadline passed.",
    413: "The body is too large.",
    429: "The queue is full; see Retry-After.",
    500: "The engine failed on this request.",
    503: "The server stops or its engine stands still.",
}

Responses = dict[int | str, dict[str, Any]]


def body_of(kind: type[schema.Body]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `kind`."""
    return {"requestBody": {"required": True, "content": _content(kind)}}


def responses_of(reply: type[replies.Reply] | None, *errors: int) -> Responses:
    """`responses` of a route that answers with `reply` or one of these statuses."""
    found: Responses = {} if reply is None else {200: {"content": _content(reply)}}
    for code in errors:
        found[code] = {"description": ERRORS[code], "content": _content(replies.ErrorReply)}
    return found


def install_openapi(app: FastAPI) -> None:
    """Let `app.openapi()` know the schemas. Built at the first call, then kept."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this override


def _content(kind: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=kind.__name__)}}}


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _, bodies = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=_REF)
    _, answers = models_json_schema(
        [(kind, "serialization") for kind in REPLIES], ref_template=_REF
    )
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update({**answers["$defs"], **bodies["$defs"]})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]
    return document

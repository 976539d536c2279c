"""The OpenAPI document: bodies are parsed by `parse`, so their schemas are added here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from sterna.server import schema
from sterna.server.replies import ErrorReply

_REF = "#/components/schemas/{model}"
BODIES = (schema.ChatBody, schema.CompletionBody, schema.TokenizeBody, schema.DetokenizeBody)
# Statuses any route may answer with.
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The request has to change."},
    401: {"model": ErrorReply, "description": "No key, or a wrong one."},
    404: {"model": ErrorReply, "description": "No such model."},
    408: {"model": ErrorReply, "description": "The deadline passed."},
    413: {"model": ErrorReply, "description": "The body is too large."},
    429: {"model": ErrorReply, "description": "The queue is full; see Retry-After."},
    503: {"model": ErrorReply, "description": "The server stops or its engine stands still."},
}


def body_of(kind: type[schema.Body]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `kind`."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def install_openapi(app: FastAPI) -> None:
    """Let `app.openapi()` know the bodies. Built at the first call, then kept."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this override


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in BODIES], ref_template=_REF
    )
    document["components"]["schemas"].update(definitions["$defs"])
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]
    return document

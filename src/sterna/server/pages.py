"""The web page's files and /docs. All are local: both work without a network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

WEB = Path(__file__).parent / "web"
# Browsers ask whether a file changed (ETag) before they use their copy: upgrades show at once.
_REVALIDATE = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
# The scheme belongs to the root: on the body it would colour text and links but not the canvas.
_STYLE = """:root{color-scheme:light dark}
body{font:1rem/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;overflow-wrap:anywhere;
padding:.25rem .75rem .25rem 0;border-bottom:1px solid #8884}
code{font-size:.9em}summary{cursor:pointer;padding:.25rem 0}"""


class PageFiles(StaticFiles):
    """The page's scripts and styles."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_REVALIDATE)
        return response


def show_page() -> Response:
    """GET /."""
    return FileResponse(WEB / "index.html", headers=_REVALIDATE)


def show_docs(app: FastAPI) -> Response:
    """GET /docs: the OpenAPI document as a plain page (Swagger's scripts would need a network)."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    routes = [
        _route(path, method, operation, schemas)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Sterna: API</title>'
        f"<style>{_STYLE}</style><h1>{escape(app.title)} {escape(app.version)}</h1>"
        f"<p>{escape(app.description)} <a href='/openapi.json'>openapi.json</a></p>"
        f"{''.join(routes)}"
    )


def _route(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    title = f"<code>{method.upper()} {escape(path)}</code> {escape(operation.get('summary', ''))}"
    body = operation.get("requestBody")
    if body is None:
        return f"<p>{title}</p>"
    name = _ref_name(body["content"]["application/json"]["schema"])
    return f"<details><summary>{title}</summary>{_fields(schemas[name])}</details>"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}"
        f"<td><code>{escape(_type(field))}</code><td>{escape(field.get('description', ''))}"
        for name, field in schema.get("properties", {}).items()
    ]
    return f"<table><tr><th>field<th>type<th>meaning{''.join(rows)}</table>"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return _ref_name(field)
    if "anyOf" in field:
        return " | ".join(_type(option) for option in field["anyOf"])
    if "enum" in field:
        return " | ".join(repr(value) for value in field["enum"])
    if field.get("type") == "array":
        return f"[{_type(field.get('items', {}))}]"
    return str(field.get("type", "any"))


def _ref_name(schema: dict[str, Any]) -> str:
    return str(schema["$ref"]).rsplit("/", 1)[-1]

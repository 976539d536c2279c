"""Adapters at run time, in vLLM's shapes: POST /v1/load_lora_adapter, /v1/unload_lora_adapter.

Both are behind the API key like every route but /health. A path is one of the server's own
machine: whoever may load reads adapter files there, so set a key before the server is reachable.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sterna.core.errors import AdapterError, ModelError, UnknownModelError
from sterna.core.log import get_logger
from sterna.core.lookup import unknown
from sterna.server.schema import LoadAdapterBody, UnloadAdapterBody
from sterna.server.service import Service

if TYPE_CHECKING:
    from sterna.engine.adapters import AdapterTable

_log = get_logger(__name__)


def adapter_names(service: Service) -> list[str]:
    """Adapters that requests may name now."""
    table = service.engine.engine.adapters
    return [] if table is None else list(table.loaded)


def route(service: Service, asked: str | None) -> tuple[str, str]:
    """(name to answer with, adapter or "") of a request's `model`. UnknownModelError."""
    names = adapter_names(service)
    if asked in names:
        return str(asked), str(asked)
    if asked is not None and asked not in service.model.names:
        known = (*service.model.names, *names)
        raise UnknownModelError(unknown("model", asked[:200], known), param="model")
    return service.model.check(asked), ""


async def answer_load(service: Service, request: Request) -> Response:
    """Read, check and place an adapter; requests under way go on meanwhile."""
    from sterna.model.peft import read_peft

    body, table = await service.body(LoadAdapterBody, request), _table(service)
    if body.lora_name in service.model.names:
        raise AdapterError(
            f"lora_name {body.lora_name!r} is a name of the base model; choose another",
            param="lora_name",
        )
    folder = Path(body.lora_path).expanduser()
    try:
        found = await asyncio.to_thread(read_peft, folder)
    except ModelError as error:  # the request's path is at fault, not the server
        raise AdapterError(error.message, param="lora_path") from error
    await service.engine.between_steps(lambda: table.load(body.lora_name, found))
    _log.info("adapter %s loaded from %s", ascii(body.lora_name), ascii(str(folder)))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def answer_unload(service: Service, request: Request) -> Response:
    """No new request gets the adapter; those under way finish with it."""
    body, table = await service.body(UnloadAdapterBody, request), _table(service)
    await service.engine.between_steps(lambda: table.unload(body.lora_name))
    _log.info("adapter %s unloaded", ascii(body.lora_name))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _table(service: Service) -> AdapterTable:
    table = service.engine.engine.adapters
    if table is None:
        raise AdapterError(
            "this server has no places for adapters; start it with --max-loras N or --lora "
            "name=folder"
        )
    return table

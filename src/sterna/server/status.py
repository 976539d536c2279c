"""What the server says about itself: models, health, version, metrics and the live view."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sterna.core.errors import RequestError, ShuttingDownError
from sterna.engine.drafters.learner import LearnStats
from sterna.server.embed_service import EmbedService
from sterna.server.metrics import CONTENT_TYPE
from sterna.server.replies import HealthReply, ModelCard, ModelList, VersionReply
from sterna.server.service import Service
from sterna.server.stream import EventStream
from sterna.version import __version__

_PERSON_LIMIT = 2**53  # JavaScript's largest exact integer


def list_models(service: Service | EmbedService) -> Response:
    """GET /v1/models."""
    names = (*service.model.names, *_adapters(service))
    return _json(ModelList(data=[_card(service, name) for name in names]).to_json())


def show_model(service: Service | EmbedService, name: str) -> Response:
    """GET /v1/models/{id}; UnknownModelError for a model that is not served."""
    if name not in _adapters(service):
        service.model.check(name)
    return _json(_card(service, name).to_json())


def show_version() -> Response:
    """GET /version."""
    return _json(VersionReply(version=__version__).to_json())


def show_health(service: Service | EmbedService) -> Response:
    """GET /health: 200 while the engine makes progress or has nothing to do, else 503.

    Also 503 while the server drains, so that balancers send new requests elsewhere.
    """
    if service.view.is_draining:
        raise ShuttingDownError("the server is shutting down")
    service.engine.health()
    return _json(HealthReply().to_json())


def show_metrics(service: Service | EmbedService) -> Response:
    """GET /metrics: gauges are read now, counters and histograms have grown by themselves."""
    metrics, load = service.view.metrics, service.engine.load()
    metrics.running.set(load.num_running)
    metrics.waiting.set(load.num_waiting)
    metrics.kv_usage.set(load.kv_usage)
    learning = _learn_stats(service)
    if learning is not None:
        metrics.note_learning(learning)
    if isinstance(service, Service) and service.engine.engine.adapters is not None:
        table = service.engine.engine.adapters
        metrics.note_adapters(table.num_slots, *table.names_in_flight())
    return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})


def show_state(service: Service | EmbedService) -> Response:
    """GET /engine/state: the snapshot that the live page polls."""
    model, load = service.model, service.engine.load()
    state: dict[str, Any] = {
        "model": model.names[0],
        "machine": model.machine,
        "kernels": model.kernels,
        "token_budget": model.token_budget,
        "num_kv_blocks": model.num_kv_blocks,
        "block_size": model.block_size,
        "max_model_len": model.max_model_len,
        "policy": model.policy,
        "speculation": model.speculation,
        "prompt_layers": model.prompt_layers,
        "running": load.num_running,
        "waiting": load.num_waiting,
        "kv_usage": load.kv_usage,
        **service.view.latencies(),
        "totals": asdict(service.view.totals),
    }
    learning = _learn_stats(service)
    if learning is not None:
        state["speculator_learns"] = asdict(learning)
    return _json(json.dumps(state).encode())


def stream_steps(service: Service | EmbedService, request: Request) -> Response:
    """GET /engine/steps?since=N: every step above N as it happens, as server-sent events."""
    view = service.view
    pieces = view.stream(_since(request))
    return EventStream(pieces, lambda: None)


def _learn_stats(service: Service | EmbedService) -> LearnStats | None:
    """Of a speculator that learns while serving."""
    return service.engine.learning() if isinstance(service, Service) else None


def _since(request: Request) -> int:
    """The query's `since`, or the last event that a reconnecting browser saw; -1 = all kept."""
    text = request.query_params.get("since") or request.headers.get("last-event-id") or "-1"
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit():
        raise RequestError(f"since is {text[:40]!r}; give a step number", param="since")
    return min(int(text[:20]), _PERSON_LIMIT)


def _card(service: Service | EmbedService, name: str) -> ModelCard:
    model, path = service.model, _adapters(service).get(name)
    return ModelCard(
        id=name,
        created=model.created,
        root=path or model.root,
        parent=None if path is None else model.names[0],
        max_model_len=model.max_model_len,
    )


def _adapters(service: Service | EmbedService) -> dict[str, str]:
    """Name -> folder of the adapters that requests may name."""
    table = service.engine.engine.adapters if isinstance(service, Service) else None
    loaded = () if table is None else tuple(table.loaded.values())
    return {entry.name: entry.path for entry in loaded}


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")

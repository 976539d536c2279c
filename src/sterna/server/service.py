"""What every route shares: the engine, the settings, and what is served."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request

from sterna.engine.request import EngineRequest
from sterna.server.config import ServerConfig
from sterna.server.generation import Generation
from sterna.server.limits import read_body
from sterna.server.logprobs import LogprobWriter
from sterna.server.metrics import ServerMetrics
from sterna.server.parse import parse_body
from sterna.server.prompts import PromptBuilder
from sterna.server.schema import Body
from sterna.server.served import ServedModel, describe
from sterna.server.view import LiveView
from sterna.text.chat import ChatRenderer
from sterna.text.tools import ToolStyle, detect_style

if TYPE_CHECKING:
    from sterna.engine.aio import AsyncEngine

BodyT = TypeVar("BodyT", bound=Body)


@dataclass(frozen=True, slots=True)
class Service:
    """One app's parts. Routes are functions of it; it has no state of its own."""

    engine: AsyncEngine
    config: ServerConfig
    model: ServedModel
    prompts: PromptBuilder
    logprobs: LogprobWriter
    view: LiveView
    tool_style: ToolStyle

    async def body(self, kind: type[BodyT], request: Request) -> BodyT:
        """Read and validate the request's body."""
        raw = await read_body(request.scope, request.receive, self.config)
        return parse_body(kind, raw)

    def generation(self, requests: Sequence[EngineRequest]) -> Generation:
        """Start nothing yet: the engine sees the requests when `outputs` is iterated."""
        return Generation(self.engine, self.view, requests)


def build_service(engine: AsyncEngine, config: ServerConfig) -> Service:
    """All parts for one engine."""
    model = describe(engine, config)
    tokenizer = engine.tokenizer
    metrics = ServerMetrics(config.metrics_prefix, model.names[0])
    metrics.describe_cache(
        block_size=model.block_size,
        num_gpu_blocks=model.num_kv_blocks,  # vLLM's label, also for a CPU
        enable_prefix_caching=engine.engine.config.enable_prefix_cache,
    )
    style = config.tool_style
    return Service(
        engine=engine,
        config=config,
        model=model,
        prompts=PromptBuilder(tokenizer, ChatRenderer(tokenizer)),
        logprobs=LogprobWriter(tokenizer),
        view=LiveView(metrics),
        tool_style=detect_style(tokenizer.chat_template) if style == "auto" else ToolStyle(style),
    )


def new_id(kind: str) -> str:
    """A reply id such as `chatcmpl-6f...`; unique, whatever the client calls its request."""
    return f"{kind}-{uuid.uuid4().hex}"

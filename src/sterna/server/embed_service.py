"""What the routes of an embedding model share, and how one request's texts become rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect, Request

from sterna.core.errors import DeadlineError, RequestError
from sterna.server.config import ServerConfig
from sterna.server.limits import read_body
from sterna.server.metrics import ServerMetrics
from sterna.server.parse import parse_body
from sterna.server.schema import Body
from sterna.server.served import ServedModel, describe_embedder
from sterna.server.stream import watching
from sterna.server.view import LiveView

if TYPE_CHECKING:
    from sterna.engine.embed import Floats
    from sterna.engine.embed_aio import AsyncEmbedder
    from sterna.text.inputs import EncodedText

BodyT = TypeVar("BodyT", bound=Body)
_T = TypeVar("_T")
# OpenAI's limit on the inputs of one request.
MAX_INPUTS = 2048
# Characters; about 1 ms of tokenising. Less is done in place, more in a thread.
_INLINE_CHARS = 4096


@dataclass(frozen=True, slots=True)
class EmbedService:
    """One app's parts. Routes are functions of it; it has no state of its own."""

    engine: AsyncEmbedder
    config: ServerConfig
    model: ServedModel
    view: LiveView

    async def body(self, kind: type[BodyT], request: Request) -> BodyT:
        """Read and validate the request's body."""
        raw = await read_body(request.scope, request.receive, self.config)
        return parse_body(kind, raw)

    async def rows(self, request: Request, texts: Sequence[EncodedText]) -> Floats:
        """The rows of the texts. A client that goes away takes its texts out of the queue.

        Raises ClientDisconnect then, and DeadlineError after the server's default deadline.
        """
        started, tokens = time.monotonic(), sum(map(len, texts))
        work = asyncio.ensure_future(self.engine.run(texts))
        is_gone = False

        def leave() -> None:
            nonlocal is_gone
            is_gone = True
            work.cancel()

        try:
            async with (
                watching(request.receive, leave),
                asyncio.timeout(self.config.default_deadline_s),
            ):
                found = await work
        except TimeoutError:
            limit = self.config.default_deadline_s
            raise DeadlineError(f"not finished within {limit:g} s; send fewer texts") from None
        except asyncio.CancelledError:
            if is_gone:
                self._note(tokens, started, "abort")
                raise ClientDisconnect from None
            raise
        self._note(tokens, started, "stop")
        return found

    def _note(self, tokens: int, started: float, reason: str) -> None:
        metrics, totals = self.view.metrics, self.view.totals
        totals.requests += 1
        totals.prompt_tokens += tokens
        metrics.prompt_tokens.inc(tokens)
        metrics.req_prompt.observe(tokens)
        metrics.e2e.observe(time.monotonic() - started)
        metrics.succeeded(reason)


def build_embed_service(engine: AsyncEmbedder, config: ServerConfig) -> EmbedService:
    """All parts for one embedder."""
    model = describe_embedder(engine, config)
    metrics = ServerMetrics(config.metrics_prefix, model.names[0])
    return EmbedService(engine, config, model, LiveView(metrics))


async def off_loop(num_chars: int, work: Callable[[], _T]) -> _T:
    """Small work in place, large in a thread: tokenising gives up Python's lock."""
    return work() if num_chars <= _INLINE_CHARS else await asyncio.to_thread(work)


def check_count(count: int, param: str) -> None:
    """RequestError for no input or more than one request may hold."""
    if not 1 <= count <= MAX_INPUTS:
        raise RequestError(
            f"{param} holds {count:,} texts; send 1 to {MAX_INPUTS:,} a request", param=param
        )

"""POST /v1/embeddings: texts or token ids, as numbers or base64.

The answer is written by hand: 2,048 vectors are 800,000 numbers, which no general JSON writer
formats in the time that computing them takes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from sterna.kernels.floats import json_rows
from sterna.server.embed_service import EmbedService, check_count, off_loop
from sterna.server.schema_embed import EmbeddingBody
from sterna.server.stream import encode_json

if TYPE_CHECKING:
    from sterna.engine.embed import Floats
    from sterna.engine.embed_texts import Input
    from sterna.text.inputs import EncodedText


async def answer_embeddings(service: EmbedService, request: Request) -> Response:
    """The route."""
    from sterna.engine.embed_texts import check_dimensions, shortened

    body = await service.body(EmbeddingBody, request)
    model = service.model.check(body.model)
    embedder = service.engine.embedder
    check_dimensions(embedder, body.dimensions)
    service.engine.check_room()
    texts = await _encode(service, body)
    rows = shortened(embedder, await service.rows(request, texts), body.dimensions)
    is_base64 = body.encoding_format == "base64"
    tokens = sum(map(len, texts))
    reply = await off_loop(rows.size, lambda: write_reply(rows, model, tokens, is_base64))
    return Response(reply, media_type="application/json")


async def _encode(service: EmbedService, body: EmbeddingBody) -> list[EncodedText]:
    from sterna.engine.embed_texts import encode_inputs

    embedder, inputs = service.engine.embedder, as_inputs(body.input)
    check_count(len(inputs), "input")
    prompt = embedder.model.pooling.prompt(body.prompt_name)
    size = sum(map(len, inputs))
    return await off_loop(
        size, lambda: encode_inputs(embedder, inputs, prompt, body.truncate_prompt_tokens)
    )


def as_inputs(value: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> list[Input]:
    """A text or a list of token ids is one input."""
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        return [value]  # type: ignore[list-item]  # the union is told apart by its first item
    return list(value)  # type: ignore[arg-type]


def write_reply(rows: Floats, model: str, num_tokens: int, is_base64: bool) -> bytes:
    """The bytes of an EmbeddingReply for rows [N, D]."""
    if is_base64:
        raw = rows.astype("<f4", copy=False)
        values = [b'"' + base64.b64encode(row.tobytes()) + b'"' for row in raw]
    else:
        values = json_rows(rows)
    items = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (i, value)
        for i, value in enumerate(values)
    )
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (num_tokens, num_tokens)
    head = b'{"object":"list","model":' + encode_json(model).encode()
    return head + b',"data":[' + items + b'],"usage":' + usage + b"}"

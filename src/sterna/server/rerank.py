"""POST /v1/rerank and /v1/score: pairs of texts to scores.

A cross encoder reads both texts of a pair at once. An embedding model is asked for the vectors of
the distinct texts, and a score is the cosine of two of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from sterna.core.errors import RequestError
from sterna.server.embed_service import EmbedService, check_count, off_loop
from sterna.server.replies_embed import (
    EmbeddingUsage,
    RerankDocument,
    RerankItem,
    RerankReply,
    ScoreItem,
    ScoreReply,
)
from sterna.server.schema_embed import RerankBody, ScoreBody
from sterna.server.service import new_id

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Scores:
    """One score a pair, and what they cost."""

    values: list[float]
    usage: EmbeddingUsage


async def answer_rerank(service: EmbedService, request: Request) -> Response:
    """Documents by falling score."""
    body = await service.body(RerankBody, request)
    model = service.model.check(body.model)
    check_count(len(body.documents), "documents")
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    pairs = [(body.query, text) for text in texts]
    scores = await _scores(service, request, pairs, body.truncate_prompt_tokens)
    order = sorted(range(len(texts)), key=lambda i: -scores.values[i])[: body.top_n]
    results = [
        RerankItem(
            index=i,
            relevance_score=scores.values[i],
            document=RerankDocument(text=texts[i]) if body.return_documents else None,
        )
        for i in order
    ]
    reply = RerankReply(id=new_id("rerank"), model=model, results=results, usage=scores.usage)
    return Response(reply.to_json(), media_type="application/json")


async def answer_score(service: EmbedService, request: Request) -> Response:
    """Scores in the order of the pairs."""
    body = await service.body(ScoreBody, request)
    model = service.model.check(body.model)
    pairs = as_pairs(body.text_1, body.text_2)
    check_count(len(pairs), "text_2")
    scores = await _scores(service, request, pairs, body.truncate_prompt_tokens)
    reply = ScoreReply(
        id=new_id("score"),
        created=int(time.time()),
        model=model,
        data=[ScoreItem(index=i, score=value) for i, value in enumerate(scores.values)],
        usage=scores.usage,
    )
    return Response(reply.to_json(), media_type="application/json")


def as_pairs(left: str | Sequence[str], right: str | Sequence[str]) -> list[tuple[str, str]]:
    """One text against all, or pair by pair; RequestError when the counts do not fit."""
    lefts = [left] if isinstance(left, str) else list(left)
    rights = [right] if isinstance(right, str) else list(right)
    if len(lefts) == 1:
        lefts = lefts * len(rights)
    if len(lefts) != len(rights):
        raise RequestError(
            f"text_1 holds {len(lefts):,} texts, text_2 {len(rights):,}; give one text_1, or as "
            "many as text_2",
            param="text_1",
        )
    return list(zip(lefts, rights, strict=True))


async def _scores(
    service: EmbedService, request: Request, pairs: Pairs, truncate: int | None
) -> _Scores:
    from sterna.engine.embed_texts import cosines

    engine = service.engine
    engine.check_room()
    encoder, size = engine.embedder.encoder, sum(len(a) + len(b) for a, b in pairs)
    if engine.embedder.model.head is not None:
        texts = await off_loop(size, lambda: encoder.pairs(pairs, truncate))
        values = (await service.rows(request, texts))[:, 0]
    else:
        distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
        texts = await off_loop(size, lambda: encoder.texts(distinct, truncate))
        values = cosines(await service.rows(request, texts), distinct, pairs)
    tokens = sum(map(len, texts))
    return _Scores(values.tolist(), EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))

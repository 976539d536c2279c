"""Answers of the routes of embedding models."""

from __future__ import annotations

from typing import Literal

from sterna.server.replies import Reply


class EmbeddingUsage(Reply):
    """Token counts of one HTTP request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(Reply):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingReply(Reply):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingItem]
    usage: EmbeddingUsage


class RerankDocument(Reply):
    """A document of the request."""

    text: str


class RerankItem(Reply):
    """One document, best first; `index` is its place in the request."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankReply(Reply):
    """Answer of POST /v1/rerank."""

    id: str
    model: str
    results: list[RerankItem]
    usage: EmbeddingUsage


class ScoreItem(Reply):
    """The score of one pair."""

    object: Literal["score"] = "score"
    index: int
    score: float


class ScoreReply(Reply):
    """Answer of POST /v1/score."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreItem]
    usage: EmbeddingUsage

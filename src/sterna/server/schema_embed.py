"""Bodies of the routes of embedding models: OpenAI's embeddings, Jina's and vLLM's rerank, score.

As in `schema.py`: strict types, unknown fields are errors. `truncate_prompt_tokens` is vLLM's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sterna.server.schema import IGNORED, Body, TokenIds

_TRUNCATE = "cut longer inputs to so many tokens, -1 = to the model's limit; absent = refuse them"


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str | None = Field(None, description="a served model's name; absent = the only one")
    input: str | tuple[str, ...] | TokenIds | tuple[TokenIds, ...] = Field(
        description="text, texts, token ids or lists of token ids (taken as they are)"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float = numbers, base64 = little-endian float32; default float"
    )
    dimensions: int | None = Field(None, ge=1, description="only the first so many, at length 1")
    prompt_name: str | None = Field(
        None, description="one of the model's own prompts, put before each text"
    )
    truncate_prompt_tokens: int | None = Field(None, description=_TRUNCATE)
    user: str | None = Field(None, description=IGNORED)


class TextDocument(Body):
    """A document as an object."""

    text: str


class RerankBody(Body):
    """POST /v1/rerank."""

    model: str | None = None
    query: str = Field(description="what the documents are scored against")
    documents: tuple[str | TextDocument, ...] = Field(min_length=1, description="texts")
    top_n: int | None = Field(None, ge=1, description="only so many, the best; absent = all")
    return_documents: bool = Field(True, description="the answer repeats the documents")
    truncate_prompt_tokens: int | None = Field(None, description=_TRUNCATE)
    user: str | None = Field(None, description=IGNORED)


class ScoreBody(Body):
    """POST /v1/score: one text against one or many, or pair by pair."""

    model: str | None = None
    text_1: str | tuple[str, ...] = Field(description="a text, or as many as text_2")
    text_2: str | tuple[str, ...] = Field(description="a text or texts")
    truncate_prompt_tokens: int | None = Field(None, description=_TRUNCATE)
    user: str | None = Field(None, description=IGNORED)

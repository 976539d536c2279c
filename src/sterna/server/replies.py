"""Response bodies: OpenAI's shapes, with `sterna` timings and vLLM's `prompt_logprobs` beside."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishName = Literal["stop", "length", "tool_calls"]
# One dict a prompt token, by token id; null for the first token.
PromptLogprobs = list[dict[int, dict[str, Any]] | None]


class Reply(BaseModel):
    """Base of every response body and its parts."""

    model_config = ConfigDict(frozen=True)

    def to_json(self) -> bytes:
        """The bytes on the wire."""
        return self.model_dump_json().encode()


class CachedTokens(Reply):
    """Prompt tokens whose KV came from the prefix cache."""

    cached_tokens: int = 0


class Usage(Reply):
    """Token counts of one HTTP request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Timing(Reply):
    """Seconds from arrival: until scheduled, until the first token, until the end."""

    queue_s: float | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None


class TopLogprob(Reply):
    """One candidate token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobReply(TopLogprob):
    """The chosen token and its rivals."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """One entry a completion token."""

    content: list[TokenLogprobReply]


class FunctionCallReply(Reply):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallReply(Reply):
    """One call."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCallReply


class AssistantMessage(Reply):
    """What the model said. `content` is null when it only called tools."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(Reply):
    """One of the n completions."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishName
    stop_reason: int | str | None


class ChatReply(Reply):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    sterna: Timing


class CompletionLogprobs(Reply):
    """Parallel lists, one entry a token; the first prompt token has null."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Reply):
    """One completion; choice `i * n + j` is sample j of prompt i."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishName
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionReply(Reply):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    sterna: Timing


class ModelCard(Reply):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["sterna"] = "sterna"
    root: str
    parent: str | None = None  # an adapter's base model
    max_model_len: int


class ModelList(Reply):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeReply(Reply):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(Reply):
    """Answer of POST /detokenize."""

    prompt: str


class HealthReply(Reply):
    """Answer of GET /health while the engine makes progress."""

    status: Literal["ok"] = "ok"


class VersionReply(Reply):
    """Answer of GET /version."""

    version: str


class ErrorDetail(Reply):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """The body of every status from 400 on."""

    error: ErrorDetail

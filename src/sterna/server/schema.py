"""Request bodies: OpenAI's fields, vLLM's extra sampling fields, and nothing else.

Types are strict (a string is no number). An unknown field is an error. Ranges that the engine
checks (`engine.validate`) are not repeated here. A field typed `None` belongs to OpenAI's API but
cannot be honoured: it may be absent or null, anything else is refused with its description.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sterna.engine.request import MAX_N

# Token ids fit int32 everywhere below; the engine checks them against the vocabulary.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = tuple[TokenId, ...]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
JSONObject = dict[str, Any]
IGNORED = "accepted and without effect here"


class Body(BaseModel):
    """Base of every request body and its parts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool = Field(default=False, description="a last chunk with the token counts")
    continuous_usage_stats: bool = Field(default=False, description="token counts in every chunk")
    include_obfuscation: bool | None = Field(default=None, description=IGNORED)


class JSONSchemaFormat(Body):
    """A named JSON schema."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    name: str = Field("schema", description="a name for people")
    description: str | None = Field(None, description="a description for people")
    json_schema: JSONObject = Field(alias="schema", description="the JSON schema")
    strict: bool | None = Field(None, description="ignored: the schema is always enforced")


class ResponseFormat(Body):
    """OpenAI's structured output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = Field(None, description="for type json_schema")


class StructuredOutputs(Body):
    """vLLM's structured output: exactly one of the fields."""

    json_: JSONObject | str | None = Field(None, alias="json", description="JSON schema")
    json_object: bool | None = Field(None, description="any JSON object")
    regex: str | None = Field(None, description="regular expression")
    choice: tuple[str, ...] | None = Field(None, description="one of these strings")
    grammar: str | None = Field(None, description="Lark grammar")


class GenerationBody(Body):
    """Fields that chat and plain completions share."""

    model: str | None = Field(None, description="a served model's name; absent = the only one")
    stream: bool | None = Field(None, description="answer by server-sent events")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_N, description="completions for each prompt")
    max_tokens: int | None = Field(None, ge=0, description="most completion tokens")
    min_tokens: int = Field(0, description="no end before so many tokens")
    temperature: float | None = Field(None, description="0 = greedy")
    top_p: float | None = Field(None, description="nucleus mass")
    top_k: int | None = Field(None, description="0 or -1 = off")
    min_p: float | None = Field(None, description="smallest share of the top probability")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = Field(None, description="token id -> -100..100")
    allowed_token_ids: TokenIds | None = Field(None, description="only these tokens")
    bad_words: tuple[str, ...] | None = Field(None, description="strings never to produce")
    seed: Seed | None = Field(None, description="the same seed gives the same tokens")
    stop: str | tuple[str, ...] | None = Field(None, description="strings that end the text")
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    speculation: bool | None = Field(
        None, description="guess tokens ahead (output unchanged); null = as the server is set"
    )
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(None, description="top candidates a prompt token")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JSONObject | str | None = Field(None, description="as structured_outputs.json")
    guided_regex: str | None = Field(None, description="as structured_outputs.regex")
    guided_choice: tuple[str, ...] | None = Field(None, description="structured_outputs.choice")
    guided_grammar: str | None = Field(None, description="as structured_outputs.grammar")
    cache_salt: str | None = Field(None, description="prefix blocks are shared within one salt")
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="lower runs first")
    deadline_s: float | None = Field(None, gt=0, description="seconds until the request ends")
    timeout: float | None = Field(None, gt=0, description="as deadline_s")
    user: str | None = Field(None, description=IGNORED)
    metadata: JSONObject | None = Field(None, description=IGNORED)
    store: bool | None = Field(None, description=IGNORED)
    service_tier: str | None = Field(None, description=IGNORED)
    safety_identifier: str | None = Field(None, description=IGNORED)
    prompt_cache_key: str | None = Field(None, description=IGNORED)
    prompt_cache_retention: str | None = Field(None, description=IGNORED)


class TextPart(Body):
    """A text piece of a message."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


class FunctionCall(Body):
    """A call that the model made earlier; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call with its id."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, description=IGNORED)


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="for templates that use it")
    refusal: str | None = Field(None, description=IGNORED)
    annotations: tuple[Any, ...] | None = Field(None, description=IGNORED)
    audio: None = Field(None, description="this server reads and writes text only")
    function_call: None = Field(None, description="deprecated by OpenAI; use tool_calls")

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self


class FunctionSpec(Body):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: JSONObject | None = Field(None, description="JSON schema of the arguments")
    strict: bool | None = Field(None, description="arguments are enforced for forced calls only")


class Tool(Body):
    """A tool; only functions exist."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Body):
    """The name inside a forced choice."""

    name: str = Field(max_length=64)


class NamedTool(Body):
    """Forces one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class TemplateBody(Body):
    """How a conversation becomes a prompt."""

    messages: tuple[Message, ...] = Field(min_length=1)
    tools: tuple[Tool, ...] | None = None
    add_generation_prompt: bool | None = Field(None, description="default: true")
    continue_final_message: bool = Field(False, description="the model continues the last one")
    chat_template_kwargs: JSONObject | None = Field(None, description="variables of the template")


class ChatBody(TemplateBody, GenerationBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=0, description="as max_tokens")
    logprobs: bool | None = Field(None, description="log-probabilities of the chosen tokens")
    top_logprobs: int | None = Field(None, ge=0, description="and of so many candidates")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(
        None, description="false = at most one call; true = a forced answer may hold several"
    )
    modalities: tuple[Literal["text"], ...] | None = Field(None, description="text only")
    functions: None = Field(None, description="deprecated by OpenAI; use tools")
    function_call: None = Field(None, description="deprecated by OpenAI; use tool_choice")
    audio: None = Field(None, description="this server reads and writes text only")
    prediction: None = Field(None, description="predicted outputs are not supported")
    web_search_options: None = Field(None, description="this server does not search the web")
    reasoning_effort: None = Field(None, description="use chat_template_kwargs instead")
    verbosity: None = Field(None, description="ask for it in the prompt instead")


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | tuple[str, ...] | TokenIds | tuple[TokenIds, ...] = Field(
        description="text, texts, token ids or lists of token ids"
    )
    echo: bool | None = Field(None, description="the answer starts with the prompt")
    logprobs: int | None = Field(None, ge=0, description="top candidates a token")
    add_special_tokens: bool = Field(True, description="e.g. a BOS token before a text")
    suffix: None = Field(None, description="filling in the middle is not supported")
    best_of: None = Field(None, description="not supported; use n and choose yourself")


class TokenizeBody(Body):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = Field(None, description="a text; or give messages")
    messages: tuple[Message, ...] | None = Field(None, min_length=1)
    tools: tuple[Tool, ...] | None = None
    add_special_tokens: bool | None = Field(None, description="default: true for a text")
    add_generation_prompt: bool | None = Field(None, description="default: true")
    continue_final_message: bool = False
    chat_template_kwargs: JSONObject | None = None
    return_token_strs: bool = Field(False, description="the tokens' texts as well")


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=200, description="what requests ask for")
    lora_path: str = Field(min_length=1, description="folder of PEFT's files on this machine")


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=200, description="a loaded adapter")
    lora_int_id: int | None = Field(None, description=IGNORED)

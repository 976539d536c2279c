"""What goes into the engine and what comes out. No torch: server, CLI and clients use these.

A request asks for `n` samples of one prompt; each sample is one sequence. Every request is
answered: the last RequestOutput of a request has `is_finished=True`, and each of its `n` samples
has had exactly one Delta with a `finish_reason`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from sterna.core.errors import SternaError

# OpenAI allows 20 top logprobs; the same bound keeps a step's logprob work small.
MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_BIAS_TOKENS = 1024


class FinishReason(StrEnum):
    """Why a sample ended. `abort` is the client's or the deadline's doing, `error` ours."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class StructuredSpec:
    """The language the completion must belong to.

    `value` is the JSON schema text, the regex, the Lark grammar, or for `choice` a JSON list of
    strings; for `json_object` it is empty.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Defaults follow OpenAI's API; `temperature=0` is greedy.

    Validated by `engine.validate.check_params` (RequestError names the field, the given value
    and the allowed range) before a request enters the queue.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    seed: int | None = None  # None = drawn by the engine; the same seed gives the same tokens
    max_tokens: int | None = None  # None = up to the model's context
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # top candidates a token, 0 = only the chosen one
    prompt_logprobs: int | None = None
    # raw: of the model's own softmax; processed: of what is drawn from (temperature, top_k, top_p,
    # min_p; of the plain softmax where greedy), as policy gradients need it
    logprobs_mode: Literal["raw", "processed"] = "raw"
    structured: StructuredSpec | None = None
    speculation: bool | None = None  # may tokens be guessed ahead; None = as the engine is set
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt and what to do with it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    cache_salt: str = ""  # prefix-cache blocks are shared only within one salt (tenant)
    adapter: str = ""  # name of a loaded adapter; empty = the base model
    priority: int = 0  # lower runs first; equal priorities are FIFO
    deadline_s: float | None = None  # seconds after arrival; then finished with `abort`


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log) of one chosen token, by default of the raw logits' softmax."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most probable token
    top: tuple[tuple[int, float], ...] = ()  # (token_id, logprob), most probable first


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one sample gained in one step. `text` may lag behind `token_ids` (stop hold-back)."""

    index: int  # which of the n samples
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that fired
    error: SternaError | None = None  # set iff finish_reason is ERROR or a deadline ABORT


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """Seconds on the monotonic clock; None until the event happened."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one step did for one request."""

    request_id: str
    deltas: tuple[Delta, ...]
    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens that came from the prefix cache
    timing: RequestTiming
    is_finished: bool = False
    # On the first output only, when asked for: one entry a prompt token; the first is None.
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class DraftResult:
    """What became of one draft: of `num_tokens` guesses the first `num_accepted` were right."""

    source: str  # which drafter
    num_tokens: int
    num_accepted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One engine step, for metrics and the live page. Times in seconds."""

    step: int
    started: float  # monotonic
    duration: float
    num_decode_tokens: int
    num_prompt_tokens: int
    num_running: int
    num_waiting: int
    num_preempted: int
    kv_usage: float  # 0..1, blocks held by sequences / all blocks
    token_budget: int
    num_draft_tokens: int = 0  # rows of guesses, beside the decodes' own
    drafts: tuple[DraftResult, ...] = ()

"""Refuse bad requests before they reach the queue. A RequestError names field, value and range."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sterna.core.errors import ContextLengthError, RequestError
from sterna.engine.request import (
    MAX_BIAS_TOKENS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRINGS,
    EngineRequest,
    SamplingParams,
)

# Bounds on user text that every token's work is proportional to.
MAX_STOP_CHARS = 1024
MAX_BAD_WORDS = 256
# OpenAI's range; beyond it a bias is a ban or a force anyway.
MAX_BIAS = 100.0
MAX_SEED_BITS = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What this engine can serve."""

    vocab_size: int
    max_model_len: int  # prompt + completion tokens
    max_pool_tokens: int  # tokens the whole KV cache holds
    skips_prompt_rows: bool = False  # prompt tokens get no logits (SwiftKV)


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError for the first field that has a wrong type or is out of range."""
    _check_types(params)
    _check_numbers(params)
    _check_counts(params)
    _check_texts(params)
    _check_logprobs(params)
    for name in ("allowed_token_ids", "stop_token_ids", "logit_bias"):
        _check_ids(name, list(getattr(params, name)), vocab_size)
    for token_id, bias in params.logit_bias.items():
        _within(f"logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS, "logit_bias")


def check_prompt(request: EngineRequest, limits: Limits) -> None:
    """RequestError when the prompt is empty, has unknown ids or log-probs that nobody computes,
    ContextLengthError when it does not fit together with what is asked for.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        raise RequestError("the prompt is empty; give at least 1 token", param="prompt")
    if request.params.prompt_logprobs is not None and limits.skips_prompt_rows:
        raise RequestError(
            "prompt_logprobs is set, but this is a SwiftKV model: its prompt tokens run only the "
            "first layers and have no log-probs; leave it out (and echo with logprobs), or serve "
            "the model it was made of",
            param="prompt_logprobs",
        )
    _check_length(len(prompt), request.params, limits)
    # min and max of a tuple: exact for ids of any size, where an array would overflow.
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < limits.vocab_size:
            raise RequestError(
                f"prompt has token id {token_id}; ids are 0 to {limits.vocab_size - 1}",
                param="prompt",
            )


def max_output_tokens(request: EngineRequest, limits: Limits) -> int:
    """Tokens one sample may generate: max_tokens, cut to what context and KV cache hold."""
    room = min(limits.max_model_len, limits.max_pool_tokens) - len(request.prompt_token_ids)
    asked = request.params.max_tokens
    return room if asked is None else min(asked, room)


def _check_length(num_prompt: int, params: SamplingParams, limits: Limits) -> None:
    asked = params.max_tokens if params.max_tokens is not None else 1
    total = num_prompt + max(asked, 0)
    for limit, what in (
        (limits.max_model_len, "the model's context"),
        (limits.max_pool_tokens, "the KV cache"),
    ):
        if num_prompt + min(asked, 1) > limit:
            raise ContextLengthError(
                f"prompt has {num_prompt:,} tokens, {what} holds {limit:,} with the completion; "
                "shorten the prompt",
                param="prompt",
            )
        if total > limit:
            raise ContextLengthError(
                f"prompt has {num_prompt:,} tokens and max_tokens is {asked:,}, together "
                f"{total:,}; {what} holds {limit:,}; lower max_tokens to {limit - num_prompt:,} "
                "or shorten the prompt",
                param="max_tokens",
            )


_NUMBERS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
_COUNTS = (
    "n", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "seed",
)  # fmt: skip
_LISTS = ("stop", "bad_words", "stop_token_ids", "allowed_token_ids")


def _check_types(p: SamplingParams) -> None:
    """The server's bodies are checked already; callers of the offline API are not."""
    for names, kinds, what in (
        (_NUMBERS, (int, float), "a number"),
        (_COUNTS, (int, type(None)), "a whole number"),
        # A string would pass as a list of its characters.
        (_LISTS, (tuple, list), "a list or tuple"),
    ):
        for name in names:
            value = getattr(p, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise RequestError(f"{name} is {value!r}; it has to be {what}", param=name)


def _check_numbers(p: SamplingParams) -> None:
    _within("temperature", p.temperature, 0.0, 100.0)
    _within("top_p", p.top_p, 0.0, 1.0)
    if p.top_p == 0:
        raise RequestError("top_p is 0; allowed is above 0 up to 1", param="top_p")
    _within("min_p", p.min_p, 0.0, 1.0)
    _within("presence_penalty", p.presence_penalty, -2.0, 2.0)
    _within("frequency_penalty", p.frequency_penalty, -2.0, 2.0)
    _within("repetition_penalty", p.repetition_penalty, 0.01, 100.0)


def _check_counts(p: SamplingParams) -> None:
    _within("n", p.n, 1, MAX_N)
    _within("top_k", p.top_k, -1, 2**31 - 1)
    _within("max_tokens", p.max_tokens, 0, 2**31 - 1)
    _within("min_tokens", p.min_tokens, 0, 2**31 - 1)
    _within("logprobs", p.logprobs, 0, MAX_LOGPROBS)
    _within("prompt_logprobs", p.prompt_logprobs, 0, MAX_LOGPROBS)
    _within("seed", p.seed, -(2 ** (MAX_SEED_BITS - 1)), 2**MAX_SEED_BITS - 1)
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise RequestError(
            f"min_tokens is {p.min_tokens}, more than max_tokens ({p.max_tokens}); lower it",
            param="min_tokens",
        )


def _check_logprobs(p: SamplingParams) -> None:
    """A processed log-prob is one that a trainer can compute again, of logits and four numbers."""
    if p.logprobs_mode == "raw" or p.logprobs is None:
        return
    others = {
        "logprobs (0 is served: of the chosen token)": p.logprobs > 0,
        "penalties": p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0,
        "logit_bias": p.logit_bias,
        "allowed_token_ids": p.allowed_token_ids,
        "bad_words": p.bad_words,
        "min_tokens": p.min_tokens,
        "structured output": p.structured,
    }
    for name, is_set in others.items():
        if is_set:
            raise RequestError(
                f"logprobs_mode is processed, which does not go with {name}; leave that out, or "
                "ask for raw ones",
                param="logprobs_mode",
            )


def _check_texts(p: SamplingParams) -> None:
    _within("number of stop strings", len(p.stop), 0, MAX_STOP_STRINGS, "stop")
    _within("number of bad words", len(p.bad_words), 0, MAX_BAD_WORDS, "bad_words")
    _within("number of biased tokens", len(p.logit_bias), 0, MAX_BIAS_TOKENS, "logit_bias")
    for name, texts in (("stop", p.stop), ("bad_words", p.bad_words)):
        for text in texts:
            _within(f"length of a {name} string", len(text), 1, MAX_STOP_CHARS, name)


def _check_ids(name: str, ids: list[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name} has token id {token_id}; ids are 0 to {vocab_size - 1}", param=name
            )


def _within(
    what: str, value: float | None, low: float, high: float, param: str | None = None
) -> None:
    """RequestError unless low <= value <= high (NaN fails). None is 'not given' and passes."""
    if value is None or (math.isfinite(value) and low <= value <= high):
        return
    raise RequestError(f"{what} is {value}; allowed is {low:g} to {high:g}", param=param or what)

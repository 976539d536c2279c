"""Request bodies to the engine's terms: sampling parameters, structured output, deadlines."""

from __future__ import annotations

import json
from typing import TypeVar

from sterna.core.errors import RequestError
from sterna.engine.request import SamplingParams, StructuredSpec
from sterna.server.config import ServerConfig
from sterna.server.schema import GenerationBody, JSONObject, ResponseFormat, StructuredOutputs

_T = TypeVar("_T")


def sampling_params(
    body: GenerationBody,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    structured: StructuredSpec | None,
) -> SamplingParams:
    """OpenAI's null means "the default"; ranges are the engine's to check."""
    return SamplingParams(
        n=_or(body.n, 1),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=0 if body.top_k == -1 else _or(body.top_k, 0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_or(body.logit_bias, {}),
        allowed_token_ids=_or(body.allowed_token_ids, ()),
        bad_words=_or(body.bad_words, ()),
        seed=body.seed,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else _or(body.stop, ()),
        stop_token_ids=_or(body.stop_token_ids, ()),
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured=structured,
        speculation=body.speculation,
        skip_special_tokens=body.skip_special_tokens,
    )


def structured_spec(body: GenerationBody) -> StructuredSpec | None:
    """The one constraint that the body asks for; RequestError when it asks for two."""
    found = _from_guided(body)
    if body.response_format is not None:
        found["response_format"] = _from_response_format(body.response_format)
    if body.structured_outputs is not None:
        found["structured_outputs"] = _from_structured_outputs(body.structured_outputs)
    given = {name: spec for name, spec in found.items() if spec is not None}
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} exclude each other; give one")
    return next(iter(given.values()), None)


def deadline(body: GenerationBody, config: ServerConfig) -> float | None:
    """Seconds after arrival, or None. RequestError when longer than the server allows."""
    if None not in (body.deadline_s, body.timeout) and body.deadline_s != body.timeout:
        raise RequestError("deadline_s and timeout differ; give one", param="timeout")
    asked = body.deadline_s if body.deadline_s is not None else body.timeout
    if asked is None:
        return config.default_deadline_s
    if asked > config.max_deadline_s:
        raise RequestError(
            f"deadline_s is {asked:g}, the longest allowed is {config.max_deadline_s:g} s",
            param="deadline_s",
        )
    return asked


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _from_guided(body: GenerationBody) -> dict[str, StructuredSpec | None]:
    return {
        "guided_json": _json_schema(body.guided_json),
        "guided_regex": _regex(body.guided_regex),
        "guided_choice": _choice(body.guided_choice),
        "guided_grammar": _grammar(body.guided_grammar),
    }


def _from_response_format(form: ResponseFormat) -> StructuredSpec | None:
    if form.type == "json_schema" and form.json_schema is None:
        raise RequestError(
            "response_format.json_schema is required for type json_schema",
            param="response_format.json_schema",
        )
    if form.type == "json_schema" and form.json_schema is not None:
        return _json_schema(form.json_schema.json_schema)
    return StructuredSpec("json_object") if form.type == "json_object" else None


def _from_structured_outputs(spec: StructuredOutputs) -> StructuredSpec | None:
    options = [
        _json_schema(spec.json_),
        _regex(spec.regex),
        _choice(spec.choice),
        _grammar(spec.grammar),
        StructuredSpec("json_object") if spec.json_object else None,
    ]
    given = [option for option in options if option is not None]
    if len(given) != 1:
        raise RequestError(
            f"structured_outputs has {len(given)} constraints; give exactly one of json, "
            "json_object, regex, choice, grammar",
            param="structured_outputs",
        )
    return given[0]


def _json_schema(value: JSONObject | str | None) -> StructuredSpec | None:
    if value is None:
        return None
    return StructuredSpec("json_schema", value if isinstance(value, str) else json.dumps(value))


def _regex(value: str | None) -> StructuredSpec | None:
    return None if value is None else StructuredSpec("regex", value)


def _choice(value: tuple[str, ...] | None) -> StructuredSpec | None:
    return None if value is None else StructuredSpec("choice", json.dumps(value))


def _grammar(value: str | None) -> StructuredSpec | None:
    return None if value is None else StructuredSpec("grammar", value)

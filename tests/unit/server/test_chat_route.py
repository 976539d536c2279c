"""Chat completions: shapes, streaming equals whole answers, tools, logprobs, refusals."""

from __future__ import annotations

import asyncio
import json

import pytest

from sterna.core.errors import GrammarError, OverloadedError, StepError

URL = "/v1/chat/completions"
ASK = {"model": "tern", "messages": [{"role": "user", "content": "Hi"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def run(coroutine):
    return asyncio.run(coroutine)


def post(connect, body, **settings):
    async def go():
        async with connect(**settings) as client:
            return await client.post(URL, json=body)

    return run(go())


def join_stream(chunks):
    """What a client makes of a stream: content, calls, finish reasons by choice."""
    joined = {}
    for chunk in chunks:
        if chunk == "[DONE]":
            continue
        for choice in chunk["choices"]:
            one = joined.setdefault(choice["index"], {"content": "", "calls": {}, "finish": None})
            one["content"] += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                kept = one["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                kept["name"] += call["function"].get("name", "")
                kept["arguments"] += call["function"]["arguments"]
            one["finish"] = choice["finish_reason"] or one["finish"]
    return joined


def test_whole_answer_has_openai_shape(connect):
    reply = post(connect, ASK)
    assert reply.status_code == 200
    body = reply.json()
    assert body["object"] == "chat.completion" and body["model"] == "tern"
    choice = body["choices"][0]
    assert choice["message"]["content"] == "Hello w\u00f6rld, how are you?"
    assert choice["message"]["role"] == "assistant" and choice["message"]["tool_calls"] is None
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len("Hello w\u00f6rld, how are you?".encode())
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert 0 <= body["sterna"]["queue_s"] <= body["sterna"]["ttft_s"] <= body["sterna"]["e2e_s"]


def test_stream_joins_to_the_whole_answer(connect, events):
    body = {**ASK, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    reply = post(connect, body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = events(reply.text)
    assert chunks[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    joined = join_stream(chunks)
    for index in (0, 1):
        assert joined[index]["content"] == "Hello w\u00f6rld, how are you?"
        assert joined[index]["finish"] == "stop"
    last = chunks[-2]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1


def test_no_usage_unless_asked_and_running_usage_when_asked(connect, events):
    plain = events(post(connect, {**ASK, "stream": True}).text)
    assert all("usage" not in chunk for chunk in plain[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**ASK, "stream": True, "stream_options": options}
    counts = [c["usage"]["completion_tokens"] for c in events(post(connect, body).text)[:-1]]
    assert counts == sorted(counts) and counts[0] > 0


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (
            'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n'
            "</tool_call>",
            "Let me see.",
            [("weather", {"city": "Oslo"})],
        ),
        ("No call at all.", "No call at all.", []),
    ],
)
def test_tool_calls_are_the_same_streamed_and_whole(connect, engine, events, text, content, calls):
    # Pieces of three characters cut tags, names and arguments.
    engine.script = lambda request: [text[i : i + 3] for i in range(0, len(text), 3)]
    body = {**ASK, "tools": [WEATHER]}
    whole = post(connect, body).json()["choices"][0]
    found = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in whole["message"]["tool_calls"] or []
    ]
    assert (whole["message"]["content"] or "").strip() == content and found == calls
    assert whole["finish_reason"] == ("tool_calls" if calls else "stop")
    streamed = join_stream(events(post(connect, {**body, "stream": True}).text))[0]
    assert streamed["content"] == (whole["message"]["content"] or "")
    again = [(c["name"], json.loads(c["arguments"])) for c in streamed["calls"].values()]
    assert again == calls and streamed["finish"] == whole["finish_reason"]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_forced_tools_constrain_the_completion(connect, engine, choice):
    call = '[{"name": "weather", "arguments": {"city": "Oslo"}}]'
    engine.script = lambda request: list(call)
    body = post(connect, {**ASK, "tools": [WEATHER], "tool_choice": choice}).json()
    message = body["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"]["name"] == "weather"
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert engine.requests[0].params.structured.kind == "json_schema"


def test_tool_choice_none_reads_no_calls(connect, engine):
    text = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    engine.script = lambda request: [text]
    body = post(connect, {**ASK, "tools": [WEATHER], "tool_choice": "none"}).json()
    assert body["choices"][0]["message"]["content"] == text


def test_parallel_tool_calls_false_gives_one(connect, engine):
    one = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    engine.script = lambda request: [one, one]
    body = {**ASK, "tools": [WEATHER]}
    both = post(connect, body).json()["choices"][0]["message"]["tool_calls"]
    single = post(connect, {**body, "parallel_tool_calls": False}).json()["choices"][0]
    assert len(both) == 2 and len(single["message"]["tool_calls"]) == 1


def test_logprobs_whole_and_streamed_agree(connect, events):
    body = {**ASK, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    whole = post(connect, body).json()["choices"][0]["logprobs"]["content"]
    chunks = events(post(connect, {**body, "stream": True}).text)[:-1]
    streamed = [
        entry
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert streamed == whole
    assert bytes(b for entry in whole for b in entry["bytes"]).decode() == "Hello w\u00f6rld,"
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * len(whole)


def test_prompt_logprobs_have_null_first(connect):
    body = post(connect, {**ASK, "prompt_logprobs": 1}).json()
    assert body["prompt_logprobs"][0] is None
    assert all(entry for entry in body["prompt_logprobs"][1:])


def test_developer_is_system_and_parts_are_text(connect, engine):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    post(connect, {**ASK, "messages": messages})
    prompt = bytes(engine.requests[0].prompt_token_ids).decode()
    assert "system: Be brief." in prompt and "user: Hi" in prompt and "developer" not in prompt


def test_continue_final_message_leaves_the_last_open(connect, engine):
    messages = [*ASK["messages"], {"role": "assistant", "content": "The answer"}]
    post(connect, {**ASK, "messages": messages, "continue_final_message": True})
    assert bytes(engine.requests[0].prompt_token_ids).decode().endswith("assistant: The answer")


def test_messages_of_an_earlier_reply_are_accepted(connect):
    reply = post(connect, ASK).json()["choices"][0]["message"]
    again = {**ASK, "messages": [*ASK["messages"], reply, *ASK["messages"]]}
    assert post(connect, again).status_code == 200


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": 1000}, "temperature", "0 to 100"),
        ({"n": 10**6}, "n", "128"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": -1}, "max_tokens", "greater"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "user"),
        (
            {"messages": [{"role": "user", "content": "x", "colour": 1}]},
            "messages[0].colour",
            "unknown field 'colour'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "'image_url' is not allowed",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0]", "role 'user' needs content"),
        ({"messages": []}, "messages", "[] is not allowed; it should have at least 1"),
        ({"audio": {"voice": "x"}}, "audio", "text only"),
        ({"functions": []}, "functions", "use tools"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 50}, "logprobs", "20"),
        ({"stream_options": {}}, "stream_options", "stream: true"),
        ({"tool_choice": "required"}, "tools", "no tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, None, "exclude each other"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one"),
        ({"deadline_s": 1e9}, "deadline_s", "3600"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "field of the request"),
        ({"continue_final_message": True, "add_generation_prompt": True}, None, "choose one"),
    ],
)
def test_refusals_name_the_field(connect, engine, extra, param, words):
    reply = post(connect, {**ASK, **extra})
    error = reply.json()["error"]
    assert reply.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert param is None or error["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize(
    "field",
    [
        {"user": "me"},
        {"store": True},
        {"metadata": {"a": "b"}},
        {"service_tier": "auto"},
        {"prediction": None},
        {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [1]},
        {"response_format": {"type": "text"}},
        {"stop": "x"},
        {"logit_bias": {"5": -100}},
        {"timeout": 5},
    ],
)
def test_harmless_and_extra_fields_are_accepted(connect, field):
    assert post(connect, {**ASK, **field}).status_code == 200


def test_sampling_fields_reach_the_engine(connect, engine):
    fields = {"temperature": 0, "seed": 7, "stop": ["a", "b"], "ignore_eos": True, "top_k": 3}
    extra = {"priority": -2, "cache_salt": "team", "deadline_s": 9.5, "max_completion_tokens": 5}
    post(connect, {**ASK, **fields, **extra})
    (request,) = engine.requests
    params = request.params
    assert (params.temperature, params.seed, params.stop) == (0.0, 7, ("a", "b"))
    assert (params.ignore_eos, params.top_k, params.max_tokens) == (True, 3, 5)
    assert (request.priority, request.cache_salt, request.deadline_s) == (-2, "team", 9.5)


def test_structured_output_kinds(connect, engine):
    schema = {"type": "object"}
    forms = [
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": schema},
            }
        },
        {"structured_outputs": {"regex": "a+"}},
        {"guided_choice": ["x", "y"]},
        {"structured_outputs": {"grammar": "start: /a/"}},
        {"guided_json": schema},
    ]
    for form in forms:
        assert post(connect, {**ASK, **form}).status_code == 200
    kinds = [(r.params.structured.kind, r.params.structured.value) for r in engine.requests]
    assert kinds == [
        ("json_object", ""),
        ("json_schema", '{"type": "object"}'),
        ("regex", "a+"),
        ("choice", '["x", "y"]'),
        ("grammar", "start: /a/"),
        ("json_schema", '{"type": "object"}'),
    ]


def test_unknown_model_is_404(connect):
    reply = post(connect, {**ASK, "model": "term"})
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert "did you mean 'tern'" in reply.json()["error"]["message"]


def test_overload_is_429_with_retry_after(connect, engine):
    engine.admission_error = OverloadedError("the queue is full", retry_after_s=2.5)
    for stream in (False, True):
        reply = post(connect, {**ASK, "stream": stream})
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "3"
        assert reply.headers["retry-after-ms"] == "2500"
        assert reply.json()["error"]["code"] == "queue_full"


def test_failure_before_the_first_token_has_its_status_also_in_a_stream(connect, engine):
    engine.script = lambda request: [GrammarError("bad regex")]
    for stream in (False, True):
        reply = post(connect, {**ASK, "stream": stream})
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "invalid_grammar"


def test_failure_in_mid_stream_is_an_error_event(connect, engine, events):
    engine.script = lambda request: ["One", StepError("logits are NaN")]
    assert post(connect, ASK).status_code == 500
    chunks = events(post(connect, {**ASK, "stream": True}).text)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["error"]["code"] == "step_failed"
    assert join_stream(chunks[:-2])[0]["content"] == "One"


def test_request_id_is_echoed_or_made(connect):
    async def go():
        async with connect() as client:
            given = await client.post(URL, json=ASK, headers={"x-request-id": "abc-1"})
            made = await client.post(URL, json=ASK)
            odd = await client.post(URL, json=ASK, headers={"x-request-id": "a" * 999})
            return [r.headers["x-request-id"] for r in (given, made, odd)]

    given, made, odd = run(go())
    assert given == "abc-1" and len(made) == 32 and len(odd) == 32

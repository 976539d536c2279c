"""The real `openai` client against a live server of the real SmolLM2: what users rely on."""

from __future__ import annotations

import json

import openai
import pytest
from openai import OpenAI

pytestmark = pytest.mark.real
CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Oslo"]},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(smollm):
    return OpenAI(base_url=smollm.url + "/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture
def chat(client, model):
    def ask(**fields):
        fields = {"messages": CAPITAL, "temperature": 0, "max_tokens": 24, **fields}
        return client.chat.completions.create(model=model, **fields)

    return ask


def test_models(client, model):
    card = client.models.retrieve(model)
    assert card.id == model and card.max_model_len >= 2048


def test_chat(chat):
    reply = chat()
    message = reply.choices[0].message
    assert message.role == "assistant" and "Paris" in message.content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.sterna["e2e_s"] >= reply.sterna["ttft_s"] > 0


def test_stream_joins_to_the_same_answer_with_usage_and_cached_tokens(chat):
    whole = chat()
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens
    # The same prompt came before: its full blocks are found.
    assert usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens // 16 * 16 - 16 > 0


def test_stream_can_be_closed_early(chat, smollm):
    stream = chat(stream=True, max_tokens=1000, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    smollm.wait_idle()


def test_logprobs(chat):
    reply = chat(logprobs=True, top_logprobs=3, max_tokens=4)
    content = reply.choices[0].logprobs.content
    assert len(content) == 4
    joined = b"".join(bytes(entry.bytes) for entry in content)
    assert joined.decode() == reply.choices[0].message.content
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        # Greedy: the chosen token is the most probable one.
        assert entry.top_logprobs[0].logprob == entry.logprob
    streamed = [
        entry
        for chunk in chat(logprobs=True, top_logprobs=3, max_tokens=4, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [e.logprob for e in streamed] == [e.logprob for e in content]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_forced_tool_call_fits_its_schema(chat, choice):
    fields = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 60}
    fields["messages"] = [{"role": "user", "content": "Weather in Oslo, in celsius?"}]
    whole = chat(**fields).choices[0]
    (call,) = whole.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and call.type == "function" and call.id
    assert arguments["city"] in ("Paris", "Oslo") and set(arguments) == {"city", "unit"}
    assert whole.finish_reason == "tool_calls"
    name, pieces = "", ""
    for chunk in chat(**fields, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            name += part.function.name or ""
            pieces += part.function.arguments or ""
    assert (name, json.loads(pieces)) == ("get_weather", arguments)


def test_tool_result_goes_back_to_the_model(chat):
    call = {"name": "get_weather", "arguments": '{"city": "Oslo", "unit": "celsius"}'}
    messages = [
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees and rain"},
    ]
    assert chat(messages=messages, tools=[WEATHER]).choices[0].message is not None


def test_json_schema_is_kept(chat):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    reply = chat(response_format=form, max_tokens=60, temperature=1.0, seed=3)
    value = json.loads(reply.choices[0].message.content)
    assert isinstance(value["city"], str) and isinstance(value["big"], bool)


def test_structured_outputs_by_extra_body(chat):
    for body in (
        {"guided_choice": ["Paris", "Oslo"]},
        {"structured_outputs": {"regex": "Pari[sz]"}},
    ):
        assert chat(extra_body=body).choices[0].message.content.startswith("Pari")


def test_seed_n_stop_and_bias(chat):
    first = chat(temperature=1.0, seed=11, n=3, max_tokens=12)
    again = chat(temperature=1.0, seed=11, n=3, max_tokens=12)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1 and [c.index for c in first.choices] == [0, 1, 2]
    cut = chat(stop=[" Paris"]).choices[0]
    assert "Paris" not in cut.message.content and cut.finish_reason == "stop"


def test_plain_completion_with_echo_and_logprobs(client, model):
    reply = client.completions.create(
        model=model, prompt="The sky is", max_tokens=0, echo=True, logprobs=1
    )
    logprobs = reply.choices[0].logprobs
    assert reply.choices[0].text == "The sky is"
    assert logprobs.token_logprobs[0] is None and all(x < 0 for x in logprobs.token_logprobs[1:])
    both = client.completions.create(
        model=model, prompt=["One, two,", "A, B,"], max_tokens=4, temperature=0
    )
    assert " three" in both.choices[0].text and " C" in both.choices[1].text


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 1000}, openai.BadRequestError, "invalid_request"),
        (
            {"messages": [{"role": "user", "content": "word " * 90_000}]},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        ({"extra_body": {"guided_regex": "("}}, openai.BadRequestError, "invalid_grammar"),
    ],
)
def test_errors_are_the_clients_own(client, model, fields, error, code):
    arguments = {"model": model, "messages": CAPITAL, "max_tokens": 200, **fields}
    for stream in (False, True):
        with pytest.raises(error) as caught:
            list(client.chat.completions.create(**arguments, stream=stream))
        assert caught.value.code == code and caught.value.request_id


def test_deadline_is_a_timeout_status_or_an_error_in_the_stream(client, model):
    arguments = {"model": model, "messages": CAPITAL, "max_tokens": 2000}
    late = {"timeout": 0.2, "ignore_eos": True}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**arguments, extra_body=late)
    assert (caught.value.status_code, caught.value.code) == (408, "deadline_exceeded")
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(**arguments, extra_body=late, stream=True))
    assert caught.value.code == "deadline_exceeded"


def test_request_id_comes_back(client, model):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=CAPITAL, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"

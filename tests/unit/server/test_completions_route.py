"""Plain completions: prompt shapes, echo, logprobs, several prompts and samples, streams."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

URL = "/v1/completions"
WORDS = "Hello w\u00f6rld, how are you?"


def post(connect, body):
    async def go():
        async with connect() as client:
            return await client.post(URL, json={"model": "tern", **body})

    return asyncio.run(go())


def say_prompt(request):
    """A completion that tells which prompt it belongs to."""
    return [f"<{bytes(request.prompt_token_ids).decode()}>"]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["<ab>"]),
        (["ab", "c"], ["<ab>", "<c>"]),
        ([97, 98], ["<ab>"]),
        ([[97], [98, 99]], ["<a>", "<bc>"]),
    ],
)
def test_all_prompt_shapes(connect, engine, prompt, texts):
    engine.script = say_prompt
    body = post(connect, {"prompt": prompt}).json()
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    assert engine.requests[0].params.max_tokens == 16


def test_usage_sums_over_prompts_and_samples(connect, engine):
    engine.script = say_prompt
    body = post(connect, {"prompt": ["ab", "c"], "n": 3}).json()
    assert [choice["text"] for choice in body["choices"]] == ["<ab>"] * 3 + ["<c>"] * 3
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 3 * (4 + 3)


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
def test_echo_puts_the_prompt_first(connect, events, prompt):
    body = {"prompt": prompt, "echo": True, "max_tokens": 1}
    assert post(connect, body).json()["choices"][0]["text"] == "abHello"
    chunks = events(post(connect, {**body, "stream": True}).text)[:-1]
    assert "".join(c["choices"][0]["text"] for c in chunks) == "abHello"


@pytest.mark.parametrize("asked", [{"echo": True, "logprobs": 1}, {"prompt_logprobs": 1}])
def test_a_swiftkv_model_refuses_to_score_the_prompt(connect, engine, asked):
    engine.limits = replace(engine.limits, skips_prompt_rows=True)
    answer = post(connect, {"prompt": "abc", "max_tokens": 1, **asked})
    assert answer.status_code == 400
    assert "SwiftKV model: its prompt tokens run only the first layers" in answer.text


def test_echo_with_logprobs_scores_the_prompt(connect, events):
    body = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0}
    logprobs = post(connect, body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][1]


@pytest.mark.parametrize(("num_echo", "num_prompt"), [(2, 0), (0, 2), (1, 1)])
def test_echo_and_prompt_logprobs_have_their_own_counts(connect, engine, num_echo, num_prompt):
    body = {"prompt": "abc", "echo": True, "logprobs": num_echo, "prompt_logprobs": num_prompt}
    (choice,) = post(connect, {**body, "max_tokens": 1}).json()["choices"]
    assert engine.requests[0].params.prompt_logprobs == max(num_echo, num_prompt)
    # The chosen token is listed beside the candidates, unless it is one of them.
    for tops in choice["logprobs"]["top_logprobs"][1:3]:
        assert num_echo <= len(tops) <= num_echo + 1
    for entry in choice["prompt_logprobs"][1:]:
        assert num_prompt <= len(entry) <= num_prompt + 1


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_logprobs_join_to_the_whole(connect, events, echo):
    body = {"prompt": "ab", "echo": echo, "logprobs": 2, "max_tokens": 4, "n": 2}
    whole = [choice["logprobs"] for choice in post(connect, body).json()["choices"]]
    chunks = events(post(connect, {**body, "stream": True}).text)[:-1]
    for index in (0, 1):
        parts = [
            choice["logprobs"]
            for chunk in chunks
            for choice in chunk["choices"]
            if choice["index"] == index
        ]
        joined = {key: [x for part in parts for x in part[key]] for key in whole[index]}
        assert joined == whole[index]


def test_stream_of_several_prompts_interleaves_and_ends_once(connect, engine, events):
    engine.step_s = 0.001
    body = {"prompt": ["ab", "c"], "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(post(connect, body).text)
    assert chunks.count("[DONE]") == 1 and chunks[-1] == "[DONE]"
    texts = {0: "", 1: ""}
    finishes = []
    for chunk in chunks[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            finishes += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(finishes) == [0, 1]
    assert texts[0] == texts[1] and texts[0].startswith(WORDS)
    assert chunks[-2]["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, None),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 99}, "logprobs"),
        ({"prompt": "a" * 5000}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_refusals(connect, extra, param):
    reply = post(connect, extra)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert param is None or error["param"] == param
    if extra.get("prompt") == "a" * 5000:
        assert error["code"] == "context_length_exceeded"


def test_first_error_of_several_prompts_ends_all(connect, engine):
    engine.step_s = 0.001
    reply = post(connect, {"prompt": ["a", [400]]})
    assert reply.status_code == 400
    assert not engine.running

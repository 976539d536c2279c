"""Models, tokens, health, metrics, the live view, pages, and error bodies of every status."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from sterna.core.errors import StepError
from sterna.engine.drafters.learner import LearnStats
from sterna.engine.request import StepStats

ASK = {"model": "tern", "messages": [{"role": "user", "content": "Hi"}]}


def ask(connect, *calls, **settings):
    """Replies to (method, path, keywords) calls on one app."""

    async def go():
        async with connect(**settings) as client:
            return [
                await client.request(method, path, **(rest[0] if rest else {}))
                for method, path, *rest in calls
            ]

    return asyncio.run(go())


def test_models(connect):
    listed, one, other = ask(
        connect, ("GET", "/v1/models"), ("GET", "/v1/models/b/c"), ("GET", "/v1/models/nope"),
        served_model_name=("a", "b/c"),
    )  # fmt: skip
    assert [card["id"] for card in listed.json()["data"]] == ["a", "b/c"]
    assert one.json()["id"] == "b/c" and one.json()["max_model_len"] == 4096
    assert other.status_code == 404 and other.json()["error"]["code"] == "model_not_found"


def test_tokenize_and_detokenize_are_inverse(connect):
    text = "ab \u00f6"
    (tokens,) = ask(connect, ("POST", "/tokenize", {"json": {"prompt": text}}))
    body = tokens.json()
    assert body["tokens"] == list(text.encode()) and body["count"] == 5
    assert body["max_model_len"] == 4096 and body["token_strs"] is None
    (back,) = ask(connect, ("POST", "/detokenize", {"json": {"tokens": body["tokens"]}}))
    assert back.json() == {"prompt": text}


def test_tokenize_renders_messages(connect):
    body = {"messages": ASK["messages"], "return_token_strs": True}
    (reply,) = ask(connect, ("POST", "/tokenize", {"json": body}))
    assert "".join(reply.json()["token_strs"]).startswith("user: Hi")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": ASK["messages"]}),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": "ab"}),
        ("/detokenize", {"tokens": [2**40]}),
    ],
)
def test_token_refusals(connect, path, body):
    (reply,) = ask(connect, ("POST", path, {"json": body}))
    assert reply.status_code == 400 and reply.json()["error"]["param"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "\xff\xfe"}', "not valid JSON"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"temperature": NaN, "messages": []}', "temperature"),
        (b'{"seed": 1e400, "messages": []}', "seed"),
    ],
)
def test_malformed_bodies(connect, raw, words):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        (reply,) = ask(connect, ("POST", path, {"content": raw}))
        assert reply.status_code == 400
        if path == "/v1/chat/completions":
            assert words in reply.json()["error"]["message"]


def test_absurd_names_are_answered_briefly_and_soon(connect):
    long = "x" * 3_000_000
    bodies = [{long: 1}, {"messages": [{long: 1}]}, {**ASK, "model": long}, {**ASK, "stop": long}]
    started = time.process_time()
    for body in bodies:
        (reply,) = ask(connect, ("POST", "/v1/chat/completions", {"json": body}))
        assert reply.status_code in (400, 404) and len(reply.content) < 2000
    assert time.process_time() - started < 3


def test_many_empty_messages_do_not_hold_the_event_loop(connect):
    body = {"messages": [{"role": "user", "content": ""}] * 50_000, "model": "tern"}

    async def go():
        async with connect() as client:
            late = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            pauses = []
            while not late.done():
                started = time.perf_counter()
                await asyncio.sleep(0.001)
                pauses.append(time.perf_counter() - started)
            return (await late).status_code, pauses

    status, pauses = asyncio.run(go())
    assert status == 400  # too long for the model
    assert len(pauses) > 3  # it was rendered elsewhere


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/web/nothing.js", 404),
        ("GET", "/web/../app.py", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/engine/steps?since=x", 400),
    ],
)
def test_every_status_has_openais_body(connect, method, path, status):
    (reply,) = ask(connect, (method, path))
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_unexpected_exception_is_500_with_a_body_and_no_details(connect, engine):
    def fail(request):
        raise ZeroDivisionError("secret")

    engine.script = fail
    (reply,) = ask(connect, ("POST", "/v1/chat/completions", {"json": ASK}))
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error" and "secret" not in reply.text
    assert reply.headers["x-request-id"]


def test_body_limit_by_header_and_by_count(connect):
    big = json.dumps({"prompt": "x" * 2000}).encode()

    async def in_pieces():
        for start in range(0, len(big), 100):
            yield big[start : start + 100]

    headers = {"content-type": "application/json"}
    known, counted, fine = ask(
        connect,
        ("POST", "/tokenize", {"content": big}),
        ("POST", "/tokenize", {"content": in_pieces(), "headers": headers}),
        ("POST", "/tokenize", {"json": {"prompt": "x"}}),
        max_body_bytes=1000,
    )
    assert (known.status_code, counted.status_code, fine.status_code) == (413, 413, 200)
    assert counted.json()["error"]["code"] == "body_too_large"


def test_compressed_bodies_are_refused(connect):
    call = ("POST", "/tokenize", {"content": b"x", "headers": {"content-encoding": "gzip"}})
    (reply,) = ask(connect, call)
    assert reply.status_code == 400 and "gzip" in reply.json()["error"]["message"]


def test_health_follows_the_engine(connect, engine):
    (well,) = ask(connect, ("GET", "/health"))
    assert well.status_code == 200
    engine.health_error = StepError("no step for 40 s")
    (ill,) = ask(connect, ("GET", "/health"))
    assert ill.status_code >= 500 and "no step" in ill.json()["error"]["message"]


@pytest.mark.parametrize("prefix", ["sterna", "vllm"])
def test_metrics_have_the_names_that_dashboards_know(connect, prefix):
    _, _, reply = ask(
        connect,
        ("POST", "/v1/chat/completions", {"json": ASK}),
        ("POST", "/v1/chat/completions", {"json": {**ASK, "n": 10**6}}),
        ("GET", "/metrics"),
        metrics_prefix=prefix,
    )
    text = reply.text
    label = '{model_name="tern"}'
    counted = [f"generation_tokens_total{label} 26.0", f"prefix_cache_hits_total{label} 2.0"]
    counted += [f"time_to_first_token_seconds_count{label} 1.0", f"num_requests_running{label} 0.0"]
    counted += [f"e2e_request_latency_seconds_count{label} 1.0"]
    counted += ['request_success_total{finished_reason="stop",model_name="tern"} 1.0']
    counted += ['request_refused_total{code="invalid_request",model_name="tern"} 1.0']
    for line in counted:
        assert f"{prefix}:{line}" in text, line
    names = ("num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total",
             "cache_config_info", "prompt_tokens_total", "iteration_tokens_total_bucket",
             "request_prompt_tokens_bucket", "request_max_num_generation_tokens_bucket",
             "request_generation_tokens_bucket", "request_params_max_tokens_bucket",
             "request_params_n_bucket", "inter_token_latency_seconds_bucket",
             "request_time_per_output_token_seconds_bucket", "request_queue_time_seconds_bucket",
             "request_inference_time_seconds_bucket", "request_prefill_time_seconds_bucket",
             "request_decode_time_seconds_bucket")  # fmt: skip
    assert [name for name in names if f"\n{prefix}:{name}" not in text] == []


def test_learning_is_shown_where_a_speculator_learns(connect, engine):
    asked = ("GET", "/metrics"), ("GET", "/engine/state")
    metrics, state = ask(connect, *asked)
    assert "speculator_num" not in metrics.text and "speculator_learns" not in state.json()
    engine.learn_stats = LearnStats(900, 3, 2, 1, 0.5, 0.75)
    metrics, state = ask(connect, *asked)
    label = '{model_name="tern"}'
    for line in ("num_swaps{} 2.0", "num_rollbacks{} 1.0", "learned_accepted{} 0.75"):
        assert f"speculator_{line.replace('{}', label)}" in metrics.text
    assert state.json()["speculator_learns"]["num_rows"] == 900


def make_step(number, **changes):
    fields = {
        "step": number, "started": float(number), "duration": 0.01, "num_decode_tokens": 3,
        "num_prompt_tokens": 61, "num_running": 4, "num_waiting": 1, "num_preempted": 1,
        "kv_usage": 0.5, "token_budget": 64,
    }  # fmt: skip
    return StepStats(**{**fields, **changes})


def test_state_is_a_snapshot(connect, engine):
    engine.steps = [make_step(1), make_step(2)]
    _, reply = ask(
        connect, ("POST", "/v1/chat/completions", {"json": ASK}), ("GET", "/engine/state")
    )
    state = reply.json()
    assert state["model"] == "tern" and state["policy"] == "splitfuse"
    assert (state["token_budget"], state["num_kv_blocks"], state["block_size"]) == (64, 511, 16)
    assert state["ttft_ms"]["p50"] >= 0 and set(state["itl_ms"]) == {"p50", "p90", "p99"}
    totals = state["totals"]
    assert (totals["requests"], totals["steps"], totals["preemptions"]) == (1, 2, 2)
    assert totals["completion_tokens"] == 26


def test_steps_stream_from_a_given_step(connect, engine):
    engine.steps = [make_step(i) for i in range(1, 6)]

    async def go():
        async with connect() as client:
            await asyncio.sleep(0.02)
            # In process a stream is delivered when it ends, so let it end.
            closing = asyncio.create_task(close_soon(client.app))
            reply = await client.get("/engine/steps?since=3")
            await closing
            return reply

    async def close_soon(app):
        await asyncio.sleep(0.05)
        app.state.service.view.is_closed = True

    reply = asyncio.run(go())
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [b for b in reply.text.split("\n\n") if b.startswith("id:")]
    assert [block.split("\n")[0] for block in blocks] == ["id: 4", "id: 5"]
    data = json.loads(blocks[0].split("data: ")[1])
    assert blocks[0].split("\n")[1] == "event: step" and data["num_prompt_tokens"] == 61


def test_page_and_its_files(connect):
    page, script, docs, openapi = ask(
        connect, ("GET", "/"), ("GET", "/web/js/app.js"), ("GET", "/docs"), ("GET", "/openapi.json")
    )
    assert page.status_code == 200 and "Sterna" in page.text
    assert script.status_code == 200 and script.headers["cache-control"] == "no-cache"
    assert "/v1/chat/completions" in docs.text and "http://" not in docs.text
    schemas = openapi.json()["components"]["schemas"]
    assert "temperature" in schemas["ChatBody"]["properties"]


def test_cors_is_off_unless_asked(connect):
    origin = {"headers": {"origin": "https://a.example"}}
    preflight = {"headers": {**origin["headers"], "access-control-request-method": "POST"}}
    (off,) = ask(connect, ("GET", "/version", origin))
    on, pre = ask(
        connect, ("GET", "/version", origin), ("OPTIONS", "/v1/chat/completions", preflight),
        cors_origins=("https://a.example",), api_key=("k",),
    )  # fmt: skip
    assert "access-control-allow-origin" not in off.headers
    assert pre.status_code == 200 and on.status_code == 401
    for reply in (on, pre):
        assert reply.headers["access-control-allow-origin"] == "https://a.example"

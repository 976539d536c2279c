"""Faults against a live server: whatever a client does, the engine serves on and holds nothing."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time

import httpx
import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def complete(server, **fields):
    body = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True, **fields}
    return httpx.post(server.url + COMPLETIONS, json=body, timeout=60)


def assert_serves(server):
    reply = complete(server)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 4
    assert httpx.get(server.url + "/health").status_code == 200


def send(server, body: dict, receive_buffer: int | None = None) -> socket.socket:
    """A raw request, so that the test decides what is read and when the socket closes."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(server.address)
    raw = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


ENDLESS = {"prompt": "abc", "max_tokens": 8000, "ignore_eos": True, "stream": True}


def test_kill_9_of_a_client_in_mid_stream_frees_its_blocks(tiny):
    code = f"""
        import httpx, sys
        body = {ENDLESS!r}
        with httpx.stream("POST", "{tiny.url}{COMPLETIONS}", json=body) as reply:
            for _ in reply.iter_lines():
                print("token", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        for _ in range(10):
            client.stdout.readline()
        assert tiny.state()["kv_usage"] > 0
        client.kill()
    tiny.wait_idle(timeout_s=2)
    assert_serves(tiny)


def test_abort_takes_effect_at_once(tiny):
    before = tiny.wait_idle()["totals"]
    with send(tiny, ENDLESS) as connection:
        connection.recv(1000)
    time.sleep(0.1)
    soon = tiny.wait_idle(timeout_s=1.0)["totals"]
    time.sleep(0.3)
    later = tiny.state()["totals"]
    # A step lasts well under a millisecond here: what ran on would be thousands of tokens.
    assert later["requests"] == before["requests"] + 1
    assert later["completion_tokens"] == soon["completion_tokens"]
    assert soon["completion_tokens"] - before["completion_tokens"] < 1000


def test_a_thousand_aborted_requests_leave_zero_blocks_held(tiny):
    chooser = random.Random(0)
    before = tiny.wait_idle()["totals"]["requests"]

    async def abort_one(prompt: str, wait_s: float) -> None:
        _, writer = await asyncio.open_connection(*tiny.address)
        raw = json.dumps({**ENDLESS, "prompt": prompt, "n": 1 + len(prompt) % 3}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        await writer.drain()
        await asyncio.sleep(wait_s)
        writer.close()

    async def worker(count: int) -> None:
        for _ in range(count):
            # Some die while queued, some in their prompt, some while decoding; some share prefixes.
            prompt = "abc" * chooser.choice((1, 20, 200))
            await abort_one(prompt, chooser.choice((0.0, 0.002, 0.02)))

    async def all_workers() -> None:
        await asyncio.gather(*(worker(50) for _ in range(20)))

    asyncio.run(all_workers())
    after = tiny.wait_idle()
    assert after["kv_usage"] == 0
    assert after["totals"]["requests"] > before
    assert_serves(tiny)


BAD = [
    (CHAT, {"messages": [{**HELLO[0], "content": "a" * 82_000}]}, 400, "context_length_exceeded"),
    (COMPLETIONS, {"prompt": "a" * 82_000}, 400, "context_length_exceeded"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**6}, 400, "context_length_exceeded"),
    (COMPLETIONS, {"prompt": "a", "n": 10**6}, 400, "invalid_request"),
    (COMPLETIONS, {"prompt": "a", "model": "nope"}, 404, "model_not_found"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, 400, "invalid_request"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 400, "invalid_request"),
    (COMPLETIONS, {"prompt": [5, 100_000]}, 400, "invalid_request"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "("}}, 400, "invalid_grammar"),
    (COMPLETIONS, {"prompt": "a", "guided_grammar": "start: nothing"}, 400, "invalid_grammar"),
    (COMPLETIONS, {"prompt": "a", "guided_json": {"type": 5}}, 400, "invalid_grammar"),
    (COMPLETIONS, {"prompt": "a", "guided_json": "{"}, 400, "invalid_grammar"),
    # Found while tokens are drawn: a parser's limit, and constraints without a common token.
    (COMPLETIONS, {"prompt": "a", "guided_grammar": 'start: "a" start'}, 400, "invalid_grammar"),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "a+", "allowed_token_ids": [7]}, 400,
     "invalid_request"),
    (COMPLETIONS, {"prompt": "a", "seed": 1.5}, 400, "invalid_request"),
    (CHAT, {"messages": "Hello"}, 400, "invalid_request"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "invalid_request"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "code"), BAD)
def test_bad_requests_get_their_4xx_and_the_engine_serves_on(
    tiny, path, body, status, code, stream
):
    reply = httpx.post(tiny.url + path, json={**body, "stream": stream}, timeout=60)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["code"] == code and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert_serves(tiny)


@pytest.mark.parametrize(
    "raw", [b"{", b"\xff\xfe\x00", b'{"prompt": "\xc3("}', b"[" * 10_000, b'"' + b"a" * 9_000_000]
)
def test_malformed_bodies_get_4xx_and_the_engine_serves_on(tiny, raw):
    reply = httpx.post(tiny.url + COMPLETIONS, content=raw, timeout=60)
    assert reply.status_code == (413 if len(raw) > 2**23 else 400)
    assert reply.json()["error"]["message"]
    assert_serves(tiny)


def test_garbage_on_the_wire_harms_nobody(tiny):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"\0" * 999,
    ):
        with socket.create_connection(tiny.address, timeout=5) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)
    assert_serves(tiny)


def test_a_client_that_never_sends_its_body_blocks_nobody(tiny):
    with socket.create_connection(tiny.address) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        assert_serves(tiny)


def test_deadline_ends_a_request_and_only_it(tiny):
    started = time.monotonic()
    late = complete(tiny, max_tokens=8000, deadline_s=0.3)
    assert late.status_code == 408 and late.json()["error"]["code"] == "deadline_exceeded"
    assert time.monotonic() - started < 5
    tiny.wait_idle()
    assert_serves(tiny)


def test_slow_reader_does_not_stall_others(tiny):
    # 20 candidates a token make 3 KB a token: 8,000 tokens exceed every socket buffer.
    with send(tiny, {**ENDLESS, "logprobs": 20}, receive_buffer=4096) as connection:
        connection.recv(100)
        waits = []
        end = time.monotonic() + 3
        while time.monotonic() < end:
            started = time.monotonic()
            assert complete(tiny, max_tokens=8).status_code == 200
            waits.append(time.monotonic() - started)
        assert sorted(waits)[len(waits) // 2] < 0.5
        assert len(waits) > 5
    tiny.wait_idle()


def test_slow_reader_gets_every_token_in_the_end(tiny):
    body = {**ENDLESS, "max_tokens": 2000, "logprobs": 20, "temperature": 0}
    with send(tiny, body, receive_buffer=4096) as connection:
        connection.settimeout(30)
        received = bytearray(connection.recv(100))
        time.sleep(2)
        while not received.endswith(b"0\r\n\r\n"):
            piece = connection.recv(1 << 20)
            assert piece
            received += piece
    lines = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
    tokens = [t for line in lines for t in json.loads(line)["choices"][0]["logprobs"]["tokens"]]
    fast = complete(tiny, max_tokens=2000, logprobs=0, temperature=0)
    assert len(tokens) == 2000
    assert tokens == fast.json()["choices"][0]["logprobs"]["tokens"]
    assert len(lines) < 2000  # what waited was merged


def test_steps_stream_live_and_closes_with_its_client(tiny):
    newest = tiny.state()["totals"]["steps"]
    with httpx.stream("GET", f"{tiny.url}/engine/steps?since={newest}", timeout=10) as reply:
        assert complete(tiny).status_code == 200
        lines = reply.iter_lines()
        event = next(line for line in lines if line.startswith("data:"))
    step = json.loads(event.removeprefix("data:"))
    assert step["step"] > 0 and step["token_budget"] == 64
    assert_serves(tiny)


def test_metrics_agree_with_what_was_served(tiny):
    def counted() -> float:
        text = httpx.get(tiny.url + "/metrics").text
        line = next(x for x in text.splitlines() if x.startswith("sterna:generation_tokens_total"))
        return float(line.split()[-1])

    before = counted()
    complete(tiny, max_tokens=7, n=2)
    assert counted() - before == 14


def test_sigstop_of_a_client_is_a_slow_reader(tiny):
    code = f"""
        import httpx
        with httpx.stream("POST", "{tiny.url}{COMPLETIONS}", json={ENDLESS!r}) as reply:
            for _ in reply.iter_lines():
                print("token", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        client.stdout.readline()
        client.send_signal(signal.SIGSTOP)
        assert_serves(tiny)
        client.kill()
    tiny.wait_idle()

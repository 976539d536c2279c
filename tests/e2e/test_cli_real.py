"""The `sterna` command as a user's process: real model, real signals, kill -9."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

STERNA = [sys.executable, "-m", "sterna.cli"]
# Small cache and fixed budget: these tests ask for answers, not for speed.
SMALL = ["--max-model-len", "512", "--token-budget", "128", "--max-num-seqs", "8"]


def _run(*arguments, stdin="", timeout=120):
    return subprocess.run(
        [*STERNA, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.real
def test_complete_and_chat_answer_with_the_default_model():
    done = _run(
        "complete", "The capital of France is", "--max-tokens", "3", "--temperature", "0", *SMALL
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    done = _run(
        "chat", "--max-tokens", "12", "--temperature", "0", *SMALL,
        stdin="What is the capital of Japan?\n/stats\n/quit\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Tokyo" in done.stdout
    assert "first token after" in done.stdout


@pytest.mark.real
def test_a_batch_runs_offline_with_schema_and_errors(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    question = [{"role": "user", "content": "How many legs has a dog? Answer in JSON."}]
    rows = [
        {"custom_id": "plain", "prompt": "One two three", "max_tokens": 4},
        {"custom_id": "json", "messages": question, "max_tokens": 24,
         "response_format": response_format},
        {"custom_id": "bad", "prompt": "x", "temperature": -1},
    ]  # fmt: skip
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["complete", "--input", str(source), "--output", str(output), "--json",
                 "--temperature", "0", *SMALL]  # fmt: skip
    done = _run(*arguments)
    assert done.returncode == 1, done.stderr  # one of three failed
    summary = json.loads(done.stdout)
    assert (summary["completed"], summary["failed"]) == (2, 1)
    results = {e["custom_id"]: e["response"] for e in map(json.loads, output.open())}
    assert results["bad"]["status_code"] == 400
    assert "temperature" in results["bad"]["body"]["error"]["message"]
    answer = results["json"]["body"]["choices"][0]["message"]["content"]
    assert isinstance(json.loads(answer)["n"], int)


@pytest.mark.real
def test_doctor_finds_kernels_and_model():
    done = _run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["found"].endswith(".gguf")
    assert {row["op"] for row in report["kernels"]["ops"]} >= {"linear", "paged_attention"}
    assert report["machine"]["num_cpus"] >= 1
    shown = _run("doctor")
    assert "back end" in shown.stdout
    assert shown.stderr == ""


@pytest.mark.real
def test_bench_latency_prints_figures_and_machine():
    done = _run("bench", "latency", "--num-iters", "1", "--num-warmups", "0",
                "--input-len", "8", "--output-len", "4", "--json", *SMALL)  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["decode_tokens_per_s"] > 0
    assert figures["median_ttft_ms"] > 0
    assert figures["machine"]["cpu"]


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["complete", "x", "--model", "nowhere/model.gguf"], 3, "nowhere/model.gguf"),
        (["serve", "nowhere.gguf", "--port", "0"], 3, "nowhere.gguf"),
        (["serve", "--config", "none.toml"], 2, "none.toml"),
    ],
)
def test_user_errors_are_one_line_and_a_code(arguments, code, fragment):
    done = _run(*arguments)
    assert done.returncode == code
    lines = [line for line in done.stderr.splitlines() if "sterna: error:" in line]
    assert len(lines) == 1
    assert fragment in lines[0]
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_exit_7():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = _run("serve", "--port", port)
    assert done.returncode == 7
    assert port in done.stderr
    assert "Traceback" not in done.stderr


FAKE = """
import asyncio, json, sys
async def answer(reader, writer):
    while True:
        try:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
        except asyncio.IncompleteReadError:
            return
        size = [int(l.split(b":")[1]) for l in head.split(b"\\r\\n")
                if l.lower().startswith(b"content-length")]
        await reader.readexactly(size[0] if size else 0)
        await asyncio.sleep(0.1)
        body = json.dumps({"data": [{"id": "fake"}], "choices": [{"text": "x"}],
                           "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()
        writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\n"
                     b"content-length: %d\\r\\n\\r\\n" % len(body) + body)
async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@pytest.fixture
def slow_server():
    """A server of its own process: 0.1 s an answer."""
    process = subprocess.Popen([sys.executable, "-c", FAKE], stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def _batch_command(tmp_path, url, count):
    source = tmp_path / "in.jsonl"
    rows = [{"custom_id": f"r{index}", "prompt": "p"} for index in range(count)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    return [*STERNA, "complete", "--input", str(source), "--output", str(output),
            "--url", url, "--concurrency", "2"], output  # fmt: skip


def _wait_for_lines(path, count):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not get {count} lines")


def test_a_killed_batch_is_resumed_without_loss_or_repeat(tmp_path, slow_server):
    command, output = _batch_command(tmp_path, slow_server, 30)
    for num_done in (5, 14):  # killed twice, the second time with a torn line put there
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _wait_for_lines(output, num_done)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with output.open("ab") as file:
            file.write(b'{"id": "batch_req_r9", "custom')
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ids = [json.loads(line)["custom_id"] for line in output.read_text().splitlines()]
    assert sorted(ids) == sorted(f"r{index}" for index in range(30))
    assert "were done before" in done.stdout


def test_ctrl_c_is_130_and_keeps_what_is_done(tmp_path, slow_server):
    command, output = _batch_command(tmp_path, slow_server, 30)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _wait_for_lines(output, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert all(json.loads(line) for line in output.read_text().splitlines())


def test_a_reader_that_leaves_is_no_error(slow_server):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*STERNA, "complete", "x", "--url", slow_server, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(20) == 0
    assert "Traceback" not in err

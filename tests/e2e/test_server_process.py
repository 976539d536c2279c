"""The server as a process: refusals to start, TLS, keys, drain and force."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time

import httpx
import live_server
import pytest

from sterna.core.errors import ConfigError, ModelNotFoundError, PortInUseError

QUICK = ("--token-budget", "64", "--threads", "1", "--kv-cache-bytes", str(8 << 20))
LONG = {"prompt": "abc", "max_tokens": 1500, "ignore_eos": True}
# A million tokens: minutes on any machine, so the tests that need running work cancel it.
ENDLESS = {"max_tokens": 8000, "n": 128}


def refuse(folder, *arguments, model):
    """Exit code and lines of a server that cannot start."""
    server = live_server.launch(folder, *arguments, model=model)
    code = server.process.wait(60)
    lines = server.log.strip().splitlines()
    return code, [line for line in lines if "settings that differ" not in line]


def test_taken_port_is_one_clear_line_before_the_model_loads(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # The model does not exist either: the port is found taken first.
        code, lines = refuse(tmp_path, "--port", str(port), model="no/such-model.gguf")
    assert code == PortInUseError.exit_code
    assert len(lines) == 1 and f"port {port}" in lines[0] and "in use" in lines[0]


def test_missing_model_is_one_clear_line(tmp_path):
    code, lines = refuse(tmp_path, "--port", "0", model="/nowhere/model.gguf")
    assert code == ModelNotFoundError.exit_code
    assert len(lines) == 1 and "/nowhere/model.gguf" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "203.0.113.9"), "cannot listen on 203.0.113.9"),
        (("--ssl-certfile", "a.pem"), "ssl_keyfile"),
        (("--ssl-certfile", "a.pem", "--ssl-keyfile", "b.pem"), "a.pem"),
        (("--api-key-file", "absent"), "absent"),
    ],
)
def test_wrong_settings_are_one_clear_line(tmp_path, arguments, words):
    code, lines = refuse(tmp_path, "--port", "0", *arguments, model="/nowhere")
    assert code == ConfigError.exit_code, lines
    assert words in " ".join(lines) and "Traceback" not in " ".join(lines)


class Caller(threading.Thread):
    """Streams one long completion until its end or `cancelled`; `lines` tell how it went."""

    def __init__(self, url, **fields):
        super().__init__()
        self.url, self.body = url, {**LONG, "stream": True, **fields}
        self.begun, self.cancelled = threading.Event(), threading.Event()
        self.lines, self.failure = [], None

    def run(self):
        try:
            url = self.url + "/v1/completions"
            with httpx.stream("POST", url, json=self.body, timeout=60) as reply:
                for line in reply.iter_lines():
                    self.lines.append(line)
                    self.begun.set()
                    if self.cancelled.is_set():
                        return
        except httpx.HTTPError as error:
            self.failure = error


def begin(url, **fields):
    """A caller whose first token has come."""
    caller = Caller(url, **fields)
    caller.start()
    assert caller.begun.wait(20)
    return caller


def wait_for_drain(server):
    """Return when the server has taken the signal; it must still be there."""
    end = time.monotonic() + 10
    while (status := httpx.get(server.url + "/health").status_code) == 200:
        assert time.monotonic() < end, "the signal was not taken"
        time.sleep(0.01)
    assert status == 503


def test_sigterm_drains_and_a_second_server_can_take_over(tmp_path, tiny_model):
    server = live_server.start(tmp_path, *QUICK, model=str(tiny_model))
    caller = begin(server.url)
    anchor = begin(server.url, **ENDLESS)  # keeps the server draining, however fast it is
    server.process.send_signal(signal.SIGTERM)
    wait_for_drain(server)
    # While it drains: not healthy, nothing new taken, the running requests go on.
    late = httpx.post(server.url + "/v1/completions", json=LONG)
    assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
    num_lines = len(anchor.lines)
    caller.join(40)
    assert len(anchor.lines) > num_lines
    anchor.cancelled.set()
    # The last one has gone: the server ends by itself, long before its 30 s.
    assert server.process.wait(10) == 0
    assert caller.failure is None and caller.lines[-2] == "data: [DONE]"
    chunks = [json.loads(x[6:]) for x in caller.lines if x.startswith("data: {")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_second_signal_forces(tmp_path, tiny_model):
    server = live_server.start(tmp_path, *QUICK, model=str(tiny_model))
    caller = begin(server.url, **ENDLESS)
    server.process.send_signal(signal.SIGTERM)
    wait_for_drain(server)
    started = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 1
    assert time.monotonic() - started < 5
    caller.join()
    assert "data: [DONE]" not in caller.lines


def test_drain_timeout_aborts_what_still_runs(tmp_path, tiny_model):
    server = live_server.start(tmp_path, *QUICK, "--drain-timeout-s", "0.5", model=str(tiny_model))
    caller = begin(server.url, **ENDLESS)
    assert server.stop(timeout_s=10) == 1
    caller.join()
    # The client is told, not just cut off.
    assert any('"code": "shutting_down"' in line for line in caller.lines[-4:])


def test_signal_with_idle_watchers_ends_at_once(tmp_path, tiny_model):
    server = live_server.start(tmp_path, *QUICK, model=str(tiny_model))
    with httpx.Client() as idle, idle.stream("GET", server.url + "/engine/steps") as watch:
        next(watch.iter_lines())
        started = time.monotonic()
        assert server.stop(timeout_s=20) == 0
        assert time.monotonic() - started < 6


def test_keys_and_tls(tmp_path, tiny_model):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(
            [*command, "-keyout", key, "-out", certificate], check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("needs the openssl command to make a certificate")
    (tmp_path / "keys").write_text("sesame\n")
    server = live_server.start(
        tmp_path, *QUICK, "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key),
        "--api-key-file", str(tmp_path / "keys"), model=str(tiny_model),
    )  # fmt: skip
    assert server.url.startswith("https://")
    import ssl

    context = ssl.create_default_context(cafile=certificate)
    with httpx.Client(base_url=server.url, verify=context) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        opened = client.get("/?api_key=sesame", follow_redirects=True)
        assert opened.status_code == 200 and "Sterna" in opened.text
        assert "Secure" in opened.history[0].headers["set-cookie"]
        assert client.get("/engine/state").status_code == 200  # by cookie
        bearer = {"authorization": "Bearer sesame"}
        assert httpx.get(server.url + "/v1/models", headers=bearer, verify=context).is_success
    assert "sesame" not in server.log
    assert server.stop() == 0

"""The comparison's arithmetic, its table, and the pipe to a peer's process."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import pytest
from worker import Peer

import compare
from peers import children, served, setup
from peers.table import as_markdown


class SteadyPeer(Peer):
    """Prefill of 1 us a prompt token, 100 us a decode step, on a clock of its own."""

    def __init__(self, clock):
        self._clock = clock

    def generate(self, prompts, num_tokens):
        self._clock[0] += sum(map(len, prompts)) * 1e-6 + (num_tokens - 1) * 1e-4
        return [[7] * num_tokens for _ in prompts]


@pytest.fixture
def peer(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("worker.time.perf_counter", lambda: clock[0])
    return SteadyPeer(clock)


def test_decode_is_the_difference_of_two_runs(peer):
    figures = peer.measure({"batch": 4, "prompt": 100, "tokens": 11}, random.Random(0))
    assert figures["decode"] == pytest.approx(4 * 10 / 1e-3)
    assert figures["end_to_end"] == pytest.approx(4 * 11 / (400e-6 + 1e-3))


def test_prefill_is_the_time_to_one_token(peer):
    figures = peer.measure({"batch": 1, "prompt": 512, "tokens": 1}, random.Random(0))
    assert figures == {"prefill": pytest.approx(1e6)}


def test_samples_are_kept_under_their_figure():
    samples = {}
    compare._keep(samples, "decode", "a", {"decode": 1.0, "end_to_end": 2.0})
    compare._keep(samples, "prefill_512", "a", {"prefill": 3.0})
    compare._keep(samples, "batch_16", "a", {"decode": 4.0, "end_to_end": 5.0})
    assert samples == {
        "decode": {"a": [1.0]},
        "prefill_512": {"a": [3.0]},
        "batch_16_decode": {"a": [4.0]},
        "batch_16_end_to_end": {"a": [5.0]},
    }


def test_the_table_compares_with_the_best_peer():
    text = as_markdown(
        {
            "date": "D",
            "machine": {"cpu": "C", "num_cpus": 2, "memory_gib": 23.4},
            "cores": [0, 1],
            "repeats": 3,
            "versions": {"slow": {"torch": "2"}},
            "faults": ["x failed"],
            "sanity": {"slow": {"equal_tokens": 24, "text": "t"}},
            "medians": {
                "decode": {"sterna": 150.0, "slow": 10.0, "fast": 100.0},
                "server_p99_itl_ms": {"sterna": 50.0, "slow": 200.0},
            },
        }
    )
    assert "| decode, one stream (tok/s) | 150 | 10.0 | 100 | 1.50x |" in text
    assert "| server, p99 gap (ms) | 50.0 | 200 | - | 0.25x |" in text
    assert "fault: x failed" in text
    assert "torch 2" in text


def test_wrong_output_is_noticed():
    assert compare._num_equal([1, 2, 3], [1, 2, 4]) == 2
    assert compare._num_equal([1], [1, 2]) == 1
    good = {"sanity": {"a": {"equal_tokens": 24}}}
    bad = {"sanity": {"a": {"equal_tokens": 24}, "b": {"equal_tokens": 0}}}
    assert not compare._is_insane(good)
    assert compare._is_insane(bad)


SCRIPT = """
import time
from worker import Peer, serve

class Echo(Peer):
    def generate(self, prompts, num_tokens):
        print("noise on stdout")
        return [ids[-1:] * num_tokens for ids in prompts]

serve(lambda model, threads: Echo())
"""


class LocalSpec:
    """A peer spec whose script is this test's."""

    name = "echo"
    python = Path(sys.executable)
    model = Path("none")

    def __init__(self, script):
        self.script = script

    def command(self, threads):
        return [str(self.python), str(self.script), str(self.model), str(threads)]


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "_LOG", tmp_path / "logs")
    script = tmp_path / "peer_echo.py"
    script.write_text(SCRIPT)
    return LocalSpec(script)


def _state_becomes(pid, state):
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").read_text().split()[2] != state:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_peer_answers_over_its_pipe_and_sleeps_between(spec):
    peer = children.RunningPeer(spec, [0])
    try:
        request = {"do": "generate", "prompts": [[1, 2], [3]], "tokens": 2}
        assert peer.ask(request) == [[2, 2], [3, 3]]
        assert _state_becomes(peer._process.pid, "T")  # stopped
        figures = peer.ask({"do": "measure", "case": compare.CASES["decode"], "seed": 1})
        assert figures["end_to_end"] > 0
    finally:
        peer.close()
    assert peer._process.poll() is not None


def test_a_peer_that_dies_is_a_peer_error(spec):
    spec.script.write_text("import sys; sys.exit(3)")
    with pytest.raises(children.PeerError, match="ended without"):
        children.RunningPeer(spec, [0])


def test_first_token_counts_from_the_start_of_the_process(spec):
    assert 0 < children.first_token_s(spec, [0], [5]) < 10


def test_stop_ends_a_stopped_group(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "_LOG", tmp_path)
    process = children.start(["sleep", "60"], [0], "log")
    time.sleep(0.05)
    children.stop(process)
    assert process.poll() is not None


def test_every_peer_has_an_adapter_and_a_recipe():
    for name, peer_spec in children.SPECS.items():
        assert peer_spec.script.exists(), name
        assert not peer_spec.environment or peer_spec.environment in setup.RECIPES
    servers = [n for n, s in children.SPECS.items() if s.environment and s.server_command(1, 2)]
    assert servers == ["llamacpp", "vllm"]


def test_server_prompts_alternate_in_length(tmp_path, monkeypatch):
    monkeypatch.setattr(served, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(served, "one_token_words", lambda _: (" a", " b", " c"))
    path = tmp_path / "p.jsonl"
    served.write_prompts(path, Path("m"), 4, seed=0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(row["prompt"].split()) for row in rows] == [50, 1500, 50, 1500]
    assert all(row["output_tokens"] == 64 for row in rows)


def test_setup_skips_what_is_ready(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "PEERS", tmp_path)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "ready").write_text("{}")
    assert setup.main(["vllm"]) == 0
    assert "ready" in capsys.readouterr().out


def test_a_format_is_one_more_word_for_sterna_and_another_file_for_llama():
    from peers.children import PLAIN, SPECS

    assert SPECS["sterna-fp6"].command(2)[-2:] == ["2", "fp6"]
    assert SPECS["sterna"].command(2)[-1] == "2"
    assert SPECS["llamacpp-q6_k"].model.name == "q6_k.gguf"
    assert SPECS["llamacpp-q6_k"].script == SPECS["llamacpp"].script
    assert "sterna-fp6" not in PLAIN

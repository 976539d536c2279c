"""Peers as child processes on pinned cores, stopped while it is not their turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.setup import ROOT, python_of
from peers.weights import HF_FOLDER, LLAMA_BIN, OPENVINO_FOLDER, default_gguf, gguf_file

HERE = Path(__file__).resolve().parent
_LOG = ROOT / ".peers" / "logs"


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """Where a peer's interpreter, script and weights are."""

    name: str
    environment: str  # folder under .peers; "" = the one that runs this
    weights: str = ""  # a quantised format; "" = bfloat16
    activations: str = ""  # "int8", or as the engine does

    @property
    def python(self) -> Path:
        """The interpreter that runs the peer."""
        return python_of(self.environment) if self.environment else Path(sys.executable)

    @property
    def script(self) -> Path:
        """Its adapter."""
        name = "sterna" if not self.environment else self.name.removesuffix(f"-{self.weights}")
        return HERE / f"peer_{name.replace('-', '_')}.py"

    @property
    def model(self) -> Path:
        """The weights it reads."""
        if self.environment == "llamacpp":
            return gguf_file(self.weights)
        if self.environment == "openvino":
            return OPENVINO_FOLDER
        return default_gguf() if self.environment == "" else HF_FOLDER

    def command(self, threads: int) -> list[str]:
        """Its adapter as a process; Sterna takes its formats as more words."""
        own = (
            [] if self.environment else [word for word in (self.weights, self.activations) if word]
        )
        return [str(self.python), str(self.script), str(self.model), str(threads), *own]

    def server_command(self, port: int, threads: int) -> list[str] | None:
        """Its OpenAI server; None when it has none to compare."""
        common = ["--host", "127.0.0.1", "--port", str(port)]
        if self.name == "sterna":
            return [sys.executable, "-m", "sterna.cli", "serve", *common,
                    "--threads", str(threads), "--max-model-len", "4096",
                    "--weights", "bf16"]  # fmt: skip
        if self.name == "llamacpp":
            return [str(LLAMA_BIN / "llama-server"), "-m", str(self.model), *common, "-t",
                    str(threads), "-np", "16", "-c", "32768", "-b", "2048", "-ub", "512",
                    "--cache-ram", "0", "--no-cache-prompt"]  # fmt: skip
        if self.name == "vllm":
            # The `vllm serve` command fails in this wheel: it looks for a package named "vllm".
            return [str(self.python), "-m", "vllm.entrypoints.openai.api_server", *common,
                    "--model", str(HF_FOLDER), "--dtype", "bfloat16", "--max-model-len", "4096",
                    "--max-num-seqs", "16", "--no-enable-prefix-caching"]  # fmt: skip
        return None


SPECS = {
    spec.name: spec
    for spec in (
        PeerSpec("sterna", ""),
        PeerSpec("llamacpp", "llamacpp"),
        PeerSpec("openvino", "openvino"),
        PeerSpec("openvino-sdpa", "openvino"),
        PeerSpec("vllm", "vllm"),
        PeerSpec("transformers", "transformers"),
        PeerSpec("sterna-fp6", "", "fp6"),
        PeerSpec("sterna-w6a8", "", "fp6", "int8"),
        PeerSpec("llamacpp-q6_k", "llamacpp", "q6_k"),
        PeerSpec("llamacpp-q4_0", "llamacpp", "q4_0"),
    )
}
# What runs unless other peers are named: all on the same bfloat16 weights.
PLAIN = tuple(name for name, spec in SPECS.items() if not spec.weights)


def start(command: list[str], cores: list[int], log: str, **pipes: Any) -> subprocess.Popen[str]:
    """A child in its own group, on `cores`, its stderr in .peers/logs/LOG."""
    _LOG.mkdir(parents=True, exist_ok=True)
    paths = [str(HERE), str(ROOT / "src")]
    threads = str(len(cores))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads,
           "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
           "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    with (_LOG / log).open("w") as stderr:
        return subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command],
            stderr=stderr, text=True, start_new_session=True, env=env, **pipes,
        )  # fmt: skip


def stop(process: subprocess.Popen[str]) -> None:
    """End a child and all it started."""
    for number, patience_s in ((signal.SIGCONT, 0.0), (signal.SIGTERM, 15.0), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            if patience_s:
                process.wait(patience_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


class PeerError(RuntimeError):
    """A peer ended or answered nonsense; its log tells why."""


class RunningPeer:
    """One peer's process; asleep (SIGSTOP) except during `ask`."""

    def __init__(self, spec: PeerSpec, cores: list[int]) -> None:
        self.spec = spec
        command = spec.command(len(cores))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = start(command, cores, f"{spec.name}.log", **pipes)
        self.load_s = float(self._read()["load_s"])
        self._signal(signal.SIGSTOP)

    def ask(self, request: dict[str, Any]) -> Any:
        """One request, awake. PeerError when the peer died."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._read()
        except BrokenPipeError as error:
            raise PeerError(f"{self.spec.name} died; see .peers/logs") from error
        finally:
            self._signal(signal.SIGSTOP)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self.spec.name} ended without an answer; see .peers/logs")
        return json.loads(line)

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End the process."""
        stop(self._process)


def first_token_s(spec: PeerSpec, cores: list[int], ids: list[int]) -> float:
    """Seconds from starting a new process to its first token. PeerError when none comes."""
    command = [*spec.command(len(cores)), "--first-token", json.dumps(ids)]
    started = time.perf_counter()
    process = start(command, cores, f"{spec.name}-first.log", stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        taken = time.perf_counter() - started
    finally:
        stop(process)
    if not line:
        raise PeerError(f"{spec.name} gave no first token; see .peers/logs")
    return taken

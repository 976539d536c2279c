"""Starts `sterna serve` as its own process, and a tiny model for it to serve.

The tiny model has random weights and a byte tokenizer: its steps take a millisecond, so faults and
load are tested in seconds. What a real model says is tested with the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SRC = Path(__file__).parents[2] / "src"
START_TIMEOUT_S = 120
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 64, 4, 2, 16, 128, 2
VOCAB = 272  # 256 bytes, the end token, and padding to a multiple of 16
END = 256
_READY = re.compile(r"(https?://\S+:\d+) serves")


@dataclass
class LiveServer:
    """A running server process."""

    process: subprocess.Popen
    log_path: Path
    url: str = ""

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.partition("//")[2].partition(":")
        return host, int(port)

    def get(self, path: str) -> dict:
        return httpx.get(self.url + path, timeout=30).raise_for_status().json()

    def state(self) -> dict:
        return self.get("/engine/state")

    def wait_idle(self, timeout_s: float = 10.0) -> dict:
        """The first state without work and without held blocks; fails after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while True:
            state = self.state()
            if not (state["running"] or state["waiting"] or state["kv_usage"]):
                return state
            assert time.monotonic() < end, f"not idle after {timeout_s} s: {state}"
            time.sleep(0.02)

    def memory_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def launch(folder: Path, *arguments: str, model: str = "") -> LiveServer:
    """Start a process with its own home and log; does not wait."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(SRC),
        "STERNA_HOME": str(folder / "home"),
        "PYTHONUNBUFFERED": "1",
    }
    log_path = folder / "server.log"
    command = [sys.executable, "-m", "sterna.cli.main", "serve", *([model] if model else [])]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, *arguments], stdout=log, stderr=log, env=environment, cwd=folder
        )
    return LiveServer(process, log_path)


def start(folder: Path, *arguments: str, model: str = "") -> LiveServer:
    """Start a server on a free port and wait until it serves."""
    server = launch(folder, "--port", "0", *arguments, model=model)
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if found := _READY.search(server.log):
            server.url = found.group(1)
            return server
        if server.process.poll() is not None:
            break
        time.sleep(0.05)
    server.process.kill()
    raise AssertionError(f"the server did not start:\n{server.log}")


def write_tiny_model(folder: Path, max_positions: int = 8192) -> Path:
    """A random Llama with a byte tokenizer, as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": max_positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": END,
        "bos_token_id": None, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).bfloat16()

    ones = torch.ones(HIDDEN).bfloat16()
    weights = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": random(VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": ones.clone(),
            f"{layer}.post_attention_layernorm.weight": ones.clone(),
            f"{layer}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM),
            f"{layer}.mlp.gate_proj.weight": random(INNER, HIDDEN),
            f"{layer}.mlp.up_proj.weight": random(INNER, HIDDEN),
            f"{layer}.mlp.down_proj.weight": random(HIDDEN, INNER),
        }
    return weights


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return backend

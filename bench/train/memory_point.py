"""One training step in a process of its own, measured: run by memory.py and planner.py.

    python memory_point.py JOB.json -> one JSON line {"peak": bytes, "data": bytes, "seconds": s}

With `cap` the process may have that much writable memory (RLIMIT_DATA), and a step that needs more
ends it with exit code 3. A job's `system` is sterna, transformers or deepspeed. All train a
Llama-shaped model with random weights in bfloat16 by AdamW with bfloat16 moments and no float32
master (Sterna: or as `states`, `master` and `offload` say), on a row of random tokens made of
documents of `document` tokens (transformers: one).
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

OOM = 3


def main() -> int:
    """Build, step, report."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    step = {"sterna": sterna, "transformers": transformers, "deepspeed": deepspeed}[job["system"]](
        job
    )
    if job.get("cap"):
        resource.setrlimit(resource.RLIMIT_DATA, (job["cap"], job["cap"]))
    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    data = [status("VmData")]
    threading.Thread(target=watch, args=(data,), daemon=True).start()
    started = time.perf_counter()
    try:
        for _ in range(job.get("steps", 1)):
            loss = step()
    except (RuntimeError, MemoryError) as error:
        if "memory" in str(error).lower() or "alloc" in str(error).lower():
            return OOM
        raise
    print(json.dumps({"peak": status("VmHWM"), "base": base, "libs": job["libs"], "loss": loss,
                      "data": max(data), "seconds": time.perf_counter() - started}))  # fmt: skip
    return 0


def watch(data: list[int]) -> None:
    """What RLIMIT_DATA counts, ten times a second; `data` keeps the largest."""
    while True:
        data[0] = max(data[0], status("VmData"))
        time.sleep(0.1)


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def sterna(job: dict[str, Any]) -> Callable[[], float]:
    """The trainer's own step."""
    import numpy as np

    from sterna.data.pack import Document, join
    from sterna.kernels.load import load_kernels
    from sterna.model.config import parse_config
    from sterna.model.decoder import Decoder
    from sterna.parallel.mesh import Mesh
    from sterna.train.config import OptimSection
    from sterna.train.init_weights import init_weights
    from sterna.train.longseq.apply import apply_longseq
    from sterna.train.longseq.config import LongseqSection
    from sterna.train.offload.config import OffloadSection
    from sterna.train.offload.homes import new_home
    from sterna.train.offload.weights import LEAST, WeightTier
    from sterna.train.optim import AdamW
    from sterna.train.step import TrainStep, cross_entropy

    load_kernels()
    job["libs"] = status("VmRSS")
    if "model_type" in job["config"]:
        decoder: Any = foreign_decoder(job)
    else:
        config = parse_config({**job["config"], "architectures": ["LlamaForCausalLM"]}, "job")
        decoder = Decoder(config, torch.bfloat16)
        init_weights(decoder, 0)
    decoder.requires_grad_(True).train()
    offload, home, weights = OffloadSection(**job.get("offload", {})), None, None
    if offload.states != "memory":
        home = new_home(offload.states, decoder.device, Path(job["folder"]))
    if offload.weights != "memory":
        weights = WeightTier(list(decoder.layers), home, lambda t: t.numel() >= LEAST)
    settings = LongseqSection(**job["longseq"])
    apply_longseq(decoder, settings, Path(job["folder"]), weights=weights)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, decoder.config.vocab_size, job["seq_len"]).astype(np.int32)
    pieces = np.split(tokens, range(job["document"], len(tokens), job["document"]))
    row = join(
        [Document(piece, np.append(piece[1:], -100).astype(np.int32), 0) for piece in pieces]
    )
    settings = OptimSection(states=job.get("states", "bfloat16"), master=job.get("master", False))
    places = weights.places if weights is not None else {}
    optimiser = AdamW(decoder.named_parameters(), settings, 0, home, places)
    rows = job["longseq"].get("head_rows") or None
    chunked = partial(cross_entropy, chunk_rows=rows)  # as the trainer's tasks do
    loss = full_logits if job.get("full_logits") else chunked
    step = TrainStep(decoder, Mesh.single(), loss=loss)

    def run() -> float:
        done = step.run([row])
        optimiser.step(step.gradients, 0, 1e-5)
        return done.loss

    return run


def foreign_decoder(job: dict[str, Any]) -> Any:
    """The model of a config with a model_type, behind transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from sterna.model.hf import HFDecoder

    config = AutoConfig.for_model(**job["config"])
    with torch.device("meta"):
        HFDecoder(AutoModelForCausalLM.from_config(config))  # imports the family's code
    job["libs"] = status("VmRSS")
    return HFDecoder(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def full_logits(model: Any, batch: Any, targets: torch.Tensor) -> torch.Tensor:
    """The loss as everybody computes it: all logits at once."""
    logits = model.logits(model.hidden(batch))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def transformers(job: dict[str, Any]) -> Callable[[], float]:
    """A plain loop around transformers' model."""
    model, tokens = hf_model(job)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss)

    return run


def hf_model(job: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Transformers' Llama of the job's sizes and one row of tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    job["libs"] = status("VmRSS")
    config = LlamaConfig(**job["config"], attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    if job.get("checkpoint"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    return model, torch.randint(0, config.vocab_size, (1, job["seq_len"]))


def deepspeed(job: dict[str, Any]) -> Callable[[], float]:
    """Transformers' model with DeepSpeed's tiled loss and tiled MLP (ALST) and checkpoints."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP

    job["checkpoint"] = True
    model, tokens = hf_model(job)
    for layer in model.model.layers:
        tile_mlp(layer.mlp, TiledMLP, job["seq_len"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]
    shards = -(-job["seq_len"] // 256)  # Sterna's rows of logits; ALST's own are 1 GiB of them

    def loss_of(head: Any, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head.lm_head(hidden).float()
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1)
        )

    def run() -> float:
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        loss = TiledFusedLogitsLoss.apply(
            loss_of, model, hidden, labels, None, shards, [model.lm_head.weight], "mean"
        )
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss)

    return run


def tile_mlp(mlp: Any, tiled: Any, seq_len: int) -> None:
    """ALST's own tile count: as many tokens a tile as the hidden size."""
    plain = type(mlp).forward
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    shards = max(1, seq_len // mlp.gate_proj.weight.shape[1])
    mlp.forward = lambda x: tiled.apply(plain, mlp, x, shards, weights)


if __name__ == "__main__":
    sys.exit(main())

"""A model whose weights lie on no 4-bit grid, for the quality study: a short full fine-tune.

    python bench/quality/finetune.py OUT --text FILE [FILE ...] [--model MODEL] [--minutes 3]
        [--origin MODEL] [--lr 8e-4] [--tokens 512] [--seed 0]

The default model is shipped in 4 bits (Q4_1): its bfloat16 values lie on a grid that 4-bit formats
hit again, so errors measured on it flatter them. AdamW on plain text moves every weight, for its
steps have nearly one size whatever the gradient's. Float32 weights, Sterna's own differentiable
forward (kv=None), 5 s a step of 512 tokens on 2 cores. OUT is a Hugging Face folder in bfloat16.

Runs add up: give OUT as --model of the next run (AdamW's moments start anew), and the first model
as --origin. What is left of the old grid is measured against --origin and printed: the share of
weights with their old value, and the distance moved in steps of the old grid. The offset from the
nearest old level, in steps, has a root mean square of 0.289 when nothing of the grid is left.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from sterna.core.rundir import write_atomic
from sterna.model.batch import Batch
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.model.save import save_model
from sterna.quant.sources import small_files
from sterna.text.tokenizer import load_tokenizer

Q4_BLOCK, Q4_LEVELS = 32, 15
WARMUP = 5


def main() -> int:
    """Train, save, measure."""
    args = _arguments()
    source = resolve_model(args.model)
    decoder = load_model(source, "float32").decoder
    windows = _windows(load_tokenizer(source), args.text, args.tokens, random.Random(args.seed))
    losses = train(decoder, windows, args.minutes * 60, args.lr)
    decoder = _in_bfloat16(decoder)
    save_model(decoder, args.out)
    for name, content in small_files(Path(source)).items():
        write_atomic(args.out / name, content)
    origin = load_model(resolve_model(args.origin or args.model)).decoder
    facts = {"steps": len(losses), "loss": [_mean(losses[:10]), _mean(losses[-10:])],
             "tokens": len(losses) * args.tokens, **grid_left(decoder, origin)}  # fmt: skip
    print(json.dumps(facts, indent=2))
    return 0


def train(decoder: Decoder, windows: Iterator[Tensor], seconds: float, lr: float) -> list[float]:
    """AdamW on next-token loss until the time is over; the learning rate decays with the time."""
    optimiser = torch.optim.AdamW(
        decoder.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    losses: list[float] = []
    started = time.perf_counter()
    for _ in track(range(10**6), description="train", transient=True):
        done = (time.perf_counter() - started) / seconds
        if done >= 1:
            break
        warm = min(1.0, (len(losses) + 1) / WARMUP)
        optimiser.param_groups[0]["lr"] = lr * warm * (0.1 + 0.9 * math.cos(math.pi / 2 * done))
        losses.append(_step(decoder, next(windows), optimiser))
    return losses


def _step(decoder: Decoder, tokens: Tensor, optimiser: torch.optim.Optimizer) -> float:
    n = len(tokens) - 1
    batch = Batch(tokens[:-1], torch.arange(n).int(), torch.tensor([0, n]).int(),
                  torch.tensor([n]).int())  # fmt: skip
    loss = F.cross_entropy(decoder(batch), tokens[1:].long())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


def _in_bfloat16(decoder: Decoder) -> Decoder:
    rounded = Decoder(decoder.config, torch.bfloat16)
    rounded.load_state_dict(decoder.state_dict())
    return rounded


def grid_left(decoder: Decoder, origin: Decoder) -> dict[str, float]:
    """What is left of the origin's 4-bit grid in the weight matrices of the layers."""
    moved = unchanged = total = offset = 0.0
    old = dict(origin.named_parameters())
    for name, new in decoder.named_parameters():
        if new.dim() != 2 or not name.startswith("layers."):
            continue
        a, b = old[name].detach().float(), new.detach().float()
        unchanged += float((a == b).sum())
        total += a.numel()
        blocks = a.view(-1, Q4_BLOCK)
        low = blocks.amin(1, keepdim=True)
        step = (blocks.amax(1, keepdim=True) - low).clamp_(min=1e-9) / Q4_LEVELS
        levels = (b.view(-1, Q4_BLOCK) - low) / step
        offset += float((levels - levels.round()).square().sum())
        moved += float((b.view(-1, Q4_BLOCK) - blocks).div(step).square().sum())
    return {"share_with_old_value": unchanged / total, "moved_rms_in_steps": (moved / total) ** 0.5,
            "offset_rms_in_steps": (offset / total) ** 0.5}  # fmt: skip


def _windows(tokenizer: Any, files: list[Path], size: int, draw: random.Random) -> Iterator[Tensor]:
    """Windows of size + 1 tokens from random places of files drawn evenly."""
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    while True:
        text = draw.choice(texts)
        start = draw.randrange(max(1, len(text) - 8 * size))
        tokens = tokenizer.encode(text[start : start + 8 * size])[: size + 1]
        if len(tokens) == size + 1:
            yield torch.tensor(tokens, dtype=torch.int32)


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--model", default="", help="where to start; empty is the default model")
    parser.add_argument("--origin", default="", help="whose 4-bit grid to look for; --model's")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

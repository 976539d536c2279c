"""What a quantised KV cache costs in quality: its next-token distributions against a plain one's.

    python bench/kv_quality.py TEXT... [--model NAME] [--tokens 4096] [--window 1024]

Each file is cut into windows of its first tokens; every token is predicted from the cache alone.
Printed a file and a format: mean and 99th percentile of KL(plain || quantised) in nats, how often
both rank the same token first, and the perplexity of the text under each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from sterna.core.machine import fingerprint
from sterna.engine.memory import QUANTISED_KV
from sterna.kernels.load import load_kernels
from sterna.model.batch import Batch, KVView
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.text.tokenizer import load_tokenizer

BLOCK, CHUNK = 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    load_kernels()
    path = resolve_model(args.model)
    decoder, tokenizer = load_model(path, dtype="bfloat16").decoder, load_tokenizer(path)
    decoder.prepare_inference()
    print(fingerprint().line())
    for text in args.texts:
        tokens = tokenizer.encode(text.read_text())[: args.tokens]
        report(decoder, text.name, torch.tensor(tokens, dtype=torch.int32).split(args.window))


@torch.inference_mode()
def report(decoder: Decoder, name: str, windows: tuple[Tensor, ...]) -> None:
    found: dict[str, list[Tensor]] = {kind: [] for kind in ("plain", *QUANTISED_KV)}
    for tokens in track(windows, name, transient=True):
        runs = {kind: log_probs(decoder, tokens, kind) for kind in found}
        at = 0
        for parts in zip(*runs.values(), strict=True):
            targets = tokens[at + 1 : at + 1 + len(parts[0])].long()
            for kind, part in zip(found, parts, strict=True):
                found[kind].append(compare(parts[0], part, targets))
            at += len(parts[0])
    for kind, rows in found.items():
        kl, same, nll = torch.cat(rows, 1)
        print(
            f"{name:20} {kind:6} {len(kl):5} tokens  KL mean {kl.mean():.2e} p99 "
            f"{kl.quantile(0.99):.2e}  top-1 {same.mean():.2%}  perplexity "
            f"{nll[~nll.isnan()].mean().exp():.4f}"
        )


def compare(plain: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """[3, rows]: KL, same first token (0 or 1), -log p of the next token (NaN at the end)."""
    kl = (plain.exp() * (plain - other)).sum(-1)
    same = (plain.argmax(-1) == other.argmax(-1)).float()
    nll = torch.full((len(plain),), float("nan"))
    nll[: len(targets)] = -other[torch.arange(len(targets)), targets]
    return torch.stack([kl, same, nll])


def log_probs(decoder: Decoder, tokens: Tensor, kind: str) -> Iterator[Tensor]:
    """Float32 [CHUNK, V] by [CHUNK, V], of one sequence over a cache of that format."""
    num_blocks = -(-len(tokens) // BLOCK)
    layers = decoder.new_kv_layers(num_blocks + 1, BLOCK, QUANTISED_KV.get(kind))
    tables = torch.arange(1, num_blocks + 1, dtype=torch.int32)[None]
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        positions = torch.arange(start, start + len(part), dtype=torch.int32)
        kv = KVView(layers, tables, positions.long() + BLOCK, BLOCK)
        starts = torch.tensor([0, len(part)], dtype=torch.int32)
        lens = torch.tensor([start + len(part)], dtype=torch.int32)
        with torch.inference_mode():
            yield decoder(Batch(part, positions, starts, lens, kv=kv)).log_softmax(-1)


if __name__ == "__main__":
    main()

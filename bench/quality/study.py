"""The quality table: bits a weight against KL, for Sterna's formats and llama.cpp's on one model.

    python bench/quality/study.py MODEL --calibration docs=FILE [--calibration math=FILE:TOKENS]
        --text prose=FILE [--text code=FILE ...] [--rows fp6-g128/gptq,Q6_K] [--name NAME]
        [--out bench/results] [--llamacpp .peers/llamacpp] [--work DIR] [--windows 8]

MODEL is a bfloat16 folder on no 4-bit grid (finetune.py, pretrain.py). A row is
FORMAT/METHOD[/CALIBRATION][/a8]: METHOD is absmax, rtn, gptq or awq, the first calibration text is
the default, a8 computes with int8 activations. RTN's scales see the same tokens as GPTQ's Hessians.
All linear layers and the tied table are quantised in every row; norms stay in bfloat16. Bits are
measured: all tensor bytes over all parameters, metadata left out on both sides.

llama.cpp's rows (`peer.py`) come twice: on its own kernels against its own BF16, and
(`NAME/weights`) the same file's values in Sterna's bfloat16 forward. `Q6_K+imatrix` weighs errors
by the input squares of the default calibration text. All score identical token ids, the second
half of every window. Rows are merged into the day's file, so that a table can be made in several
runs, two at a time too; what MODEL itself predicts is kept in --work.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer import PEER_TYPES, is_peer, peer_files, scores_on_own_kernels, tensor_bytes
from rich.progress import track
from table import markdown
from torch import Tensor

from sterna.core.rundir import write_atomic
from sterna.eval.quality import Positions, compare, cut_windows, summarise, together
from sterna.eval.scorer import DecoderScorer
from sterna.kernels.quant_weight import QuantWeight
from sterna.model.decoder import Decoder
from sterna.model.load import load_model
from sterna.quant.awq import ChannelScales, channel_scales
from sterna.quant.budget import Choice, choose_formats, price_formats
from sterna.quant.formats import WeightFormat, parse_format
from sterna.quant.gptq import gptq_weight
from sterna.quant.hessian import Hessians
from sterna.quant.linear import (
    quant_modules,
    replace_weight,
    use_int8_activations,
    weight_shapes,
)
from sterna.quant.rtn import ScaleSearch, quantize_weight
from sterna.quant.sensitivity import NUM_WINDOWS, row_sensitivities
from sterna.text.tokenizer import load_tokenizer

FORMATS = ("fp6", "fp6-e3m2", "fp6-g128", "fp6-mixed", "fp6-mixed-g128", "fp5", "int4", "int4-g128",
           "int4-g32", "int5-g32", "int5-g64", "int6-g128", "int8", "nf6", "nf6-g128", "nf5-g64",
           "nf4-g32", "nf4-g128")  # fmt: skip
WINDOW = 512
CALIBRATION_TOKENS = 16_384
CHARS_A_TOKEN = 6  # read of a calibration text; any text here has fewer
BUDGET_PREFIX = "bits="
Statistics = Mapping[str, Tensor]


class Subject:
    """The model, its windows and the log-probabilities of its plain form, kept for all rows."""

    def __init__(self, model: Path, texts: Mapping[str, Path], windows: int, work: Path) -> None:
        self.model = model
        self.tokenizer = load_tokenizer(model)
        self.windows = {
            name: cut_windows(self.tokenizer.encode(file.read_text()), WINDOW, windows, str(file))
            for name, file in texts.items()
        }
        self._plain = DecoderScorer(self.decoder())
        self._work = work
        self.budget_tokens: list[int] = []
        self.prices: list[Choice] = []

    def decoder(self) -> Decoder:
        """The plain model, its weights mapped."""
        return load_model(self.model).decoder

    def base(self, window: Tensor) -> Tensor:
        """Log-probabilities of the plain model; mapped from --work, 50 MB a window of SmolLM2."""
        digest = hashlib.sha256(window.numpy().tobytes()).hexdigest()[:16]
        path = self._work / f"base-{digest}.npy"
        if not path.exists():
            spare = path.with_suffix(f".{os.getpid()}.npy")
            np.save(spare, self._plain(window).numpy())
            spare.replace(path)
        return torch.from_numpy(np.load(path, mmap_mode="c"))

    def score(self, decoder: Decoder) -> dict[str, Positions]:
        """A row's positions by domain."""
        return compare(self.base, DecoderScorer(decoder), self.windows)


def quantised_row(
    subject: Subject, name: str, hessians: Mapping[str, Statistics]
) -> dict[str, Any]:
    """Quantise in memory, score on the kernels."""
    format_name, method, *rest = name.split("/")
    texts = [part for part in rest if part in hessians]
    found = hessians[texts[0] if texts else next(iter(hessians))]
    decoder = subject.decoder()
    started = time.perf_counter()
    formats = _formats(subject, format_name, found)
    scales = ChannelScales({}, {})
    if method == "awq":
        squares = {module: h.diagonal().contiguous() for module, h in found.items()}
        scales = channel_scales(decoder, squares, next(iter(formats.values())))
        for norm, value in scales.norms.items():
            decoder.get_parameter(norm).data.copy_(value)
    for module, *_, is_gated in list(weight_shapes(decoder)):
        plain = decoder.get_parameter(f"{module}.weight").detach()
        weight = _quantised(module, plain, found[module], formats[module], method, scales, is_gated)
        replace_weight(decoder, module, weight)
    if "a8" in rest:
        use_int8_activations(decoder)
    seconds = time.perf_counter() - started
    weights = [m.quant_weight for _, m in quant_modules(decoder)]
    count = sum(w.out_features * (1 + w.is_gated) * w.in_features for w in weights)
    rest_params = list(decoder.parameters())
    num_bytes = sum(w.nbytes for w in weights) + sum(p.nbytes for p in rest_params)
    bits = 8 * num_bytes / (count + sum(p.numel() for p in rest_params))
    return _row(bits, num_bytes, subject.score(decoder), seconds=seconds)


def _quantised(
    module: str,
    plain: Tensor,
    hessian: Tensor,
    fmt: WeightFormat,
    method: str,
    scales: ChannelScales,
    is_gated: bool,
) -> QuantWeight:
    if method == "gptq":
        return gptq_weight(plain, hessian, fmt, is_gated=is_gated, name=module)
    squares = hessian.diagonal().contiguous()
    if module in scales.columns:
        columns = scales.columns[module]
        plain, squares = plain.float() * columns, squares / columns.square()
    search: ScaleSearch = "absmax" if method == "absmax" else "mse"
    importance = None if method == "absmax" else squares
    return quantize_weight(
        plain, fmt, search=search, importance=importance, is_gated=is_gated, name=module
    )


def _formats(subject: Subject, name: str, hessians: Statistics) -> dict[str, WeightFormat]:
    """One format for all, or those that a budget chooses (`bits=5.5`)."""
    decoder = subject.decoder()
    names = [module for module, *_ in weight_shapes(decoder)]
    if not name.startswith(BUDGET_PREFIX):
        return dict.fromkeys(names, parse_format(name))
    if not subject.prices:
        squares = {module: h.diagonal().contiguous() for module, h in hessians.items()}
        plain = load_model(subject.model, "float32").decoder
        sensitivity = row_sensitivities(plain, subject.budget_tokens)
        subject.prices = price_formats(decoder, squares, sensitivity)
    return choose_formats(subject.prices, decoder, float(name.removeprefix(BUDGET_PREFIX)))


def _row(bits: float, num_bytes: int, found: dict[str, Positions], **facts: Any) -> dict[str, Any]:
    domains = {name: asdict(summarise(positions)) for name, positions in found.items()}
    domains["all"] = asdict(summarise(together(list(found.values()))))
    return {"bits_per_weight": bits, "num_bytes": num_bytes, **facts, "domains": domains}


def peer_rows(
    subject: Subject, args: argparse.Namespace, names: list[str], hessians: Statistics
) -> dict[str, Any]:
    """llama.cpp's quants of the same weights: its own kernels, then its values in ours."""
    squares = {module: h.diagonal().contiguous() for module, h in hessians.items()}
    files = peer_files(subject.model, args, names, squares)
    scored = scores_on_own_kernels(subject.windows, args, files)
    count = sum(p.numel() for p in subject.decoder().parameters())
    rows = {}
    for name, file in files.items():
        num_bytes = tensor_bytes(file)
        bits = 8 * num_bytes / count
        rows[name] = _row(bits, num_bytes, scored[name])
        own = subject.score(load_model(file).decoder)
        rows[f"{name}/weights"] = _row(bits, num_bytes, own)
    return rows


def calibrated(
    subject: Subject, texts: Mapping[str, tuple[Path, int]], cache: Path
) -> dict[str, Statistics]:
    """Hessians by calibration text, from `cache` where they are there."""
    found = {}
    for name, (file, num_tokens) in texts.items():
        path = cache / f"hessians-{name}.pt"
        if not path.exists():
            tokens = subject.tokenizer.encode(file.read_text()[: CHARS_A_TOKEN * num_tokens])
            if len(tokens) < num_tokens:
                raise SystemExit(f"{file} has {len(tokens)} tokens, {num_tokens} were asked for")
            decoder = subject.decoder()
            hessians = Hessians(decoder, tokens[:num_tokens], str(file))
            names = [module for module, *_ in weight_shapes(decoder)]
            order = sorted(names, key=lambda module: module == "embed_tokens")
            made = {m: hessians.get(m) for m in track(order, f"calibrate {name}", transient=True)}
            torch.save(made, path)
        found[name] = torch.load(path, mmap=True)
    return found


def main() -> int:
    """Make the rows asked for and write the table."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    subject = Subject(args.model, _named(args.text), args.windows, args.work)
    texts = _calibrations(args.calibration)
    hessians = calibrated(subject, texts, args.work)
    for first, _ in list(texts.values())[:1]:
        text = first.read_text()[: 8 * WINDOW * NUM_WINDOWS]
        subject.budget_tokens = subject.tokenizer.encode(text)
    name = f"quality-{args.name}-" if args.name else "quality-"
    path = args.out / f"{name}{datetime.now(UTC):%Y-%m-%d}.json"
    protocol = {
        "window": WINDOW, "scored": "second half", "windows": args.windows,
        "domains": list(subject.windows),
        "calibration_tokens": {name: tokens for name, (_, tokens) in texts.items()},
    }  # fmt: skip
    for rows in _wanted(args.rows, subject, hessians, args):
        report = _merge(path, rows, protocol, args.work / "lock")
        write_atomic(path.with_suffix(".md"), markdown(report))
        for name, row in rows.items():
            q = row["domains"]["all"]
            print(f"{name:28s} {row['bits_per_weight']:.3f} KL {q['kl']:.5f} top-1 {q['top1']:.2%}",
                  flush=True)  # fmt: skip
    return 0


def _merge(
    path: Path, rows: dict[str, Any], protocol: dict[str, Any], lock_file: Path
) -> dict[str, Any]:
    """Add rows to the file, under a lock: another run may add its own."""
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        known = report.get("protocol", {}).get("calibration_tokens", {})
        protocol["calibration_tokens"] = {**known, **protocol["calibration_tokens"]}
        report["protocol"] = protocol
        report["rows"].update(rows)
        write_atomic(path, json.dumps(report, indent=1) + "\n")
    return report


def _wanted(
    rows: str, subject: Subject, hessians: Mapping[str, Statistics], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    names = rows.split(",") if rows else [
        *(f"{f}/{m}" for f in FORMATS for m in ("rtn", "gptq")), *PEER_TYPES]  # fmt: skip
    for name in names:
        if not is_peer(name):
            yield {name: quantised_row(subject, name, hessians)}
    peers = [name for name in names if is_peer(name)]
    if peers:
        yield peer_rows(subject, args, peers, next(iter(hessians.values()), {}))


def _calibrations(entries: list[str]) -> dict[str, tuple[Path, int]]:
    """NAME=FILE[:TOKENS] to (file, tokens) by name."""
    found = {}
    for name, rest in (entry.split("=", 1) for entry in entries):
        file, _, tokens = rest.partition(":")
        found[name] = (Path(file), int(tokens or CALIBRATION_TOKENS))
    return found


def _named(entries: list[str]) -> dict[str, Path]:
    pairs = (entry.partition("=") for entry in entries)
    return {name: Path(path) for name, _, path in pairs}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", action="append", default=[], metavar="NAME=FILE[:TOKENS]")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--rows", default="", help="comma-separated; empty makes all")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    parser.add_argument("--name", default="", help="of the subject, in the name of the file")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--work", type=Path, default=Path("tmp/quality"))
    parser.add_argument("--llamacpp", type=Path, default=Path(".peers/llamacpp"))
    parser.add_argument("--metadata", type=Path, help="GGUF whose metadata MODEL shares")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

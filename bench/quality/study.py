"""The quality table: bits a weight against KL, for Sterna's formats and llama.cpp's on one model.

    python bench/quality/study.py MODEL --calibration docs=FILE [--calibration math=FILE]
        --text prose=FILE [--text code=FILE ...] [--rows fp6-g128/gptq,Q6_K] [--out bench/results]
        [--llamacpp .peers/llamacpp] [--work DIR] [--windows 5]

MODEL is a bfloat16 folder on no 4-bit grid (finetune.py). A row is FORMAT/METHOD[/CALIBRATION]; the
first calibration text is the default, and RTN's scales see the same tokens as GPTQ's Hessians. All
linear layers and the tied table are quantised in every row; norms stay in bfloat16. Bits are
measured: all tensor bytes over all parameters, metadata left out on both sides.

llama.cpp's rows come twice: on its own kernels against its own BF16, and (`NAME/weights`) the same
file's values in Sterna's bfloat16 forward. All score identical token ids, the second half of every
window. Rows are merged into the day's file, so that a table can be made in several short runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from table import markdown, plot
from to_gguf import write_gguf
from torch import Tensor

from sterna.core.gguf import read_gguf
from sterna.core.rundir import write_atomic
from sterna.eval.quality import Positions, compare, cut_windows, summarise, together
from sterna.eval.scorer import DecoderScorer
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.quant.budget import Choice, choose_formats, price_formats
from sterna.quant.formats import WeightFormat, parse_format
from sterna.quant.gptq import gptq_weight
from sterna.quant.hessian import Hessians
from sterna.quant.linear import quant_modules, replace_weight, weight_shapes
from sterna.quant.rtn import quantize_weight
from sterna.quant.sensitivity import NUM_WINDOWS, row_sensitivities
from sterna.text.tokenizer import load_tokenizer

FORMATS = ("fp6", "fp6-e3m2", "fp6-g128", "fp6-mixed", "fp6-mixed-g128", "fp5", "int4", "int4-g128",
           "int4-g32", "int5-g32", "int5-g64", "int6-g128", "int8")  # fmt: skip
PEER_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
WINDOW = 512
CHARS_A_TOKEN = 6  # read of a calibration text; any text here has fewer
BUDGET_PREFIX = "bits="
Statistics = Mapping[str, Tensor]


class Subject:
    """The model, its windows and the log-probabilities of its plain form, kept for all rows."""

    def __init__(self, model: Path, texts: Mapping[str, Path], windows: int) -> None:
        self.model = model
        self.tokenizer = load_tokenizer(model)
        self.windows = {
            name: cut_windows(self.tokenizer.encode(file.read_text()), WINDOW, windows, str(file))
            for name, file in texts.items()
        }
        self._plain = DecoderScorer(self.decoder())
        self._known: dict[bytes, Tensor] = {}
        self.budget_tokens: list[int] = []
        self.prices: list[Choice] = []

    def decoder(self) -> Decoder:
        """The plain model, its weights mapped."""
        return load_model(self.model).decoder

    def base(self, window: Tensor) -> Tensor:
        """Log-probabilities of the plain model."""
        key = window.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self._plain(window)
        return self._known[key]

    def score(self, decoder: Decoder) -> dict[str, Positions]:
        """A row's positions by domain."""
        return compare(self.base, DecoderScorer(decoder), self.windows)


def quantised_row(
    subject: Subject, name: str, hessians: Mapping[str, Statistics]
) -> dict[str, Any]:
    """Quantise in memory, score on the kernels."""
    format_name, method, *rest = name.split("/")
    found = hessians[rest[0] if rest else next(iter(hessians))]
    decoder = subject.decoder()
    started = time.perf_counter()
    formats = _formats(subject, format_name, found)
    for module, *_, is_gated in list(weight_shapes(decoder)):
        plain = decoder.get_parameter(f"{module}.weight").detach()
        h, fmt = found[module], formats[module]
        if method == "gptq":
            weight = gptq_weight(plain, h, fmt, is_gated=is_gated, name=module)
        else:
            squares = h.diagonal().contiguous() if method == "rtn" else None
            search = "absmax" if method == "absmax" else "mse"
            weight = quantize_weight(
                plain, fmt, search=search, importance=squares, is_gated=is_gated, name=module
            )
        replace_weight(decoder, module, weight)
    seconds = time.perf_counter() - started
    weights = [m.quant_weight for _, m in quant_modules(decoder)]
    count = sum(w.out_features * (1 + w.is_gated) * w.in_features for w in weights)
    rest_params = list(decoder.parameters())
    num_bytes = sum(w.nbytes for w in weights) + sum(p.nbytes for p in rest_params)
    bits = 8 * num_bytes / (count + sum(p.numel() for p in rest_params))
    return _row(bits, num_bytes, subject.score(decoder), seconds=seconds)


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


def peer_rows(subject: Subject, args: argparse.Namespace, types: list[str]) -> dict[str, Any]:
    """llama.cpp's quants of the same weights: its own kernels, then its values in ours."""
    files = _peer_files(subject.model, args, types)
    windows, out = args.work / "windows.npz", args.work / "scored.npz"
    np.savez(windows, **{name: w.numpy() for name, w in subject.windows.items()})
    script, base = Path(__file__).with_name("llamacpp.py"), args.work / "bf16.gguf"
    command = [args.llamacpp / "bin" / "python", script, base, windows, out,
               *(f"{t}={files[t]}" for t in types)]  # fmt: skip
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(args.llamacpp / "build" / "bin")}
    subprocess.run(command, check=True, env=env)
    scored = np.load(out)
    rows = {}
    for kind in types:
        found = {d: Positions(*torch.from_numpy(scored[f"{kind}/{d}"]).float())
                 for d in subject.windows}  # fmt: skip
        file = read_gguf(files[kind])
        num_bytes = sum(len(file.tensor_bytes(name)) for name in file.tensors)
        count = sum(p.numel() for p in subject.decoder().parameters())
        bits = 8 * num_bytes / count
        rows[kind] = _row(bits, num_bytes, found)
        own = subject.score(load_model(files[kind]).decoder)
        rows[f"{kind}/weights"] = _row(bits, num_bytes, own)
    return rows


def _peer_files(model: Path, args: argparse.Namespace, types: list[str]) -> dict[str, Path]:
    base = args.work / "bf16.gguf"
    if not base.exists():
        write_gguf(model, base, args.metadata or Path(resolve_model("")))
    files = {kind: args.work / f"{kind}.gguf" for kind in types}
    for kind, file in files.items():
        if not file.exists():
            program = args.llamacpp / "build" / "bin" / "llama-quantize"
            subprocess.run([program, base, file, kind], check=True, capture_output=True)
    return files


def _row(bits: float, num_bytes: int, found: dict[str, Positions], **facts: Any) -> dict[str, Any]:
    domains = {name: asdict(summarise(positions)) for name, positions in found.items()}
    domains["all"] = asdict(summarise(together(list(found.values()))))
    return {"bits_per_weight": bits, "num_bytes": num_bytes, **facts, "domains": domains}


def calibrated(
    subject: Subject, texts: Mapping[str, Path], num_tokens: int, cache: Path
) -> dict[str, Statistics]:
    """Hessians by calibration text, from `cache` where they are there."""
    found = {}
    for name, file in texts.items():
        path = cache / f"hessians-{name}.pt"
        if not path.exists():
            tokens = subject.tokenizer.encode(file.read_text()[: CHARS_A_TOKEN * num_tokens])
            decoder = subject.decoder()
            hessians = Hessians(decoder, tokens[:num_tokens], str(file))
            names = [module for module, *_ in weight_shapes(decoder)]
            order = sorted(names, key=lambda module: module == "embed_tokens")
            made = {m: hessians.get(m) for m in track(order, f"calibrate {name}", transient=True)}
            torch.save(made, path)
        found[name] = torch.load(path)
    return found


def main() -> int:
    """Make the rows asked for and write table and plot."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    subject = Subject(args.model, _named(args.text), args.windows)
    hessians = calibrated(subject, _named(args.calibration), args.calibration_tokens, args.work)
    first = next(iter(_named(args.calibration).values()))
    subject.budget_tokens = subject.tokenizer.encode(first.read_text()[: 8 * WINDOW * NUM_WINDOWS])
    path = args.out / f"quality-{datetime.now(UTC):%Y-%m-%d}.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    report["protocol"] = {
        "window": WINDOW, "scored": "second half", "windows": args.windows,
        "domains": list(subject.windows), "calibration": list(hessians),
        "calibration_tokens": args.calibration_tokens,
    }  # fmt: skip
    for rows in _wanted(args.rows, subject, hessians, args):
        report["rows"].update(rows)
        write_atomic(path, json.dumps(report, indent=1) + "\n")
        for name, row in rows.items():
            q = row["domains"]["all"]
            print(f"{name:28s} {row['bits_per_weight']:.3f} KL {q['kl']:.5f} top-1 {q['top1']:.2%}",
                  flush=True)  # fmt: skip
    write_atomic(path.with_suffix(".md"), markdown(report))
    plot(report, args.plot)
    return 0


def _wanted(
    rows: str, subject: Subject, hessians: Mapping[str, Statistics], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    names = rows.split(",") if rows else [
        *(f"{f}/{m}" for f in FORMATS for m in ("rtn", "gptq")), *PEER_TYPES]  # fmt: skip
    peers = [name for name in names if name in PEER_TYPES]
    for name in names:
        if name not in PEER_TYPES:
            yield {name: quantised_row(subject, name, hessians)}
    if peers:
        yield peer_rows(subject, args, peers)


def _named(entries: list[str]) -> dict[str, Path]:
    pairs = (entry.partition("=") for entry in entries)
    return {name: Path(path) for name, _, path in pairs}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--rows", default="", help="comma-separated; empty makes all")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--windows", type=int, default=5, help="windows of each text")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--plot", type=Path, default=Path("docs/img/quality.png"))
    parser.add_argument("--work", type=Path, default=Path("tmp/quality"))
    parser.add_argument("--llamacpp", type=Path, default=Path(".peers/llamacpp"))
    parser.add_argument("--metadata", type=Path, help="GGUF of the metadata; the default model's")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

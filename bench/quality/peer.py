"""llama.cpp's rows of the quality table: its files of the same weights, its kernels, its values."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from to_gguf import gguf_names, write_gguf
from torch import Tensor

from sterna.core.gguf import read_gguf
from sterna.eval.quality import Positions
from sterna.model.config import ModelConfig
from sterna.model.load import load_config

PEER_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
IMATRIX = "+imatrix"


def is_peer(row: str) -> bool:
    """Whether a row is one of llama.cpp's types."""
    return row.removesuffix(IMATRIX) in PEER_TYPES


def peer_files(
    model: Path, args: argparse.Namespace, rows: list[str], importance: Mapping[str, Tensor]
) -> dict[str, Path]:
    """The GGUF file of each row, made from a BF16 one when it is not there."""
    base = args.work / "bf16.gguf"
    if not base.exists():
        write_gguf(model, base, args.metadata)
    files = {row: args.work / f"{row}.gguf" for row in rows}
    for row, file in files.items():
        if file.exists():
            continue
        program = args.llamacpp / "build" / "bin" / "llama-quantize"
        options = []
        if row.endswith(IMATRIX):
            options = ["--imatrix", args.work / "imatrix.gguf"]
            _write_imatrix(options[1], load_config(model), importance)
        command = [program, *options, base, file, row.removesuffix(IMATRIX)]
        subprocess.run(command, check=True, capture_output=True)
    return files


def scores_on_own_kernels(
    windows: Mapping[str, Tensor], args: argparse.Namespace, files: Mapping[str, Path]
) -> dict[str, dict[str, Positions]]:
    """Positions by row and domain, against llama.cpp's own BF16."""
    tokens, out = args.work / "windows.npz", args.work / "scored.npz"
    np.savez(tokens, **{name: w.numpy() for name, w in windows.items()})
    script, base = Path(__file__).with_name("llamacpp.py"), args.work / "bf16.gguf"
    command = [args.llamacpp / "bin" / "python", script, base, tokens, out,
               *(f"{row}={file}" for row, file in files.items())]  # fmt: skip
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(args.llamacpp / "build" / "bin")}
    subprocess.run(command, check=True, env=env)
    scored = np.load(out)
    return {
        row: {d: Positions(*torch.from_numpy(scored[f"{row}/{d}"]).float()) for d in windows}
        for row in files
    }


def tensor_bytes(file: Path) -> int:
    """Of all tensors of a GGUF file, metadata left out."""
    content = read_gguf(file)
    return sum(len(content.tensor_bytes(name)) for name in content.tensors)


def _write_imatrix(path: Path, config: ModelConfig, importance: Mapping[str, Tensor]) -> None:
    """Mean squares of inputs [K] by module name, as llama.cpp's imatrix file."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for module, squares in importance.items():
        for name in gguf_names(f"{module}.weight", config):
            writer.add_tensor(f"{name}.in_sum2", squares.float().numpy()[None])
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

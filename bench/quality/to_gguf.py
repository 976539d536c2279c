"""A fine-tuned folder as a BF16 GGUF file: the metadata of the file it was made from, new weights.

    python bench/quality/to_gguf.py FOLDER OUT.gguf [--metadata MODEL.gguf]

Needs the `gguf` package. Rows of q and k go back to llama.cpp's order of rotated pairs. Norms are
float32, as llama.cpp's own converter writes them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from sterna.model.config import ModelConfig
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.model.weights import split_parts

_SKIPPED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_gguf(folder: Path, out: Path, metadata: Path) -> None:
    """Write `folder`'s weights to `out` with the key-value pairs of `metadata`."""
    reader = gguf.GGUFReader(metadata)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if not name.startswith(_SKIPPED):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, value in _tensors(folder):
        if value.dim() == 1:
            writer.add_tensor(name, value.float().numpy())
        else:
            raw: Any = value.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path) -> list[tuple[str, Tensor]]:
    decoder = load_model(folder).decoder
    config = decoder.config
    pairs = []
    for own_name, parameter in decoder.named_parameters():
        parts = split_parts(own_name, parameter.detach(), config.family.gguf_names, config)
        pairs += [(name, _permuted(name, value, config)) for name, value in parts]
    return pairs


def _permuted(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """Rows [head, half, pair] to [head, pair, half]."""
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None or not config.family.gguf_permutes_qk:
        return value
    halves = value.reshape(heads, 2, -1, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def main() -> int:
    """Convert one folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--metadata", type=Path, default=None)
    args = parser.parse_args()
    write_gguf(args.folder, args.out, args.metadata or Path(resolve_model("")))
    return 0


if __name__ == "__main__":
    sys.exit(main())

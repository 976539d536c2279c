"""A trained folder as a BF16 GGUF file for llama.cpp.

    python bench/quality/to_gguf.py FOLDER OUT.gguf [--metadata MODEL.gguf]

The metadata are those of another file of the same sizes and tokenizer, or made of the folder's
config.json and byte-level BPE. Needs the `gguf` package. Rows of q and k go back to llama.cpp's
order of rotated pairs. Norms are float32, as llama.cpp's own converter writes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from sterna.model.config import ModelConfig
from sterna.model.load import load_config, load_model
from sterna.model.weights import checkpoint_names, split_parts

_SKIPPED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_gguf(folder: Path, out: Path, metadata: Path | None = None) -> None:
    """Write `folder`'s weights to `out` with the key-value pairs of `metadata`, or its own."""
    if metadata is None:
        writer = gguf.GGUFWriter(out, "llama")
        _add_own_metadata(writer, folder)
    else:
        reader = gguf.GGUFReader(metadata)
        writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
        _copy_metadata(writer, reader)
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


def gguf_names(own_name: str, config: ModelConfig) -> tuple[str, ...]:
    """`layers.3.attn.qkv.weight` -> the names of its parts in the file."""
    return checkpoint_names(own_name, config.family.gguf_names)


def _copy_metadata(writer: Any, reader: Any) -> None:
    for name, field in reader.fields.items():
        if not name.startswith(_SKIPPED):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)


def _add_own_metadata(writer: Any, folder: Path) -> None:
    """Sizes from config.json; the BPE's pieces and merges, for files that are fed token ids."""
    config = load_config(folder)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.ropes[0].theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = set(config.eos_token_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
        for i in range(len(pieces))
    ])  # fmt: skip
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge)
                             for merge in model["merges"]])  # fmt: skip
    writer.add_eos_token_id(min(special))


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
    write_gguf(args.folder, args.out, args.metadata)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Models of a given shape with random weights: as a Sterna engine in FP6, as GGUF files.

Values do not matter for speed as long as they are finite. Codes and quantised blocks are random
bytes, copied from one pool; scales keep activations near one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn

from sterna.engine.build import set_threads
from sterna.engine.config import EngineConfig
from sterna.engine.engine import Engine
from sterna.kernels.quant_weight import QuantWeight
from sterna.kernels.tiles import TILE_ROWS, tile_grid
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.quant.formats import WeightFormat, parse_format
from sterna.quant.linear import quant_modules, replace_weight, weight_shapes
from sterna.text.tokenizer import load_tokenizer

CONTEXT = 512
# bytes of a block of 256 values, and where its float16 scales lie
BLOCKS = {Kind.Q6_K: (210, (208,)), Kind.Q4_K: (144, (0, 2))}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like model."""

    name: str
    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    is_tied: bool = False

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


SHAPES = {
    "135m": Shape("135M (SmolLM2)", 576, 30, 1536, 9, 3, 49152, True),
    "1b": Shape("1.1B (TinyLlama)", 2048, 22, 5632, 32, 4, 32000),
    "4b": Shape("3.8B (Phi-3-mini)", 3072, 32, 8192, 32, 32, 32064),
}


def build_random_engine(shape: Shape, weights: str, threads: int) -> Engine:
    """An engine with random codes of format `weights`; its tokenizer is the default model's."""
    set_threads(threads)
    decoder = random_decoder(shape, parse_format(weights))
    config = EngineConfig(
        threads=threads, max_model_len=CONTEXT, token_budget=256, weights="auto", max_num_seqs=8
    )
    return Engine(decoder, load_tokenizer(Path(resolve_model(""))), config)


def random_decoder(shape: Shape, fmt: WeightFormat) -> Decoder:
    """Every matrix in tiles of random codes; norms are ones."""
    decoder = Decoder(parse_config(_hf_config(shape), "shape"), torch.bfloat16, "meta", "cpu")
    pool = torch.randint(0, 256, (1 << 24,), dtype=torch.uint8)
    for name, rows, in_features, is_gated in list(weight_shapes(decoder)):
        replace_weight(decoder, name, _random_weight(pool, fmt, rows, in_features, is_gated))
    for name, parameter in list(decoder.named_parameters()):
        owner = decoder.get_submodule(name.rpartition(".")[0])
        ones = nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16), requires_grad=False)
        setattr(owner, name.rpartition(".")[2], ones)
    return decoder


def _random_weight(
    pool: torch.Tensor, fmt: WeightFormat, rows: int, in_features: int, is_gated: bool
) -> QuantWeight:
    halves = 2 if is_gated else 1
    blocks, tiles = tile_grid(rows // halves, in_features)
    blocks, size = halves * blocks, 128 * fmt.bits
    codes = torch.empty(blocks * tiles * size, dtype=torch.uint8)
    for at in range(0, codes.numel(), pool.numel()):
        part = codes[at : at + pool.numel()]
        part.copy_(pool[: part.numel()])
    groups = -(-in_features // fmt.group_size) if fmt.group_size else 1
    scales = torch.full((blocks, groups, TILE_ROWS), 0.25 * in_features**-0.5)
    stored = scales if fmt.scale == "float32" else scales.half()
    return QuantWeight(codes.view(blocks, tiles, size), stored, fmt.table(), None, fmt.bits,
                       fmt.group_size, in_features, rows // halves, is_gated)  # fmt: skip


def read_bytes(engine_decoder: Decoder) -> int:
    """Weight bytes that a decode step reads: all but an untied embedding."""
    return sum(
        module.quant_weight.nbytes
        for name, module in quant_modules(engine_decoder)
        if engine_decoder.lm_head is None or name != "embed_tokens"
    )


def _hf_config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.is_tied,
    }


def write_random_gguf(shape: Shape, mix: str, out: Path) -> int:
    """`mix` is "Q6_K" or "Q4_K_M", tensor types as llama-quantize chooses them for Llama.

    Returns the bytes a decode step reads. Needs widths that are multiples of 256.
    """
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    pools = {kind: _block_pool(kind) for kind in BLOCKS}
    total = 0
    for name, rows, columns in _matrices(shape):
        kind = _kind(shape, mix, name)
        raw = _rows(pools[kind], rows, columns // 256 * BLOCKS[kind][0])
        writer.add_tensor(name, raw, raw_dtype=kind)
        total += 0 if name == "token_embd.weight" else raw.nbytes
    for name in _norms(shape):
        writer.add_tensor(name, np.ones(shape.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def _matrices(shape: Shape) -> list[tuple[str, int, int]]:
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    sizes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
             "attn_output": (hidden, hidden), "ffn_gate": (shape.inner, hidden),
             "ffn_up": (shape.inner, hidden), "ffn_down": (hidden, shape.inner)}  # fmt: skip
    found = [("token_embd.weight", shape.vocab, hidden), ("output.weight", shape.vocab, hidden)]
    for i in range(shape.layers):
        found += [(f"blk.{i}.{name}.weight", *size) for name, size in sizes.items()]
    return found


def _norms(shape: Shape) -> list[str]:
    layers = [f"blk.{i}.{n}.weight" for i in range(shape.layers) for n in ("attn_norm", "ffn_norm")]
    return ["output_norm.weight", *layers]


def _kind(shape: Shape, mix: str, name: str) -> Kind:
    """Q4_K_M keeps the head, and attn_v and ffn_down of half the layers, in Q6_K."""
    if mix == "Q6_K" or name == "output.weight":
        return Kind.Q6_K
    if "attn_v" not in name and "ffn_down" not in name:
        return Kind.Q4_K
    layer, eighth = int(name.split(".")[1]), shape.layers // 8
    is_finer = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
    return Kind.Q6_K if is_finer else Kind.Q4_K


def _block_pool(kind: Kind) -> np.ndarray:
    size, scales = BLOCKS[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (1 << 16, size), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = np.full(1, 1e-4, np.float16).view(np.uint8)
    return blocks.reshape(-1)


def _rows(pool: np.ndarray, rows: int, row_bytes: int) -> np.ndarray:
    """[rows, row_bytes] of whole blocks, repeated from the pool."""
    return np.resize(pool, rows * row_bytes).reshape(rows, row_bytes)

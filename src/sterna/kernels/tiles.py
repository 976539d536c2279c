"""Tile layout v1: where each code of a quantised weight lies. The same bytes serve every device.

A tile is 16 rows x 64 k = 1024 codes in 128 * bits bytes; tiles [R, K64, 128 * bits] uint8 with
R = ceil(rows / 16), K64 = ceil(in_features / 64). Rows come first, so any multiple of 16 rows is
one byte range: shards of threads and of tensor parallelism are slices of the file.

A *word* (row r, q 0..3, j 0..3) is 4 codes: byte b holds k = 16 j + 2 q + (8, 0, 9, 1)[b] of the
tile. A *vector* (q, j) is the words of rows 0..15: 64 codes. So 64 bytes are a full AVX-512
register in which a 32-bit lane is one row and four of its k, and thread (g, q) of mma.m16n8k16
finds its A fragment of slice j in the words of rows g and g + 8.

    bits 8  for q, j: the vector, a byte a code
    bits 6  for q, j = 0..2: 64 bytes. Bit 7 = code bit 5, bits 4..0 = code bits 4..0; bits 6..5
            hold, for j = 0, 1, 2, bits 1..0, 3..2, 5..4 of the code of j = 3 in the same place
    bits 4  for q, j = 0..1: 64 bytes, low nibble = code of j, high nibble = code of j + 2
    bits 5  for q: the two nibble vectors of bits 4 (low 4 bits of the codes), then four 8-byte
            little-endian words, bit i of word j = bit 4 of byte i of vector j

Codes are padded with zeros up to whole tiles. Road not taken: the papers' 4 + 2 bit planes
(FP6-LLM, section 5); they need two address streams and 64 rows a block (`quant/planes.py` holds
them as the oracle of the tests).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TILE_ROWS = 16
TILE_K = 64
WIDTHS = (4, 5, 6, 8)  # bits a code
_BYTE_K = (8, 0, 9, 1)  # k of a word's bytes, less 16 j + 2 q
_WORD_Q, _WORD_J = 4, 4


def tile_grid(rows: int, in_features: int) -> tuple[int, int]:
    """(R, K64): row blocks and k blocks that hold a weight of this size."""
    return -(-rows // TILE_ROWS), -(-in_features // TILE_K)


def pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """codes [N, K] uint8 below 2^bits -> tiles [R, K64, 128 * bits] uint8."""
    vectors = _to_vectors(_padded(codes))
    return _PACKERS[bits](vectors).flatten(2)


def unpack_tiles(tiles: Tensor, bits: int, in_features: int = 0) -> Tensor:
    """Tiles -> codes [R * 16, in_features] uint8; in_features 0 leaves the padding on.

    The inverse of `pack_tiles`: every code comes back bit for bit.
    """
    codes = _from_vectors(_UNPACKERS[bits](tiles))
    return codes[:, : in_features or None]


def _padded(codes: Tensor) -> Tensor:
    rows, in_features = codes.shape
    right, below = -in_features % TILE_K, -rows % TILE_ROWS
    return F.pad(codes, (0, right, 0, below)) if right or below else codes


def _word_order(device: torch.device) -> Tensor:
    """Index [64]: the k of byte (q, j, b) of a row's 16 words."""
    k = [16 * j + 2 * q + b for q in range(_WORD_Q) for j in range(_WORD_J) for b in _BYTE_K]
    return torch.tensor(k, device=device)


def _to_vectors(codes: Tensor) -> Tensor:
    """[R * 16, K64 * 64] -> [R, K64, q 4, j 4, 64]."""
    num_words = codes.shape[1] // TILE_K * 16
    by_word = codes.view(-1, codes.shape[1] // TILE_K, TILE_K)[:, :, _word_order(codes.device)]
    words = by_word.contiguous().view(torch.int32).view(-1, TILE_ROWS, num_words)
    vectors = words.transpose(1, 2).contiguous().view(torch.uint8)
    return vectors.view(words.shape[0], -1, _WORD_Q, _WORD_J, TILE_K)


def _from_vectors(vectors: Tensor) -> Tensor:
    """The inverse of `_to_vectors`."""
    num_rows, num_tiles = vectors.shape[:2]
    words = vectors.contiguous().view(torch.int32).view(num_rows, num_tiles * 16, TILE_ROWS)
    by_word = words.transpose(1, 2).contiguous().view(torch.uint8).view(-1, num_tiles, TILE_K)
    natural = torch.argsort(_word_order(vectors.device))
    return by_word[:, :, natural].view(num_rows * TILE_ROWS, num_tiles * TILE_K)


def _pack8(vectors: Tensor) -> Tensor:
    return vectors


def _unpack8(tiles: Tensor) -> Tensor:
    return tiles.view(*tiles.shape[:2], _WORD_Q, _WORD_J, TILE_K)


def _pack6(vectors: Tensor) -> Tensor:
    direct, spread = vectors[..., :3, :], vectors[..., 3:, :]
    parts = torch.cat([(spread & 3) << 5, (spread << 3) & 0x60, (spread << 1) & 0x60], dim=-2)
    return ((direct & 0x20) << 2) | (direct & 0x1F) | parts


def _unpack6(tiles: Tensor) -> Tensor:
    packed = tiles.view(*tiles.shape[:2], _WORD_Q, 3, TILE_K)
    low, middle, high = ((packed[..., j : j + 1, :] >> 5) & 3 for j in range(3))
    direct = ((packed >> 2) & 0x20) | (packed & 0x1F)
    return torch.cat([direct, low | (middle << 2) | (high << 4)], dim=-2)


def _pack4(vectors: Tensor) -> Tensor:
    return (vectors[..., :2, :] & 15) | (vectors[..., 2:, :] << 4)


def _unpack4(tiles: Tensor) -> Tensor:
    packed = tiles.view(*tiles.shape[:2], _WORD_Q, 2, TILE_K)
    return torch.cat([packed & 15, packed >> 4], dim=-2)


def _bit_weights(device: torch.device) -> Tensor:
    return torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=device)


def _pack5(vectors: Tensor) -> Tensor:
    nibbles = _pack4(vectors).flatten(3)
    high = (vectors >> 4).view(*vectors.shape[:4], TILE_K // 8, 8) * _bit_weights(vectors.device)
    return torch.cat([nibbles, high.sum(dim=-1, dtype=torch.uint8).flatten(3)], dim=3)


def _unpack5(tiles: Tensor) -> Tensor:
    packed = tiles.view(*tiles.shape[:2], _WORD_Q, 2 * TILE_K + _WORD_J * 8)
    nibbles, bits = torch.split(packed, [2 * TILE_K, _WORD_J * 8], dim=-1)
    is_set = (bits.reshape(*packed.shape[:3], _WORD_J, 8, 1) & _bit_weights(tiles.device)) != 0
    low = _unpack4(nibbles.contiguous().view(*tiles.shape[:2], -1))
    return low | (is_set.flatten(4).to(torch.uint8) << 4)


_PACKERS = {4: _pack4, 5: _pack5, 6: _pack6, 8: _pack8}
_UNPACKERS = {4: _unpack4, 5: _unpack5, 6: _unpack6, 8: _unpack8}

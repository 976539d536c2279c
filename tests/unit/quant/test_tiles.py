"""The tile layout against its definition, code by code, and against the papers' 4 + 2 planes."""

from __future__ import annotations

import pytest
import torch

from sterna.kernels.tiles import WIDTHS, pack_tiles, tile_grid, unpack_tiles
from sterna.quant.planes import join_4_2, split_4_2

SHAPES = [(16, 64), (1, 1), (17, 65), (48, 128), (30, 200), (192, 576)]


def random_codes(rows: int, cols: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + rows * cols)
    return torch.randint(0, 1 << bits, (rows, cols), generator=generator, dtype=torch.uint8)


def code_at(tile: list[int], bits: int, row: int, k: int) -> int:
    """One code of one tile, read from the definition in the design: word by word, bit by bit."""
    j, rest = divmod(k, 16)
    half, rest = divmod(rest, 8)
    q, low = divmod(rest, 2)
    i = row * 4 + 2 * low + (1 - half)  # byte in the vector: k = +8, +0, +9, +1
    if bits == 8:
        return tile[(q * 4 + j) * 64 + i]
    if bits == 6:
        three = [tile[(q * 3 + plane) * 64 + i] for plane in range(3)]
        if j == 3:
            return sum(((byte >> 5) & 3) << (2 * plane) for plane, byte in enumerate(three))
        return (three[j] >> 7) << 5 | three[j] & 31
    per_q = 128 if bits == 4 else 160
    nibble = tile[q * per_q + (j % 2) * 64 + i] >> (4 * (j // 2)) & 15
    if bits == 4:
        return nibble
    top = tile[q * per_q + 128 + j * 8 + i // 8] >> (i % 8) & 1
    return top << 4 | nibble


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_tile_is_laid_out_as_defined(bits):
    codes = random_codes(32, 128, bits)
    tiles = pack_tiles(codes, bits)
    assert tiles.shape == (2, 2, 128 * bits)
    for block in range(2):
        for k_block in range(2):
            tile = tiles[block, k_block].tolist()
            got = [[code_at(tile, bits, r, k) for k in range(64)] for r in range(16)]
            here = codes[block * 16 : block * 16 + 16, k_block * 64 : k_block * 64 + 64]
            assert got == here.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_of_any_shape(bits, shape):
    codes = random_codes(*shape, bits)
    tiles = pack_tiles(codes, bits)
    assert tiles.shape == (*tile_grid(*shape), 128 * bits)
    assert torch.equal(unpack_tiles(tiles, bits, shape[1])[: shape[0]], codes)
    padded = unpack_tiles(tiles, bits)
    assert padded.sum(dtype=torch.int64) == codes.sum(dtype=torch.int64), "padding is not zero"


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_in_every_position_of_a_tile(bits):
    """One tile a code: 2^bits tiles, each full of it; and one code alone in each position."""
    for code in range(1 << bits):
        codes = torch.full((16, 64), code, dtype=torch.uint8)
        assert torch.equal(unpack_tiles(pack_tiles(codes, bits), bits), codes)
    for bit in range(bits):  # a bit alone moves as in any code: positions do not depend on values
        rows = torch.eye(1024, dtype=torch.uint8).mul_(1 << bit).view(1024 * 16, 64)
        tiles = pack_tiles(rows, bits)
        assert torch.equal(unpack_tiles(tiles, bits), rows)
        assert (bits_set(tiles.view(1024, -1)) == 1).all()


def bits_set(x: torch.Tensor) -> torch.Tensor:
    return ((x[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).sum(dim=(1, 2))


def test_six_bits_agree_with_the_papers_planes():
    codes = random_codes(64, 128, 6)
    four, two = split_4_2(codes)
    assert (four.shape, two.shape) == ((64, 64), (64, 32))
    assert torch.equal(join_4_2(four, two), codes)
    assert torch.equal(unpack_tiles(pack_tiles(join_4_2(four, two), 6), 6), codes)
    assert tiles_bytes(64, 128) == four.numel() + two.numel()


def tiles_bytes(rows: int, cols: int) -> int:
    return pack_tiles(random_codes(rows, cols, 6), 6).numel()


def test_row_blocks_are_slices():
    """A shard of row blocks packs to the same bytes as the slice of the whole."""
    codes = random_codes(64, 192, 6)
    assert torch.equal(pack_tiles(codes[16:48], 6), pack_tiles(codes, 6)[1:3])

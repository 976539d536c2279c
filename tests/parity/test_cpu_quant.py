"""The C++ kernels of quantised weights against the reference, on every instruction set here.

Shapes: in_features of less than a tile, with a ragged end (200: half a scale group of 32 missing,
and a group of 128 whose second tile is ragged), and of more than one chunk of 16 tiles (1,096);
outputs that are no multiple of a block (40, 33) or fill an odd number of them (48).
Rows: 1, the largest of the in-register path (8), the first of the panel path (9), uneven tiles
(17, 130), two row blocks (300).
"""

from __future__ import annotations

import pytest
import torch

from sterna.core.errors import KernelError
from sterna.kernels import quant_reference
from sterna.kernels.quant_weight import QuantWeight
from sterna.kernels.tiles import TILE_ROWS, pack_tiles, tile_grid
from sterna.quant.formats import parse_format

_cpu = pytest.importorskip("sterna.kernels._cpu", reason="the C++ extension is not built")
from sterna.kernels import cpu_quant_calls as calls  # noqa: E402  (needs the extension)
from sterna.kernels.cpu_backend import CpuBackend  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
FORMATS = ["fp6", "fp6-e3m2", "fp6-mixed", "fp6-g128", "fp6-g64", "fp6-mixed-g32", "mxfp6", "fp5",
           "fp5-g32", "fp4", "int4-g32", "int4-g128", "mxfp4", "int5-g64", "int6", "int8",
           "int8-g128", "fp8", "nf6", "nf6-g128", "nf5", "nf4-g32"]  # fmt: skip
SHAPES = [(64, 48), (50, 33), (200, 40), (1096, 40)]


@pytest.fixture(scope="module", params=_cpu.available_isas())
def backend(request):
    return CpuBackend(2, request.param)


def weight(name, k, n, is_gated=False, seed=0) -> QuantWeight:
    fmt, g = parse_format(name), torch.Generator().manual_seed(seed)
    halves, (blocks, _) = 2 if is_gated else 1, tile_grid(n, k)
    groups = -(-k // fmt.group_size) if fmt.group_size else 1
    codes = torch.randint(0, 1 << fmt.bits, (halves, n, k), generator=g, dtype=torch.uint8)
    tiles = torch.cat([pack_tiles(half, fmt.bits) for half in codes])
    scales = (torch.rand(halves * blocks, groups, TILE_ROWS, generator=g) + 0.5) / 64
    powers = torch.randint(118, 124, scales.shape, generator=g, dtype=torch.uint8)
    kinds = {"float32": scales, "float16": scales.half(), "e8m0": powers}
    formats = torch.randint(0, 2, (halves * blocks, TILE_ROWS), generator=g, dtype=torch.uint8)
    return QuantWeight(tiles, kinds[fmt.scale].contiguous(), fmt.table(),
                       formats if fmt.is_mixed else None, fmt.bits, fmt.group_size, k, n,
                       is_gated)  # fmt: skip


def rand(*shape, dtype=torch.float32, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, want):
    """`want` is float32. Half a bfloat16 step of each value, and float32 sums in another order."""
    error, want = (got.double() - want.double()).abs(), want.double().abs()
    rounding = 2**-8 if got.dtype == torch.bfloat16 else 0.0
    worst = (error - rounding * want).max() / want.max().clamp(min=1e-6)
    assert worst <= 5e-5, f"{worst:.2e}"


def floats(*tensors):
    return tuple(t.float() for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_equals_the_reference_and_does_not_depend_on_the_batch(backend, dtype, name, shape):
    k, n = shape
    w = weight(name, k, n).flat()
    x, bias, residual = rand(300, k, dtype=dtype), rand(n, dtype=dtype), rand(300, n, dtype=dtype)
    whole = calls.quant_linear(backend.eager, x, *w, bias, residual, n)
    x32, *rest = floats(x, bias, residual)
    close(whole, quant_reference.quant_linear(x32, *w, *rest, n))
    sums = calls.quant_logits(backend.eager, x, *w, n)  # float32: no rounding hides a bit
    for start, stop in [(0, 1), (299, 300), (3, 5), (10, 18), (20, 29), (100, 117), (7, 137)]:
        rows = slice(start, stop)
        part = calls.quant_linear(backend.eager, x[rows], *w, bias, residual[rows], n)
        assert torch.equal(part, whole[rows]), f"rows {start}..{stop}"
        part = calls.quant_logits(backend.eager, x[rows], *w, n)
        assert torch.equal(part, sums[rows]), f"rows {start}..{stop}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fp6", "fp6-g128", "fp6-mixed", "int4-g32"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_linear(backend, dtype, name, activation):
    w = weight(name, 200, 72, is_gated=True).flat()
    x = rand(140, 200, dtype=dtype)
    whole = calls.quant_gated_linear(backend.eager, x, *w, activation, 72)
    close(whole, quant_reference.quant_gated_linear(x.float(), *w, activation, 72))
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        part = calls.quant_gated_linear(backend.eager, x[:rows], *w, activation, 72)
        assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fp6", "fp6-g128", "fp6-mixed", "int4-g32", "fp5", "int8"])
def test_logits_and_embed_share_a_table(backend, dtype, name):
    w = weight(name, 200, 101).flat()
    tokens = torch.tensor([0, 100, 33, 7], dtype=torch.int32)
    for scale in (1.0, 8.0):
        got = calls.quant_embed(backend.eager, tokens, *w, scale, dtype)
        assert torch.equal(got, quant_reference.quant_embed(tokens, *w, scale, dtype))
    x = rand(3, 200, dtype=dtype)
    got = calls.quant_logits(backend.eager, x, *w, 101, 5.0, 0.5)
    assert got.dtype == torch.float32
    close(got, quant_reference.quant_logits(x.float(), *w, 101, 5.0, 0.5))


# e2m3 (one plane) with every kind of group, e3m2 and mixed rows (two planes), each other width
INT8_FORMATS = ["fp6", "fp6-g128", "fp6-g32", "fp6-e3m2", "fp6-mixed", "fp6-mixed-g32", "fp5",
                "mxfp4", "int4-g64", "int5", "int6-g32", "int8", "int8-g128",
                "nf6", "nf6-g128", "nf5-g32", "nf4"]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INT8_FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_activations(backend, dtype, name, shape):
    """Sums are exact integers, so only the scales' products and additions round."""
    k, n = shape
    w = weight(name, k, n).flat()
    x, bias, residual = rand(300, k, dtype=dtype), rand(n, dtype=dtype), rand(300, n, dtype=dtype)
    whole = calls.quant_linear(backend.eager, x, *w, bias, residual, n, True)
    grid, *rest = floats(quant_reference.int8_rows(x), bias, residual)
    close(whole, quant_reference.quant_linear(grid, *w, *rest, n))
    sums = calls.quant_logits(backend.eager, x, *w, n, int8_activations=True)
    close(sums, quant_reference.quant_logits(x, *w, n, int8_activations=True))
    for start, stop in [(0, 1), (3, 5), (9, 12), (20, 33), (30, 35), (100, 228), (7, 137)]:
        part = calls.quant_logits(backend.eager, x[start:stop], *w, n, int8_activations=True)
        assert torch.equal(part, sums[start:stop]), f"rows {start}..{stop}"


@pytest.mark.parametrize("name", ["fp6", "fp6-mixed", "int4-g32"])
def test_int8_activations_gated(backend, name):
    w = weight(name, 200, 72, is_gated=True).flat()
    x = rand(140, 200, dtype=torch.bfloat16)
    got = calls.quant_gated_linear(backend.eager, x, *w, "silu", 72, True)
    grid = quant_reference.int8_rows(x)
    close(got, quant_reference.quant_gated_linear(grid, *w, "silu", 72))
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        part = calls.quant_gated_linear(backend.eager, x[:rows], *w, "silu", 72, True)
        assert torch.equal(part, got[:rows]), f"{rows} rows"


def test_int8_activations_of_odd_rows(backend):
    """Zero rows give zero, rows with NaN or infinity give NaN, and neighbours do not notice."""
    w = weight("fp6", 200, 40).flat()
    x = rand(5, 200)
    x[1], x[2, 7], x[3, 199] = 0.0, float("nan"), float("inf")
    got = calls.quant_linear(backend.eager, x, *w, None, None, 40, True)
    want = quant_reference.quant_linear(x, *w, None, None, 40, True)
    assert got[2:4].isnan().all() and want[2:4].isnan().all()
    assert torch.equal(got[1], torch.zeros(40))
    close(got[[0, 4]], want[[0, 4]])


def test_int8_activations_refuse_fp8(backend):
    w = weight("fp8", 64, 40).flat()
    with pytest.raises(KernelError, match="every format but fp8"):
        calls.quant_linear(backend.eager, rand(2, 64), *w, None, None, 40, True)


@pytest.mark.parametrize("is_int8", [False, True])
def test_recorded_calls_replay_for_any_number_of_rows(backend, is_int8):
    """embed -> linear with residual -> gated -> logits on a tape equals the eager calls."""
    from sterna.kernels.tape import StepTape

    table, square = weight("fp6", 96, 101).flat(), weight("fp6-g32", 96, 96, seed=1).flat()
    halves = weight("fp6-mixed", 96, 96, is_gated=True, seed=2).flat()

    def forward(tokens):
        sink = backend.sink
        x = calls.quant_embed(sink, tokens, *table, 1.0, torch.bfloat16)
        x = calls.quant_linear(sink, x, *square, None, x, 96, is_int8)
        x = calls.quant_gated_linear(sink, x, *halves, "silu", 96, is_int8)
        return calls.quant_logits(sink, x, *table, 101, int8_activations=is_int8)

    tokens = torch.arange(40, dtype=torch.int32) * 2
    tape = StepTape(backend, forward, tokens, (tokens,), ())
    want = forward(tokens)
    for rows in (40, 1, 9):
        tape.replay(rows, rows, 1)
        assert torch.equal(tape.output[:rows], want[:rows])
    assert len(tape) == 4 + 3 * is_int8

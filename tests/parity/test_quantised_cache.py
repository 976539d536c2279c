"""The quantised KV cache: the C++ kernels against the reference, on every instruction set.

Codes and scales must be equal to the bit (divisions and roundings to even are exact operations,
and without rotation both sides quantise the same numbers); attention over them is equal within the
rounding of probabilities, and to the bit however a sequence is cut.
"""

from __future__ import annotations

import pytest
import torch

from sterna.kernels import cpu_calls, kv_codes, reference
from sterna.kernels.backend import ReferenceBackend

_cpu = pytest.importorskip("sterna.kernels._cpu", reason="the C++ extension is not built")
from sterna.kernels.cpu_backend import CpuBackend  # noqa: E402  (needs the extension)

DTYPES = (torch.float32, torch.bfloat16)
FORMATS = (torch.int8, torch.float8_e4m3fn)
HEADS, KV_HEADS, SIZE = 6, 2, 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=_cpu.available_isas())
def backend(request):
    return CpuBackend(2, request.param)


def rows_of(cache, block_size, head_dim, dtype):
    """A C++ cache in the reference's layout: uint8 [blocks, 2, G, block_size, C + 4]."""
    pair = 2 if dtype == torch.bfloat16 else 1
    heads = cache.view(torch.uint8).view(cache.shape[0], 2, KV_HEADS, -1)
    codes, scales = heads.split([block_size * head_dim, block_size * 4], dim=-1)
    scales = scales.unflatten(-1, (block_size, 4))
    k = codes[:, 0].unflatten(-1, (block_size // 16, head_dim // pair, 16, pair)).transpose(3, 4)
    v = codes[:, 1].unflatten(-1, (block_size // pair, head_dim, pair)).transpose(-1, -2)
    shape = (cache.shape[0], KV_HEADS, block_size, head_dim)
    plain = torch.stack([k.reshape(shape), v.reshape(shape)], 1)
    return torch.cat([plain, scales], -1)


def spread(tokens, head_dim, dtype):
    """Heads of very different sizes, with zeros, values below e4m3's normal ones, and ties."""
    torch.manual_seed(0)
    heads = HEADS + 2 * KV_HEADS
    x = torch.randn(tokens, heads, head_dim) * 10.0 ** torch.randint(-4, 5, (tokens, heads, 1))
    x[::3, :, ::4] *= 1e-5
    x[1, :, :] = 0
    x[2] = torch.arange(head_dim) - head_dim / 2  # halves when divided by the scale
    x[2, :, 0] = 127
    return x.to(dtype).view(tokens, -1)


def store(call, x, cache, slots, block_size, head_dim):
    at = torch.arange(len(x), dtype=torch.int32)
    tail = (HEADS, KV_HEADS, head_dim, cache, slots, block_size)
    return call(x, at, None, None, None, 1e-6, False, *tail)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("head_dim", "block_size"), [(8, 16), (64, 32), (80, 16)])
def test_codes_equal_the_reference_to_the_bit(backend, dtype, kind, head_dim, block_size):
    x = spread(41, head_dim, dtype)
    slots = torch.randperm(3 * block_size)[:41] + block_size
    shape = (4, block_size, KV_HEADS, head_dim, kind, CPU)
    ours, theirs = backend.new_kv_cache(*shape), ReferenceBackend().new_kv_cache(*shape)
    assert ours.shape == theirs.shape
    q = store(lambda *a: cpu_calls.rope(backend.eager, *a), x, ours, slots, block_size, head_dim)
    assert torch.equal(q, store(reference.rope_store, x, theirs, slots, block_size, head_dim))
    got = rows_of(ours, block_size, head_dim, dtype)
    assert torch.equal(got, theirs.view(torch.uint8).view(got.shape))


@pytest.mark.parametrize("kind", FORMATS)
def test_quantising_is_within_half_a_step(kind):
    x = torch.randn(50, 64) * 10.0 ** torch.randint(-4, 5, (50, 1))
    error = (kv_codes.dequantise(kv_codes.quantise(x, kind), kind) - x).abs()
    largest = x.abs().amax(-1, keepdim=True)
    # int8: half a step of largest / 127. e4m3: 2^-4 of the number, or half of 2^-9 of the scale.
    step = (
        largest / 127 / 2 if kind == torch.int8 else (x.abs() / 16).clamp(min=largest / 448 / 1024)
    )
    assert (error <= step * 1.0001).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_reads_as_nan(backend, kind, fault):
    x = spread(3, 8, torch.bfloat16)
    x[0, HEADS * 8 + 3] = fault  # first key head of token 0
    cache = backend.new_kv_cache(3, SIZE, KV_HEADS, 8, kind, CPU)
    slots = torch.arange(16, 19)
    store(lambda *a: cpu_calls.rope(backend.eager, *a), x, cache, slots, SIZE, 8)
    rows = rows_of(cache, SIZE, 8, torch.bfloat16)
    found = kv_codes.dequantise(rows, kind).isnan()
    assert found[1, 0, 0, 0].all()
    assert found.sum() == 8
    theirs = kv_codes.quantise(x.view(3, -1, 8)[:, HEADS], kind)
    assert kv_codes.dequantise(theirs, kind).isnan().sum() == 8


CONTEXT = [(70, 1), (100, 37), (50, 50), (300, 1), (17, 2)]


def paged(call, backend, dtype, kind, case, chunks, head_dim=64, window=0, softcap=0.0):
    """Feed each sequence of (length, new) in chunks; the last `new` rows of each, by `call`."""
    cache = backend.new_kv_cache(90, SIZE, KV_HEADS, head_dim, kind, CPU)
    cache.view(torch.uint8).fill_(255)  # the bits of an earlier owner: scales that are NaN
    torch.manual_seed(6)
    width = (HEADS + 2 * KV_HEADS) * head_dim
    full = [torch.randn(n, width).to(dtype) for n, _ in case]
    outs, free = [], iter(torch.randperm(89).add(1).tolist())
    heads = (HEADS, KV_HEADS, head_dim)
    for seq, (n, new) in zip(full, case, strict=True):
        blocks = torch.tensor([next(free) for _ in range(-(-n // SIZE))])
        tables = torch.zeros(1, 24, dtype=torch.int32)
        tables[0, : len(blocks)] = blocks
        out, start = None, 0
        for stop in sorted({*chunks(n - new), n} - {0}):
            at = torch.arange(start, stop)
            part = seq[start:stop].contiguous()
            slots = blocks[at // SIZE] * SIZE + at % SIZE
            q = store(call["rope_store"], part, cache, slots, SIZE, head_dim)
            starts = torch.tensor([0, stop - start], dtype=torch.int32)
            lens = torch.tensor([stop], dtype=torch.int32)
            paging = (tables, starts, lens, *heads, SIZE)
            out = call["paged_attention"](q, cache, *paging, 0.125, window, softcap)
            start = stop
        outs.append(out[-new:])
    return outs


def calls_of(backend):
    names = ("rope_store", "paged_attention")
    return {n: lambda *a, n=n: cpu_calls.CALLS[n](backend.eager, *a) for n in names}


REFERENCE = {
    "rope_store": reference.rope_store,
    "paged_attention": reference.paged_attention,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (20, 0.0), (0, 5.0)])
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_attention_over_codes(backend, dtype, kind, window, softcap, head_dim):
    args = (dtype, kind, CONTEXT, lambda n: [n], head_dim, window, softcap)
    got = paged(calls_of(backend), backend, *args)
    want = paged(REFERENCE, ReferenceBackend(), *args)
    # As for a plain cache: probabilities (here times the value's scale) are rounded to the dtype.
    tolerance = 5e-5 if dtype == torch.float32 else 2**-6
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("window", [0, 20])
def test_bits_do_not_depend_on_chunking(backend, dtype, kind, window):
    case = [(n, 1) for n, _ in CONTEXT]
    call = calls_of(backend)
    whole = paged(call, backend, dtype, kind, case, lambda n: [], window=window)
    ways = [lambda n: [n], lambda n: range(7, n, 7), lambda n: range(1, n + 1)]
    for chunks in ways:
        outs = paged(call, backend, dtype, kind, case, chunks, window=window)
        assert all(torch.equal(a, b) for a, b in zip(whole, outs, strict=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_are_copied_and_wiped_as_a_whole(kind):
    """What the engine's copy-on-write and its wiping of a faulty request's blocks do."""
    cache = CpuBackend(1).new_kv_cache(4, SIZE, KV_HEADS, 8, kind, CPU)
    store(calls_of(CpuBackend(1))["rope_store"], spread(9, 8, DTYPES[1]), cache,
          torch.arange(16, 25), SIZE, 8)  # fmt: skip
    cache[2].copy_(cache[1])
    cache[torch.tensor([1, 3])] = 0
    rows = rows_of(cache, SIZE, 8, DTYPES[1])
    assert kv_codes.dequantise(rows[2], kind).abs().max() > 100
    assert rows[1].count_nonzero() == 0


def test_a_plain_cache_of_another_dtype_is_refused():
    from sterna.core.errors import KernelError

    backend = CpuBackend(1)
    cache = backend.new_kv_cache(2, SIZE, KV_HEADS, 8, torch.float32, CPU)
    x = spread(3, 8, torch.bfloat16)
    with pytest.raises(KernelError, match="int8"):
        store(calls_of(backend)["rope_store"], x, cache, torch.arange(16, 19), SIZE, 8)

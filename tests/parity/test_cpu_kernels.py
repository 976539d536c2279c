"""The C++ kernels against the PyTorch reference, on every instruction set this machine has.

Shapes: 1 row (memory-bound path), 7 and 16 (its largest tiles), 17 (first of the tiled path), 130
(two row blocks, uneven tiles); output widths that are and are not multiples of the panel; head
dims 8 (smaller than a vector), 64, 80 (no multiple of four vectors).
"""

from __future__ import annotations

import pytest
import torch

from sterna.kernels import cpu_calls, reference
from sterna.kernels.optable import OPS

_cpu = pytest.importorskip("sterna.kernels._cpu", reason="the C++ extension is not built")
from sterna.kernels.cpu_backend import CpuBackend  # noqa: E402  (needs the extension)

TOLERANCE = {op.name: op.tolerance for op in OPS}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=_cpu.available_isas())
def backend(request):
    return CpuBackend(2, request.param)


def close(got, want, name, dtype):
    limit = TOLERANCE[name][dtype]
    scale = want.float().abs().max().clamp(min=1e-6)
    error = ((got.float() - want.float()).abs().max() / scale).item()
    assert error <= limit, f"{name} {dtype}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 130])
@pytest.mark.parametrize("shape", [(64, 96), (48, 50), (130, 33)])
def test_linear_packed_and_plain(backend, dtype, rows, shape):
    torch.manual_seed(0)
    k, n = shape
    x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
    bias, residual = torch.randn(n).to(dtype), torch.randn(rows, n).to(dtype)
    want = reference.linear(x, w, bias, residual, n)
    packed = cpu_calls.linear(backend.eager, x, backend.pack_weight(w), bias, residual, n)
    plain = cpu_calls.linear(backend.eager, x, w, bias, residual, n)
    close(packed, want, "linear", dtype)
    assert torch.equal(packed, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_do_not_depend_on_the_batch(backend, dtype):
    torch.manual_seed(1)
    x, w = torch.randn(130, 64).to(dtype), torch.randn(100, 64).to(dtype)
    packed = backend.pack_weight(w)
    whole = cpu_calls.linear(backend.eager, x, packed, None, None, 100)
    for start, stop in [(0, 1), (5, 12), (3, 20), (60, 130)]:
        part = cpu_calls.linear(backend.eager, x[start:stop], packed, None, None, 100)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_gated_linear(backend, dtype, activation, rows):
    torch.manual_seed(2)
    x, w = torch.randn(rows, 64).to(dtype), torch.randn(2 * 72, 64).to(dtype)
    want = reference.gated_linear(x, w, activation, 72)
    packed = backend.pack_weight(w, gated=True)
    got = cpu_calls.gated_linear(backend.eager, x, packed, activation, 72)
    close(got, want, "gated_linear", dtype)
    assert torch.equal(got, cpu_calls.gated_linear(backend.eager, x, w, activation, 72))
    assert torch.equal(backend.unpack_weight(packed, 144, 64, gated=True), w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_and_embed_share_a_packed_table(backend, dtype):
    torch.manual_seed(3)
    table = torch.randn(101, 64).to(dtype)
    packed = backend.pack_weight(table)
    tokens = torch.tensor([0, 100, 33, 7], dtype=torch.int32)
    rows = cpu_calls.embed(backend.eager, tokens, packed, 64, 1.0)
    assert torch.equal(rows, table[tokens.long()])
    scaled = cpu_calls.embed(backend.eager, tokens, packed, 64, 8.0)
    close(scaled, reference.embed(tokens, table, 64, 8.0), "embed", dtype)
    got = cpu_calls.logits(backend.eager, rows, packed, 101, 5.0, 0.5)
    assert got.dtype == torch.float32
    close(got, reference.logits(rows, table, 101, 5.0, 0.5), "logits", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [8, 64, 100])
def test_row_ops(backend, dtype, hidden):
    torch.manual_seed(4)
    x, y = torch.randn(9, hidden).to(dtype), torch.randn(9, hidden).to(dtype)
    w, b = torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype)
    sink = backend.eager
    for offset in (False, True):
        want = reference.rms_norm(x, w, 1e-5, offset)
        close(cpu_calls.rms_norm(sink, x, w, 1e-5, offset), want, "rms_norm", dtype)
    want = reference.layer_norm(x, w, b, 1e-5)
    close(cpu_calls.layer_norm(sink, x, w, b, 1e-5), want, "layer_norm", dtype)
    for kind in ("relu", "gelu", "gelu_tanh", "silu"):
        close(cpu_calls.activate(sink, x, kind), reference.activate(x, kind), "activate", dtype)
    assert torch.equal(cpu_calls.add(sink, x, y), reference.add(x, y))
    rows = torch.tensor([8, 0, 0, 3], dtype=torch.int32)
    assert torch.equal(cpu_calls.select_rows(sink, x, rows), x[rows.long()])


def rope_case(dtype, head_dim, heads, kv_heads, tokens, with_norm=False, rotary=None):
    rotary = rotary or head_dim
    angles = torch.arange(600)[:, None] / 100 ** (torch.arange(rotary // 2)[None] / rotary)
    table = torch.cat([angles.cos(), angles.sin()], 1).float().contiguous()
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    norms = (torch.rand(head_dim).to(dtype) + 0.5,) * 2 if with_norm else (None, None)
    return qkv, table, norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope(backend, dtype, head_dim, with_norm):
    torch.manual_seed(5)
    qkv, table, norms = rope_case(dtype, head_dim, 4, 2, 11, with_norm, head_dim // 4 * 2)
    positions = torch.arange(5, 16, dtype=torch.int32)
    args = (qkv, positions, table, *norms, 1e-6, with_norm, 4, 2, head_dim)
    close(cpu_calls.rope(backend.eager, *args), reference.rope(*args), "rope", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_of_queries_alone_is_that_of_the_whole(backend, dtype, with_norm):
    torch.manual_seed(8)
    qkv, table, norms = rope_case(dtype, 64, 4, 2, 13, with_norm, 32)
    positions = torch.arange(5, 18, dtype=torch.int32)
    whole = cpu_calls.rope(
        backend.eager, qkv, positions, table, *norms, 1e-6, with_norm, 4, 2, 64
    )  # fmt: skip
    q, options = qkv[:, :256].contiguous(), (table, norms[0], 1e-6, with_norm, 4, 64)
    rows = torch.tensor([2, 3, 12], dtype=torch.int32)
    all_rows = cpu_calls.rope_queries(backend.eager, q, positions, None, *options)
    assert torch.equal(all_rows, whole[:, :256])
    some = cpu_calls.rope_queries(backend.eager, q[rows].contiguous(), positions, rows, *options)
    assert torch.equal(some, whole[rows, :256])
    want = reference.rope_queries(q[rows], positions, rows, *options)
    close(some, want, "rope_queries", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_the_bulk_write_is_that_of_the_layers_alone(backend, dtype, kv_dtype):
    """Three layers: rotated, with a head norm and a narrower rotation, not rotated."""
    torch.manual_seed(9)
    tokens, size, heads = 21, 16, (0, 2, 64)
    kv = torch.randn(tokens, 3 * 2 * 2 * 64).to(dtype)
    _, wide, norms = rope_case(dtype, 64, 4, 2, 1, True)
    narrow = rope_case(dtype, 64, 4, 2, 1, False, 32)[1]
    tables, k_norms = [wide, narrow, None], [None, norms[0], None]
    positions = torch.arange(40, 40 + tokens, dtype=torch.int32)
    slots = torch.arange(tokens) + size + 5  # in order, as a sequence's are: pairs share a word

    def caches():
        options = (kv_dtype or dtype, torch.device("cpu"))
        return [backend.new_kv_cache(8, size, 2, 64, *options) for _ in range(3)]

    bulk, alone = caches(), caches()
    cpu_calls.store_kv(
        backend.eager, kv, positions, tables, k_norms, 1e-6, False, 2, 64, bulk, slots, size
    )  # fmt: skip
    parts = kv.chunk(3, dim=1)
    for part, table, norm, cache in zip(parts, tables, k_norms, alone, strict=True):
        cpu_calls.rope(
            backend.eager, part.contiguous(), positions, table, None, norm, 1e-6, False, *heads,
            cache, slots, size,
        )  # fmt: skip
    for a, b in zip(bulk, alone, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# Sequences of 1 decode, a chunk that crosses blocks, a whole prompt, a long decode.
CONTEXT = [(70, 1), (100, 37), (50, 50), (300, 1), (17, 2)]


def paged(backend, dtype, case, chunks, window=0, softcap=0.0, head_dim=64, poison=False):
    """Feed every sequence of `case` in chunks; returns the last `new` rows of each sequence."""
    heads, kv_heads, size = 6, 2, 16
    cache = backend.new_kv_cache(90, size, kv_heads, head_dim, dtype, torch.device("cpu"))
    if poison:
        cache.fill_(float("nan"))
    torch.manual_seed(6)
    full = [rope_case(dtype, head_dim, heads, kv_heads, n)[0] for n, _ in case]
    outs, free = [], iter(torch.randperm(89).add(1).tolist())
    for seq, (n, new) in zip(full, case, strict=True):
        blocks = [next(free) for _ in range(-(-n // size))]
        tables = torch.zeros(1, 24, dtype=torch.int32)
        tables[0, : len(blocks)] = torch.tensor(blocks)
        out, start = None, 0
        for stop in [*chunks(n - new), n]:
            if stop == start:
                continue
            pos = torch.arange(start, stop)
            slots = (torch.tensor(blocks)[pos // size] * size + pos % size).contiguous()
            heads_arg = (heads, kv_heads, head_dim)
            q = cpu_calls.rope(
                backend.eager, seq[start:stop].contiguous(), pos.int(), None, None, None, 1e-6,
                False, *heads_arg, cache, slots, size,
            )  # fmt: skip
            starts = torch.tensor([0, stop - start], dtype=torch.int32)
            lens = torch.tensor([stop], dtype=torch.int32)
            out = cpu_calls.paged_attention(
                backend.eager, q, cache, tables, starts, lens, *heads_arg, size, 0.125, window,
                softcap,
            )  # fmt: skip
            start = stop
        outs.append(out[-new:])
    return full, outs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (20, 0.0), (0, 5.0)])
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_paged_attention(backend, dtype, window, softcap, head_dim):
    full, outs = paged(backend, dtype, CONTEXT, lambda n: [n], window, softcap, head_dim, True)
    for seq, out, (n, new) in zip(full, outs, CONTEXT, strict=True):
        starts = torch.tensor([0, n], dtype=torch.int32)
        want = reference.attention(seq, starts, 6, 2, head_dim, 0.125, window, softcap)[-new:]
        # probabilities are rounded to the compute dtype before they meet the values
        tolerance = 5e-5 if dtype == torch.float32 else 2**-6
        assert (out.float() - want.float()).abs().max() <= tolerance * want.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 20])
def test_attention_bits_do_not_depend_on_chunking(backend, dtype, window):
    case = [(n, 1) for n, _ in CONTEXT]
    _, whole = paged(backend, dtype, case, lambda n: [], window)
    ways = [lambda n: [n], lambda n: list(range(7, n, 7)), lambda n: list(range(1, n + 1))]
    for chunks in ways:
        _, outs = paged(backend, dtype, case, chunks, window, poison=True)
        for a, b in zip(whole, outs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_some_rows_is_that_of_all(backend, dtype):
    """SwiftKV: sequences of which all, none, or the last rows are queries, as many as sequences."""
    heads, size, lens = (6, 2, 64), 16, [5, 40, 9, 30]
    cache = backend.new_kv_cache(20, size, 2, 64, dtype, torch.device("cpu"))
    tables = torch.arange(1, 17).view(4, 4).int()
    at = torch.cat([torch.arange(n) for n in lens])
    block = torch.cat([tables[i][torch.arange(n) // size] for i, n in enumerate(lens)]).long()
    torch.manual_seed(10)
    qkv = rope_case(dtype, 64, 6, 2, sum(lens))[0]
    q = cpu_calls.rope(
        backend.eager, qkv, at.int(), None, None, None, 1e-6, False, *heads, cache,
        block * size + at % size, size,
    )  # fmt: skip
    starts = torch.tensor([0, *lens]).cumsum(0).int()
    options = (*heads, size, 0.125)
    ctx = torch.tensor(lens).int()
    whole = cpu_calls.paged_attention(backend.eager, q, cache, tables, starts, ctx, *options)
    for counts in ([2, 0, 1, 1], [0, 0, 0, 4], [5, 30, 0, 0], [1, 1, 1, 1]):
        rows = [r for end, n in zip(starts[1:].tolist(), counts, strict=True)
                for r in range(end - n, end)]  # fmt: skip
        some = torch.tensor([0, *counts]).cumsum(0).int()
        found = cpu_calls.paged_attention(
            backend.eager, q[rows].contiguous(), cache, tables, some, ctx, *options
        )
        assert torch.equal(found, whole[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_attention_equals_serving_attention_to_the_bit(dtype):
    import sterna.kernels.ops as ops
    from sterna.kernels.load import load_kernels

    if load_kernels().level != "cpu":
        pytest.skip("the reference kernels are forced")
    backend = CpuBackend(2)
    full, outs = paged(backend, dtype, CONTEXT, lambda n: [n])
    starts = torch.tensor([0, *[n for n, _ in CONTEXT]]).cumsum(0).to(torch.int32)
    trained = ops.attention(torch.cat(full), starts, 6, 2, 64, 0.125)
    for i, (out, (_, new)) in enumerate(zip(outs, CONTEXT, strict=True)):
        assert torch.equal(trained[starts[i + 1] - new : starts[i + 1]], out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_dequantize_equals_the_reference_to_the_bit(dtype, kind):
    from sterna.core.gguf_types import GGMLType, block_layout
    from sterna.model.dequant import dequantize

    backend, block_type = CpuBackend(2), GGMLType[kind]
    torch.manual_seed(7)
    size = block_layout(block_type)[1]
    raw = torch.randint(0, 256, (9000, size), dtype=torch.uint8)
    raw[:, 1] &= 0x3B  # scales that are finite float16 numbers, some of them denormal
    raw[:, 3] &= 0x3B
    got = backend.dequantize(raw, int(block_type), dtype)
    assert torch.equal(got, dequantize(raw.view(-1), block_type).to(dtype))


def test_dequantize_has_no_kernel_for_other_types():
    assert CpuBackend(1).dequantize(torch.zeros(1, 144, dtype=torch.uint8), 12, DTYPES[0]) is None


# A width of whole vectors and one with a rest, on every instruction set.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [64, 70])
def test_the_gradient_of_a_gated_product(backend, dtype, activation, width):
    torch.manual_seed(8)
    x, w, grad = torch.randn(40, 32), torch.randn(2 * width, 32), torch.randn(40, width)
    x, w, grad = x.to(dtype), w.to(dtype), grad.to(dtype)
    out, sums = backend.gated_with_sums(x, w, activation, width)
    assert torch.equal(out, cpu_calls.gated_linear(backend.eager, x, w, activation, width))
    close(sums, reference.linear(x, w, None, None, 2 * width), "linear", dtype)
    leaf = sums.double().requires_grad_()
    gate, up = leaf.split(width, dim=1)
    (reference.activate_wide(gate, activation) * up).backward(grad.double())
    close(backend.gated_backward(grad, sums, activation), leaf.grad, "gated_linear", dtype)


def test_draws_scores_and_their_gradients(backend, monkeypatch):
    """One distribution without and one with survivors, against float64, on every set."""
    from sterna.kernels import sampling, score_gradient, scores

    for module in (sampling, score_gradient, scores):
        monkeypatch.setattr(module, "backend_for", lambda _: backend)
    torch.manual_seed(9)
    logits = torch.randn(4, 501) * 3
    g, k = torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.tensor([0.0, 1.0, -0.5, 0.0])
    for of in (scores.Distribution(0.7), scores.Distribution(1.0, top_k=20)):
        draws = [sampling.Draw(i, of.temperature, of.top_k, 1.0, 0.0, 0.37) for i in range(4)]
        drawn = sampling.draw_scored(logits.numpy(), draws)
        tokens = torch.tensor([one.token_id for one in drawn])
        said = scores.score(logits.numpy(), tokens.int().numpy(), [of])
        assert [one.logprob for one in drawn] == said.logprobs.tolist()
        kept = logits >= logits.topk(of.top_k or 501, dim=1).values[:, -1:]
        leaf = logits.double().requires_grad_()
        log_p = (leaf / of.temperature).masked_fill(~kept, -torch.inf).log_softmax(1)
        chosen = log_p.gather(1, tokens[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p.masked_fill(~kept, 0.0)).sum(1)
        assert (torch.from_numpy(said.logprobs) - chosen).abs().max() < 2e-6
        (chosen @ g.double() + entropy @ k.double()).backward()
        out = torch.empty(4, 501)
        score_gradient.row_gradient(logits, tokens, of, g, k, out)
        assert (out - leaf.grad).abs().max() < 5e-6

"""The references against plain PyTorch, and the dispatch, autograd and table around them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sterna.core.errors import KernelError
from sterna.kernels import lora_ops, ops, reference
from sterna.kernels.optable import OPS

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SHAPE = (HEADS, KV_HEADS, HEAD_DIM)
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM
F32 = 1e-5  # a few hundred float32 additions in another order, values near 1


def rand(*shape: int, seed: int = 0, requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_(requires_grad)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rope_table(num_rows: int = 64, rotary_dim: int = HEAD_DIM) -> torch.Tensor:
    inv_freq = 1.0 / 100 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(num_rows)[:, None] * inv_freq
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def test_embed_scales_and_rounds_once():
    table = rand(10, 6).bfloat16()
    got = ops.embed(i32(3, 9, 3), table, 6, 1.7)
    assert torch.equal(got, (table[[3, 9, 3]].double() * 1.7).bfloat16())


@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_equals_torch(unit_offset):
    x, weight = rand(5, 16), rand(16)
    expected = F.rms_norm(x, (16,), weight + unit_offset, eps=1e-5)
    assert (ops.rms_norm(x, weight, 1e-5, unit_offset) - expected).abs().max() < F32


def test_layer_norm_equals_torch():
    x, weight, bias = rand(5, 16), rand(16), rand(16, seed=1)
    expected = F.layer_norm(x, (16,), weight, bias, 1e-5)
    assert (ops.layer_norm(x, weight, bias, 1e-5) - expected).abs().max() < F32


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_linear_rounds_once_in_bfloat16(has_bias, has_residual):
    x, weight = rand(5, 16).bfloat16(), rand(7, 16).bfloat16()
    bias = rand(7).bfloat16() if has_bias else None
    residual = rand(5, 7).bfloat16() if has_residual else None
    exact = x.double() @ weight.double().t()
    exact = exact + (0 if bias is None else bias.double())
    exact = exact + (0 if residual is None else residual.double())
    got = ops.linear(x, weight, bias, residual, 7)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + F32).all()


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_linear_takes_gate_rows_first(kind):
    x, weight = rand(5, 16), rand(12, 16)
    act = {"silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[kind]
    expected = act(x @ weight[:6].t()) * (x @ weight[6:].t())
    assert (ops.gated_linear(x, weight, kind, 6) - expected).abs().max() < F32


@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activate(kind):
    x = rand(3, 9)
    expected = {
        "relu": x.clamp(min=0),
        "gelu": 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": F.gelu(x, approximate="tanh"),
        "silu": x * torch.sigmoid(x),
    }[kind]
    assert (ops.activate(x, kind) - expected).abs().max() < F32


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="unknown activation 'swoosh'"):
        reference.activate(rand(2, 2), "swoosh")


def test_add_and_select_rows():
    x, y = rand(4, 3), rand(4, 3, seed=1)
    assert torch.equal(ops.add(x, y), x + y)
    assert torch.equal(ops.select_rows(x, i32(3, 0)), x[[3, 0]])


def test_logits_are_float32_scaled_and_capped():
    x, weight = rand(2, 8).bfloat16(), rand(5, 8).bfloat16()
    plain = x.float() @ weight.float().t() * 0.5
    got = ops.logits(x, weight, 5, 3.0, 0.5)
    assert got.dtype == torch.float32
    assert (got - 3 * torch.tanh(plain / 3)).abs().max() < F32


def test_rope_rotates_halves_and_leaves_values_and_the_rest():
    """Checked dim by dim with complex numbers: (a + ib) * e^(i angle)."""
    rotary = 4
    qkv, positions = rand(3, WIDTH), i32(0, 5, 63)
    table = rope_table(rotary_dim=rotary)
    got = ops.rope(qkv, positions, table, None, None, 1e-6, False, *SHAPE).view(3, -1, HEAD_DIM)
    heads = qkv.view(3, -1, HEAD_DIM)
    turn = torch.complex(*torch.split(table[positions.long()], rotary // 2, dim=1))[:, None]
    turned = torch.complex(heads[..., :2], heads[..., 2:4]) * turn
    expected = torch.cat([turned.real, turned.imag, heads[..., 4:]], dim=-1)
    assert (got[:, :6] - expected[:, :6]).abs().max() < F32
    assert torch.equal(got[:, 6:], heads[:, 6:])


def test_rope_norms_heads_before_rotation():
    qkv, positions, table = rand(3, WIDTH), i32(1, 2, 3), rope_table()
    q_norm, k_norm = rand(HEAD_DIM), rand(HEAD_DIM, seed=1)
    got = ops.rope(qkv, positions, table, q_norm, k_norm, 1e-6, True, *SHAPE)
    q, k, v = torch.split(qkv.view(3, -1, HEAD_DIM), [HEADS, KV_HEADS, KV_HEADS], dim=1)
    q = F.rms_norm(q, (HEAD_DIM,), q_norm + 1, 1e-6)
    k = F.rms_norm(k, (HEAD_DIM,), k_norm + 1, 1e-6)
    normed = torch.cat([q, k, v], dim=1).view(3, WIDTH)
    expected = ops.rope(normed, positions, table, None, None, 1e-6, False, *SHAPE)
    assert (got - expected).abs().max() < F32


def test_rope_without_table_is_the_identity():
    qkv = rand(3, WIDTH)
    assert torch.equal(ops.rope(qkv, i32(0, 1, 2), None, None, None, 1e-6, False, *SHAPE), qkv)


def naive_attention(qkv, window, softcap, scale):
    """One sequence, one loop: query i over the keys i - window < j <= i."""
    heads = qkv.double().view(len(qkv), -1, HEAD_DIM)
    out = torch.zeros(len(qkv), HEADS, HEAD_DIM, dtype=torch.float64)
    for h in range(HEADS):
        group = HEADS + h * KV_HEADS // HEADS
        for i in range(len(qkv)):
            first = max(0, i - window + 1) if window else 0
            scores = heads[first : i + 1, group] @ heads[i, h] * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            out[i, h] = scores.softmax(0) @ heads[first : i + 1, group + KV_HEADS]
    return out.view(len(qkv), -1)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (1, 0.0), (7, 2.0), (100, 0.0)])
def test_attention_equals_the_loop(window, softcap):
    qkv = rand(23, WIDTH)
    starts = i32(0, 1, 13, 23)  # lengths 1, 12 and 10
    got = ops.attention(qkv, starts, *SHAPE, 0.3, window, softcap)
    pieces = [qkv[a:b] for a, b in ((0, 1), (1, 13), (13, 23))]
    expected = torch.cat([naive_attention(p, window, softcap, 0.3) for p in pieces])
    assert (got - expected).abs().max() < F32


@pytest.mark.parametrize("window", [0, 9])
def test_paged_attention_equals_attention(window):
    """Two sequences, cut into chunks of odd sizes, in blocks that are not in order."""
    block, device = 16, torch.device("cpu")
    cache = ops.new_kv_cache(8, block, KV_HEADS, HEAD_DIM, torch.float32, device)
    assert cache.shape == (8, 2, KV_HEADS * block * HEAD_DIM)
    tables = {"a": [5, 2, 7], "b": [3, 0, 0]}
    rope = (rope_table(), None, None, 1e-6, False, *SHAPE)
    qkv = {"a": rand(37, WIDTH), "b": rand(12, WIDTH, seed=1)}
    done, outputs = {"a": 0, "b": 0}, {"a": [], "b": []}
    for chunk in ({"a": 20, "b": 1}, {"b": 10, "a": 1}, {"a": 16, "b": 1}):
        rows, at, slots, starts = [], [], [], [0]
        for name, size in chunk.items():
            span = range(done[name], done[name] + size)
            rows.append(qkv[name][span.start : span.stop])
            at += span
            slots += [tables[name][p // block] * block + p % block for p in span]
            done[name] += size
            starts.append(starts[-1] + size)
        q = ops.rope_store(torch.cat(rows), i32(*at), *rope, cache, torch.tensor(slots), block)
        table = torch.tensor([tables[name] for name in chunk], dtype=torch.int32)
        lens = i32(*(done[name] for name in chunk))
        out = ops.paged_attention(q, cache, table, i32(*starts), lens, *SHAPE, block, 0.3, window)
        for name, part in zip(chunk, torch.split(out, list(chunk.values())), strict=True):
            outputs[name].append(part)
    for name, tensor in qkv.items():
        positions = torch.arange(len(tensor), dtype=torch.int32)
        rotated = ops.rope(tensor, positions, *rope)
        expected = ops.attention(rotated, i32(0, len(tensor)), *SHAPE, 0.3, window)
        assert (torch.cat(outputs[name]) - expected).abs().max() < F32


def test_paged_attention_ignores_what_the_null_block_holds():
    cache = ops.new_kv_cache(3, 16, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    rope = (rope_table(), None, None, 1e-6, False, *SHAPE)
    q = ops.rope_store(rand(2, WIDTH), i32(0, 1), *rope, cache, torch.tensor([16, 17]), 16)
    tail = (i32(0, 2), i32(2), *SHAPE, 16, 0.3)
    clean = ops.paged_attention(q, cache, torch.tensor([[1, 0]]).int(), *tail)
    cache[0] = float("nan")
    assert torch.equal(ops.paged_attention(q, cache, torch.tensor([[1, 0]]).int(), *tail), clean)


def quantised(leaf, rows: int):
    """A flat weight [rows, 40] of random int4 codes, groups of 32, whose scales are a leaf."""
    blocks = -(-rows // 16)
    generator = torch.Generator().manual_seed(rows)
    tiles = torch.randint(0, 256, (blocks, 1, 512), generator=generator, dtype=torch.uint8)
    table = torch.linspace(-0.4, 0.4, 16)[None]
    return tiles, leaf(blocks, 2, 16), table, None, 4, 32, 40


# A prefix of two rows, and two sequences of one and two rows behind it.
SHARED_KEYS = (i32(0, 1, 0, 1, 2, 0, 1, 3, 4), i32(0, 2, 5, 9))
DIFFERENTIABLE = {
    "embed": lambda g: ops.embed(i32(1, 1, 4), g(6, 5), 5, 2.0),
    "rms_norm": lambda g: ops.rms_norm(g(3, 8), g(8), 1e-6, True),
    "layer_norm": lambda g: ops.layer_norm(g(3, 8), g(8), g(8), 1e-6),
    "linear": lambda g: ops.linear(g(3, 8), g(5, 8), g(5), g(3, 5), 5),
    "gated_linear": lambda g: ops.gated_linear(g(3, 8), g(10, 8), "silu", 5),
    "activate": lambda g: ops.activate(g(3, 8), "gelu_tanh"),
    "add": lambda g: ops.add(g(3, 8), g(3, 8)),
    "select_rows": lambda g: ops.select_rows(g(3, 8), i32(2, 0)),
    "logits": lambda g: ops.logits(g(3, 8), g(5, 8), 5, 4.0),
    "quant_embed": lambda g: ops.quant_embed(i32(1, 1, 4), *quantised(g, 6), 2.0, torch.float32),
    "quant_linear": lambda g: ops.quant_linear(g(3, 40), *quantised(g, 5), g(5), g(3, 5), 5),
    "quant_gated_linear": lambda g: ops.quant_gated_linear(g(3, 40), *quantised(g, 20), "silu", 5),
    "quant_logits": lambda g: ops.quant_logits(g(3, 40), *quantised(g, 5), 5, 4.0),
    "rope": lambda g: ops.rope(
        g(3, WIDTH), i32(0, 1, 2), rope_table(), g(HEAD_DIM), g(HEAD_DIM), 1e-6, False, *SHAPE
    ),
    "attention": lambda g: ops.attention(g(5, WIDTH), i32(0, 2, 5), *SHAPE, 0.3, 2, 3.0),
    "shared_attention": lambda g: ops.shared_attention(
        g(5, WIDTH), i32(0, 2, 3, 5), *SHARED_KEYS, *SHAPE, 0.3, 2, 3.0
    ),
    "embed_norm": lambda g: ops.embed_norm(
        i32(1, 1, 4), g(6, 8), i32(0, 1, 2), g(3, 8), g(8), g(8), 1e-6
    ),
    "bidirectional_attention": lambda g: ops.bidirectional_attention(
        g(5, WIDTH), i32(0, 2, 5), *SHAPE, 0.3, 1
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_equals_finite_differences(name):
    """Central differences in float32, along one random direction per input."""
    leaves: list[torch.Tensor] = []

    def leaf(*shape: int) -> torch.Tensor:
        leaves.append(rand(*shape, seed=len(leaves), requires_grad=True))
        return leaves[-1]

    y = DIFFERENTIABLE[name](leaf)
    weights = rand(*y.shape, seed=99)
    (y * weights).sum().backward()
    for i, tensor in enumerate(leaves):
        direction = rand(*tensor.shape, seed=50 + i)
        direction /= direction.norm()
        sides = [_shifted(name, leaves, i, direction * step, weights) for step in (1e-2, -1e-2)]
        numeric = (sides[0] - sides[1]) / 2e-2
        analytic = float((tensor.grad * direction).sum())
        assert abs(numeric - analytic) <= 2e-3 * (1 + abs(numeric)), f"input {i}"


def _shifted(name, leaves, index, shift, weights) -> float:
    queue = iter(leaf.detach() + (shift if i == index else 0) for i, leaf in enumerate(leaves))
    with torch.no_grad():
        return float((DIFFERENTIABLE[name](lambda *shape: next(queue)) * weights).sum())


def test_every_op_has_a_backward_or_is_inference_only():
    assert {op.name for op in OPS if not op.inference_only} == set(DIFFERENTIABLE)


def test_every_op_has_tolerances_schema_and_docstring():
    for op in OPS:
        assert getattr(lora_ops if op.name.startswith("lora") else ops, op.name).__doc__
        assert {torch.float32, torch.bfloat16, torch.float16} <= set(op.tolerance)
        schema = getattr(torch.ops.sterna, op.name).default._schema
        assert [a.name for a in schema.arguments] == list(
            op.reference.__code__.co_varnames[: op.reference.__code__.co_argcount]
        )


def test_inference_only_ops_refuse_to_record_a_gradient():
    cache = ops.new_kv_cache(2, 16, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    qkv = rand(1, WIDTH, requires_grad=True)
    args = (None, None, None, 1e-6, False, *SHAPE, cache, torch.tensor([16]), 16)
    with pytest.raises(KernelError, match=r"rope_store has no backward.*inference_mode"):
        ops.rope_store(qkv, i32(0), *args)
    with torch.no_grad():
        assert ops.rope_store(qkv, i32(0), *args).shape == (1, HEADS * HEAD_DIM)


def test_bulk_store_and_queries_equal_rope_store_layer_by_layer():
    """Whatever back end is in use: two layers at once, and queries of some rows."""
    new = (3, 16, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    bulk, alone = ([ops.new_kv_cache(*new) for _ in range(2)] for _ in range(2))
    positions, slots = i32(0, 1, 2), torch.tensor([16, 17, 40])
    tables, norms = [rope_table(), None], [None, rand(HEAD_DIM)]
    options = (1e-6, False)
    layers = [rand(3, WIDTH, seed=i) for i in range(2)]
    kv = torch.cat([layer[:, HEADS * HEAD_DIM :] for layer in layers], 1)
    ops.store_kv(
        kv, positions, tables, norms, *options, KV_HEADS, HEAD_DIM, bulk, slots, 16
    )  # fmt: skip
    rows = i32(0, 2)
    for layer, table, norm, cache, filled in zip(layers, tables, norms, alone, bulk, strict=True):
        q = ops.rope_store(
            layer, positions, table, None, norm, *options, *SHAPE, cache, slots, 16
        )  # fmt: skip
        assert torch.equal(cache, filled)
        mine = layer[:, : HEADS * HEAD_DIM].contiguous()[rows]
        heads = (HEADS, HEAD_DIM)
        found = ops.rope_queries(mine, positions, rows, table, None, *options, *heads)
        assert torch.equal(found, q[rows])


def test_ops_run_on_meta_tensors():
    x = torch.empty(3, 8, device="meta")
    assert ops.linear(x, torch.empty(5, 8, device="meta"), None, None, 5).shape == (3, 5)


def test_backward_does_not_run_for_inputs_that_ask_for_none():
    x, weight = rand(3, 8), rand(5, 8, requires_grad=True)
    ops.linear(x, weight, None, None, 5).sum().backward()
    assert x.grad is None
    assert weight.grad is not None

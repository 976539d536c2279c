"""Every op in plain PyTorch: the specification, the fallback and the oracle of the fast back ends.

Nothing here is fast. Each function computes in float32 (float64 for float64 inputs: the precision
of the correctness tests) and rounds once, at its output, so a fast kernel differs from it only by
the order of float32 additions. Run again under autograd, the same functions are the oracle of
every backward and the backward of the ops that have none of their own (see `autograd.py`).

Legend: T tokens, R output rows, D hidden_size, K in_features, N out_features, H query heads,
G key/value heads, C head_dim, V vocabulary, S sequences, B block-table width.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from sterna.kernels import kv_codes
from sterna.kernels.backend import plain_weight


def wide(x: Tensor) -> Tensor:
    """x in the precision ops compute in: float32, or float64 when it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def embed(tokens: Tensor, table: Tensor, hidden_size: int, scale: float = 1.0) -> Tensor:
    """Rows of `table` times `scale`."""
    rows = plain_weight(table, 0, hidden_size).index_select(0, tokens)
    return rows if scale == 1.0 else (wide(rows) * scale).to(rows.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    return _rms_wide(wide(x), weight, eps, unit_offset).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim."""
    return _layer_norm_wide(wide(x), weight, bias, eps).to(x.dtype)


def embed_norm(
    tokens: Tensor,
    table: Tensor,
    positions: Tensor,
    position_table: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """layer_norm of the token's row plus the position's; a table of one row serves all."""
    rows = wide(table.index_select(0, tokens))
    if position_table is not None:
        is_one = position_table.shape[0] == 1
        rows = rows + (position_table if is_one else position_table.index_select(0, positions))
    return _layer_norm_wide(rows, weight, bias, eps).to(table.dtype)


def _layer_norm_wide(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    shift = None if bias is None else wide(bias).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], wide(weight).to(x.dtype), shift, eps)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x @ weight.T + bias) + residual, rounded once."""
    y = wide(x) @ wide(plain_weight(weight, out_features, x.shape[-1])).t()
    if bias is not None:
        y = y + wide(bias)
    if activation != "none":
        y = activate_wide(y, activation)
    if residual is not None:
        y = y + wide(residual)
    return y.to(x.dtype)


def gated_linear(x: Tensor, weight: Tensor, activation: str, out_features: int) -> Tensor:
    """activation(x @ gate.T) * (x @ up.T); `weight` is [gate; up]."""
    y = wide(x) @ wide(plain_weight(weight, 2 * out_features, x.shape[-1], gated=True)).t()
    gate, up = torch.split(y, out_features, dim=-1)
    return (activate_wide(gate, activation) * up).to(x.dtype)


def activate(x: Tensor, kind: str) -> Tensor:
    """relu, gelu (erf), gelu_tanh, silu or tanh of every element."""
    return activate_wide(wide(x), kind).to(x.dtype)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y."""
    return (wide(x) + wide(y)).to(x.dtype)


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of x named by `rows`, in that order."""
    return x.index_select(0, rows)


def logits(
    x: Tensor, weight: Tensor, vocab_size: int, softcap: float = 0.0, scale: float = 1.0
) -> Tensor:
    """float32 x @ weight.T * scale, then softcap * tanh(l / softcap) when softcap > 0."""
    scores = wide(x) @ wide(plain_weight(weight, vocab_size, x.shape[-1])).t()
    return softcap_of(scores * scale if scale != 1.0 else scores, softcap)


def rope(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Tensor:
    """Normalise and rotate the query and key heads of qkv; values pass through."""
    q, k, v = _split_heads(qkv, num_heads, num_kv_heads, head_dim)
    q = _rotate(_head_norm(wide(q), q_norm, eps, unit_offset), positions, table)
    k = _rotate(_head_norm(wide(k), k_norm, eps, unit_offset), positions, table)
    heads = torch.cat([q.to(qkv.dtype), k.to(qkv.dtype), v], dim=1)
    return heads.reshape(qkv.shape)


def attention(
    qkv: Tensor,
    query_starts: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of packed sequences, each over its own tokens only."""
    q, k, v = _split_heads(qkv, num_heads, num_kv_heads, head_dim)
    bounds = query_starts.tolist()
    outputs = [
        _attend(q[a:b], k[a:b], v[a:b], scale, window, softcap)
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(outputs).reshape(qkv.shape[0], num_heads * head_dim).to(qkv.dtype)


def shared_attention(
    qkv: Tensor,
    query_starts: Tensor,
    key_rows: Tensor,
    key_starts: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Each sequence with the prefix it shares, whole; then its own rows alone."""
    heads = (num_heads, num_kv_heads, head_dim)
    whole = attention(qkv.index_select(0, key_rows), key_starts, *heads, scale, window, softcap)
    return whole.index_select(0, own_keys(query_starts, key_starts))


def own_keys(query_starts: Tensor, key_starts: Tensor) -> Tensor:
    """[T] int64: where each row stands among the keys of shared_attention: behind its prefix."""
    lens = query_starts.diff().long()
    behind = key_starts[1:].long() - query_starts[1:].long()
    return torch.arange(int(query_starts[-1]), device=lens.device) + torch.repeat_interleave(
        behind, lens
    )


def bidirectional_attention(
    qkv: Tensor,
    query_starts: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Attention of packed sequences, every token over all of its own sequence or a window."""
    q, k, v = _split_heads(qkv, num_heads, num_kv_heads, head_dim)
    outputs = [
        _attend_both(q[a:b], k[a:b], v[a:b], scale, window)
        for a, b in itertools.pairwise(query_starts.tolist())
    ]
    return torch.cat(outputs).reshape(qkv.shape[0], num_heads * head_dim).to(qkv.dtype)


def pool(x: Tensor, query_starts: Tensor, kind: str, normalize: bool = False) -> Tensor:
    """float32 [S, D]: mean, first or last row of each sequence."""
    if kind not in ("mean", "cls", "last"):
        raise ValueError(f"unknown pooling {kind!r} (known: cls, last, mean)")
    spans = list(itertools.pairwise(query_starts.tolist()))
    if kind == "mean":
        rows = torch.stack([wide(x[a:b]).mean(dim=0) for a, b in spans])
    else:
        rows = wide(torch.stack([x[a] if kind == "cls" else x[b - 1] for a, b in spans]))
    return F.normalize(rows, dim=-1) if normalize else rows


def rope_store(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cache: Tensor,
    slots: Tensor,
    block_size: int,
) -> Tensor:
    """`rope`, then write the keys and values of each token at its slot; returns the queries."""
    rotated = rope(
        qkv, positions, table, q_norm, k_norm, eps, unit_offset, num_heads, num_kv_heads, head_dim
    )
    q, k, v = _split_heads(rotated, num_heads, num_kv_heads, head_dim)
    _write(k, v, cache, slots, block_size)
    return q.reshape(qkv.shape[0], num_heads * head_dim).contiguous()


def rope_queries(
    q: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    table: Tensor | None,
    q_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    num_heads: int,
    head_dim: int,
) -> Tensor:
    """`rope` of query heads alone, whose row i is token rows[i] (None: token i)."""
    at = positions if rows is None else positions.index_select(0, rows)
    return rope(q, at, table, q_norm, None, eps, unit_offset, num_heads, 0, head_dim)


def store_kv(
    kv: Tensor,
    positions: Tensor,
    tables: list[Tensor | None],
    k_norms: list[Tensor | None],
    eps: float,
    unit_offset: bool,
    num_kv_heads: int,
    head_dim: int,
    caches: list[Tensor],
    slots: Tensor,
    block_size: int,
) -> None:
    """The keys (rotated) and values of several layers, each into its cache."""
    parts = kv.chunk(len(caches), dim=1)
    for part, table, k_norm, cache in zip(parts, tables, k_norms, caches, strict=True):
        heads = (0, num_kv_heads, head_dim)
        rotated = rope(part.contiguous(), positions, table, None, k_norm, eps, unit_offset, *heads)
        _, k, v = _split_heads(rotated, *heads)
        _write(k, v, cache, slots, block_size)


def _write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor, block_size: int) -> None:
    """k, v [T, G, C] into a cache, as codes when it is quantised."""
    view = _cache_rows(cache, k.shape[1], block_size)
    if cache.dtype in kv_codes.LARGEST:
        k, v = kv_codes.quantise(k, cache.dtype), kv_codes.quantise(v, cache.dtype)
    blocks, offsets = slots // block_size, slots % block_size
    view[blocks, 0, :, offsets] = k
    view[blocks, 1, :, offsets] = v


def paged_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of each sequence's new tokens over its whole context in the paged cache."""
    view = _cache_rows(cache, num_kv_heads, block_size)
    heads = q.view(q.shape[0], num_heads, head_dim)
    bounds, lengths = query_starts.tolist(), context_lens.tolist()
    outputs = [wide(heads[:0])]
    for s_idx, length in enumerate(lengths):
        num_blocks = -(-length // block_size)
        pages = view[block_tables[s_idx, :num_blocks].long()]  # [blocks, 2, G, block, row]
        rows_kv = pages.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
        is_plain = cache.dtype not in kv_codes.LARGEST
        flat = rows_kv if is_plain else kv_codes.dequantise(rows_kv, cache.dtype)
        rows = heads[bounds[s_idx] : bounds[s_idx + 1]]
        outputs.append(_attend(rows, flat[0], flat[1], scale, window, softcap))
    return torch.cat(outputs).reshape(q.shape).to(q.dtype)


def _cache_rows(cache: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """The cache as [blocks, 2, G, block_size, C], or [..., C + 4] bytes when it is quantised."""
    plain = cache.view(torch.uint8) if cache.dtype in kv_codes.LARGEST else cache
    return plain.view(cache.shape[0], 2, num_kv_heads, block_size, -1)


def draft_cell(
    z: Tensor,
    cell: Tensor | None,
    norm: Tensor,
    norm_bias: Tensor,
    cell_norm: Tensor | None,
    cell_norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    if cell_norm is None or cell_norm_bias is None:
        return F.gelu(_shifted_norm(wide(z), norm, norm_bias, eps)).to(z.dtype)
    f, i, o, fresh = wide(z).chunk(4, dim=-1)
    new = F.gelu(_shifted_norm(fresh, cell_norm, cell_norm_bias, eps)) * torch.sigmoid(i)
    if cell is not None:
        new = wide(cell) * torch.sigmoid(f) + new
    state = F.gelu(_shifted_norm(new, norm, norm_bias, eps)) * torch.sigmoid(o)
    return torch.cat([state, new]).to(z.dtype)


def pick(logits: Tensor, ids: Tensor | None) -> Tensor:
    best, at = logits.max(dim=-1)
    total = torch.exp(logits - best[:, None]).sum(-1)
    is_finite = torch.isfinite(total)
    at = torch.where(is_finite, at, torch.zeros_like(at))
    probs = torch.where(is_finite, 1 / total, torch.zeros_like(total)).float()
    tokens = at.to(torch.int32) if ids is None else ids[at]
    return torch.stack([tokens, probs.view(torch.int32)])


def _shifted_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _rms_wide(x, weight, eps, False) + wide(bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """q [t, H, C] are the last t of the n positions of k, v [n, G, C]; float32 [t, H, C]."""
    t, num_heads, _ = q.shape
    n, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    q_HtC = wide(q).transpose(0, 1)
    k_HnC = wide(k).transpose(0, 1).repeat_interleave(group, dim=0)
    v_HnC = wide(v).transpose(0, 1).repeat_interleave(group, dim=0)
    scores = softcap_of(q_HtC @ k_HnC.transpose(1, 2) * scale, softcap)
    i = torch.arange(n - t, n, device=q.device)[:, None]
    j = torch.arange(n, device=q.device)[None, :]
    hidden = j > i
    if window > 0:
        hidden = hidden | (j <= i - window)
    scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(dim=-1) @ v_HnC).transpose(0, 1)


def _attend_both(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """q [n, H, C] over all of k, v [n, G, C], or those at most `window` away; [n, H, C]."""
    n, group = q.shape[0], q.shape[1] // k.shape[1]
    q_HnC = wide(q).transpose(0, 1)
    k_HnC = wide(k).transpose(0, 1).repeat_interleave(group, dim=0)
    v_HnC = wide(v).transpose(0, 1).repeat_interleave(group, dim=0)
    scores = q_HnC @ k_HnC.transpose(1, 2) * scale
    if window > 0:
        at = torch.arange(n, device=q.device)
        scores = scores.masked_fill((at[:, None] - at).abs() > window, float("-inf"))
    return (scores.softmax(dim=-1) @ v_HnC).transpose(0, 1)


def _split_heads(
    qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, (H + 2G) * C] as q [T, H, C], k [T, G, C], v [T, G, C] (views)."""
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v


def _head_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    return x if weight is None else _rms_wide(x, weight, eps, unit_offset)


def _rms_wide(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    gain = wide(weight) + 1.0 if unit_offset else wide(weight)
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * gain


def _rotate(x: Tensor, positions: Tensor, table: Tensor | None) -> Tensor:
    """Half-split rotation of the first rotary_dim dims of x [T, heads, C]."""
    if table is None:
        return x
    half = table.shape[1] // 2
    cos, sin = torch.split(table.index_select(0, positions)[:, None], half, dim=-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def softcap_of(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores


def activate_wide(x: Tensor, kind: str) -> Tensor:
    if kind == "relu":
        return F.relu(x)
    if kind == "silu":
        return F.silu(x)
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "tanh":
        return torch.tanh(x)
    raise ValueError(f"unknown activation {kind!r} (known: gelu, gelu_tanh, relu, silu, tanh)")

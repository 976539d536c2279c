"""The kernels of `attention.py`: see there for the walk and the legend.

Parameters have no types: Triton would look for the names of annotations on the device.
"""

import triton
import triton.language as tl


@triton.jit
def _places(rows, end, width, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets [rows, BLOCK_C] of one head, and which of them exist."""
    cols = tl.arange(0, BLOCK_C)
    offsets = rows.to(tl.int64)[:, None] * width + cols[None, :]
    return offsets, (rows < end)[:, None] & (cols < C)[None, :]


@triton.jit
def _read(base, rows, end, width, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows of one head, zeros where there is nothing."""
    offsets, exists = _places(rows, end, width, C, BLOCK_C)
    return tl.load(base + offsets, mask=exists, other=0.0)


@triton.jit
def _dot(a, b, IS_CPU: tl.constexpr):
    """Products of the inputs' dtype, summed in float32. The interpreter would multiply the bits of
    bfloat16 as whole numbers; widened first, the products are the same."""
    if IS_CPU:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(
    q,
    k,
    i,
    j,
    end,
    scale,
    softcap,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_CPU: tl.constexpr,
):
    """Scores [M, N], -inf where unseen, and the softcap's slope (1 without one)."""
    s = _dot(q, tl.trans(k), IS_CPU) * scale
    slope = tl.full(s.shape, 1.0, tl.float32)
    if HAS_CAP:
        t = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * s / softcap))  # tanh; exp may be inf or 0
        slope = 1.0 - t * t
        s = softcap * t
    seen = (j[None, :] <= i[:, None]) & (j < end)[None, :]
    if HAS_WINDOW:
        seen = seen & (j[None, :] > i[:, None] - window)
    return tl.where(seen, s, float("-inf")), slope


@triton.jit
def _first_key(row, begin, window, BLOCK: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Where the walk over keys begins: a whole number of tiles after the document's begin."""
    first = begin
    if HAS_WINDOW:
        first = begin + tl.maximum(row - window + 1 - begin, 0) // BLOCK * BLOCK
    return first


@triton.jit
def forward(
    qkv,
    grad,
    out,
    log_sums,
    deltas,
    tiles,
    total,
    scale,
    softcap,
    window,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_CPU: tl.constexpr,
    IS_STATE: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * 3
    head = tl.program_id(1)
    row, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    width: tl.constexpr = (H + 2 * G) * C
    k_base = qkv + (H + head // (H // G)) * C
    i = row + tl.arange(0, BLOCK)
    q = _read(qkv + head * C, i, end, width, C, BLOCK_C)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    stop = tl.minimum(row + BLOCK, end)
    for at in range(_first_key(row, begin, window, BLOCK, HAS_WINDOW), stop, BLOCK):
        j = at + tl.arange(0, BLOCK)
        k = _read(k_base, j, end, width, C, BLOCK_C)
        v = _read(k_base + G * C, j, end, width, C, BLOCK_C)
        s, _ = _scores(q, k, i, j, end, scale, softcap, window, HAS_WINDOW, HAS_CAP, IS_CPU)
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that saw nothing yet
        p = tl.exp(s - shift[:, None])
        shrink = tl.exp(top - shift)
        sums = sums * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v, IS_CPU)
        top = new_top
    sums = tl.where(sums == 0.0, 1.0, sums)  # rows beyond the document
    acc = acc / sums[:, None]
    if IS_STATE:
        g = _read(grad + head * C, i, end, H * C, C, BLOCK_C)
        place = head.to(tl.int64) * total + i
        tl.store(log_sums + place, top + tl.log(sums), mask=i < end)
        tl.store(deltas + place, tl.sum(g.to(tl.float32) * acc, 1), mask=i < end)
    else:
        offsets, exists = _places(i, end, H * C, C, BLOCK_C)
        tl.store(out + head * C + offsets, acc.to(q.dtype), mask=exists)


@triton.jit
def queries(
    qkv,
    grad,
    d_qkv,
    log_sums,
    deltas,
    tiles,
    total,
    scale,
    softcap,
    window,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_CPU: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * 3
    head = tl.program_id(1)
    row, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    width: tl.constexpr = (H + 2 * G) * C
    k_base = qkv + (H + head // (H // G)) * C
    i = row + tl.arange(0, BLOCK)
    q = _read(qkv + head * C, i, end, width, C, BLOCK_C)
    g = _read(grad + head * C, i, end, H * C, C, BLOCK_C)
    place = head.to(tl.int64) * total + i
    log_sum = tl.load(log_sums + place, mask=i < end, other=0.0)
    delta = tl.load(deltas + place, mask=i < end, other=0.0)
    d_q = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    stop = tl.minimum(row + BLOCK, end)
    for at in range(_first_key(row, begin, window, BLOCK, HAS_WINDOW), stop, BLOCK):
        j = at + tl.arange(0, BLOCK)
        k = _read(k_base, j, end, width, C, BLOCK_C)
        v = _read(k_base + G * C, j, end, width, C, BLOCK_C)
        s, slope = _scores(q, k, i, j, end, scale, softcap, window, HAS_WINDOW, HAS_CAP, IS_CPU)
        p = tl.exp(s - log_sum[:, None])
        d_p = _dot(g, tl.trans(v), IS_CPU)
        d_s = p * (d_p - delta[:, None]) * slope * scale
        d_q += _dot(d_s.to(k.dtype), k, IS_CPU)
    offsets, exists = _places(i, end, width, C, BLOCK_C)
    tl.store(d_qkv + head * C + offsets, d_q.to(q.dtype), mask=exists)


@triton.jit
def keys(
    qkv,
    grad,
    d_qkv,
    log_sums,
    deltas,
    tiles,
    total,
    scale,
    softcap,
    window,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_CPU: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * 3
    kv_head = tl.program_id(1)
    first, end = tl.load(tile), tl.load(tile + 2)
    width: tl.constexpr = (H + 2 * G) * C
    j = first + tl.arange(0, BLOCK)
    k = _read(qkv + (H + kv_head) * C, j, end, width, C, BLOCK_C)
    v = _read(qkv + (H + G + kv_head) * C, j, end, width, C, BLOCK_C)
    d_k = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    d_v = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    stop = end
    if HAS_WINDOW:
        stop = tl.minimum(end, first + BLOCK - 1 + window)
    for own in range(H // G):
        head = kv_head * (H // G) + own
        for at in range(first, stop, BLOCK):
            i = at + tl.arange(0, BLOCK)
            q = _read(qkv + head * C, i, end, width, C, BLOCK_C)
            g = _read(grad + head * C, i, end, H * C, C, BLOCK_C)
            place = head.to(tl.int64) * total + i
            log_sum = tl.load(log_sums + place, mask=i < end, other=0.0)
            delta = tl.load(deltas + place, mask=i < end, other=0.0)
            s, slope = _scores(q, k, i, j, end, scale, softcap, window, HAS_WINDOW, HAS_CAP, IS_CPU)
            p = tl.exp(s - log_sum[:, None])
            d_v += _dot(tl.trans(p.to(g.dtype)), g, IS_CPU)
            d_p = _dot(g, tl.trans(v), IS_CPU)
            d_s = p * (d_p - delta[:, None]) * slope * scale
            d_k += _dot(tl.trans(d_s.to(q.dtype)), q, IS_CPU)
    offsets, exists = _places(j, end, width, C, BLOCK_C)
    tl.store(d_qkv + (H + kv_head) * C + offsets, d_k.to(k.dtype), mask=exists)
    tl.store(d_qkv + (H + G + kv_head) * C + offsets, d_v.to(v.dtype), mask=exists)

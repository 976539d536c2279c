"""Working sets of a model: a forward, log-probs, and an update, in bytes.

b bytes a number, T tokens of a micro-batch, R of them completions, r rows of a chunk of logits, V
vocabulary, D hidden_size, Q width of qkv, O of attention, I inner size:

    forward     b T (2 D + the widest op of a block: 2 Q + O, or 2 I + D)
    log-probs   b V D packed, 4 f V with f = 256 rows; on a GPU float64 steps of torch, 36 r V
    update      gradients (+ 4 bytes where micro-batches are summed), what autograd keeps (with the
                sums of gated layers, keep.py), a block's backward (train/memory.py), and the head's
                backward: b V D packed, b r V the gradient, 4 f V logits, the product; on a GPU
                4 r V for each of logits, log-probs, probabilities and gradient, 4 V D summed

An adapted block keeps gate and up in float32 for its backward; its frozen weights have no
gradients. Constants are those of this code (bench/align/memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from sterna.align.keep import kept_bytes
from sterna.align.memory.held import Held
from sterna.train.longseq.config import LongseqSection, chunk_rows_of
from sterna.train.memory import OPTIM_BYTES, Job, Layout, Shape, estimate

Parts = dict[str, float]
FEW_ROWS = 256  # of logits at a time on a CPU: train/longseq/head.py
# An adapter's update against what is counted of it: float32 blocks that the allocator keeps apart,
# the backward of gate and up. Set on one run of SmolLM2-135M (bench/align/memory.py), not derived.
ADAPTED = 1.4
PLAIN = LongseqSection.model_validate({})


@dataclass(frozen=True, slots=True)
class Load:
    """What a step runs at once."""

    tokens: int  # of a micro-batch
    answers: int  # of them completions
    micros: int  # of an update
    longest: int
    is_gpu: bool


def forward_bytes(shape: Shape, b: int, tokens: int, is_adapted: bool) -> float:
    """The working set of a forward without a graph."""
    d, q, o, i = shape.hidden, shape.qkv, shape.attention, shape.inner
    wide = 8.0 * i if is_adapted else 0.0  # gate and up in float32
    return tokens * (b * (2 * d + max(2 * q + o, 2 * i + d)) + wide)


def logprob_bytes(model: Held, load: Load) -> float:
    """Log-probs without a gradient."""
    shape, b = model.shape, model.dtype_bytes
    rows = min(load.answers, chunk_rows_of(shape.vocab) if load.is_gpu else FEW_ROWS)
    logits = (36.0 if load.is_gpu else 4.0) * rows * shape.vocab  # float64 steps of torch
    return logits + b * shape.vocab * shape.hidden + b * load.answers * shape.hidden


def graph_bytes(model: Held, load: Load, settings: LongseqSection = PLAIN) -> tuple[float, float]:
    """(what autograd keeps of a micro-batch, the working set of a block's backward)."""
    shape, b = model.shape, model.dtype_bytes
    job = Job(load.tokens, b, sums_micros=load.micros > 1, longest=load.longest)
    parts = estimate(shape, job, settings, Layout()).parts
    saved, block = parts["saved"], parts["block"]
    if shape.gates == 2 and not model.is_adapted and not load.is_gpu and not settings.checkpoint:
        saved += kept_bytes(2.0 * shape.inner * shape.layers * b, load.tokens)
    if model.is_adapted:
        is_kept = not settings.checkpoint
        saved += 8.0 * load.tokens * shape.inner * (shape.layers if is_kept else 1)
        block -= (4.0 + 3 * b) * shape.block_weights / 3  # no gradient of a frozen weight
        block += 8.0 * load.tokens * (2 * shape.inner + shape.qkv)
    return saved, block


def update_parts(
    model: Held,
    load: Load,
    *,
    has_head: bool,
    has_entropy: bool = False,
    settings: LongseqSection = PLAIN,
) -> Parts:
    """The largest moment of an update of one model. `has_head`: it has logits, not one score."""
    shape, b, full = model.shape, model.dtype_bytes, not model.is_adapted
    saved, block = graph_bytes(model, load, settings)
    if not full:
        saved, block = ADAPTED * saved, ADAPTED * block
    grads = model.trained * (b if full else 4)
    sums = 4.0 * model.trained if load.micros > 1 and full and b < 4 else 0.0
    rows = 2.0 * b * load.tokens * shape.hidden
    head, left = _head(model, load, has_entropy, has_head)
    early = grads * (1 - shape.table_weights / shape.weights) if full else grads
    table = 2.0 * b * shape.vocab * shape.hidden if full else 0.0
    moments: dict[str, Parts] = {
        "head": {"activations": saved + rows, "head": head},
        "last block": {"activations": saved + rows + block, "head": left},
        "first block": {"activations": saved / shape.layers + rows / 2 + block, "head": left,
                        "gradients": early},
        "embedding": {"activations": rows, "gradients": grads + table},
        "optimizer": {"gradients": 0.0 if sums else grads, "slices": float(OPTIM_BYTES)},
    }  # fmt: skip
    worst = max(moments.values(), key=lambda parts: sum(parts.values()))
    return {**({"gradient sums": sums} if sums else {}), **worst}


def _head(model: Held, load: Load, has_entropy: bool, has_head: bool) -> tuple[float, float]:
    """(working set of the backward of the log-probs, what it leaves)."""
    shape, b = model.shape, model.dtype_bytes
    if not has_head:
        return 12.0 * load.tokens * shape.hidden, 0.0
    rows, table = min(load.answers, chunk_rows_of(shape.vocab)), shape.vocab * shape.hidden
    packed, hidden = b * table, b * load.answers * shape.hidden
    logits = (20.0 if has_entropy else 16.0) * rows * shape.vocab
    if not load.is_gpu:
        logits = (4.0 * min(rows, FEW_ROWS) + b * rows) * shape.vocab
    if model.is_adapted:  # a frozen head
        return packed + hidden + logits, hidden
    if not load.is_gpu:  # of several chunks the products are summed in float32
        sums = 4.0 * table if load.answers > rows else 0.0
        product = b * rows * shape.vocab + b * table
        return packed + hidden + sums + max(logits, product), hidden + b * table
    products = (8.0 + b) * rows * shape.vocab + (5.2 if b < 4 else 4.0) * table
    return packed + hidden + 4.0 * table + max(logits, products), hidden + b * table

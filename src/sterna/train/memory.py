"""How much memory a training step takes, by part and by phase, from sizes alone. Imports no torch.

N weights, V vocabulary, D hidden_size, Q = (H + 2 G) C the width of qkv, O = H C, I inner size, L
blocks, T tokens of a rank (S / sp), b bytes a number, r rows of a logits chunk. What a rank holds:

    states     N (b + 4 master + moments) / shards               for the whole step
    gradients  N b / shards, + 4 N / shards when micro-batches are summed
    saved      a block keeps b T (5 D + 2 Q + O + I ...) for autograd, or one row b T D a
               checkpoint, in the tier of the settings
    block      the largest working set of a block's backward: see `_block`
    head       4 r V logits, b r V their gradient, (4 + 3 b) V D weight gradients and copies
    ring       2 b T (Q + O) of the all-to-all when sp > 1

Offloaded (one rank): master and moments are in their tier, and two buffers of a slice on the device
in the optimizer's moment; of the blocks' weights two blocks are there, one computing, one arriving.

The peak is the largest of five moments: the head's backward, that of the last block, that of the
first block (the others' gradients are there, their checkpoints gone), the embedding's, the
optimizer. Constants are those of this code (`bench/train/planner.py` measures the error).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sterna.train.longseq.config import LongseqSection, chunk_rows_of
from sterna.train.offload.config import OffloadSection

MOMENT_BYTES = {"float32": 8.0, "bfloat16": 4.0, "8bit": 2.04}
RUNTIME_BYTES = 50 << 20  # scratch of threads, code of kernels at first use
OPTIM_BYTES = 28 << 20  # float32 slices of 2^20 weights
SLICE = 1 << 20  # train/optim.py
KEPT = OffloadSection.model_validate({})
PARTIAL_BYTES = 256 << 20  # kernels/cpu_backend.py: above it heads share their key sums


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool
    gates: int = 2  # matrices before the activation: gate and up, or up alone
    positions: int = 0  # rows of the rope tables
    counted_block: int = 0  # weights of a block and of the tables where they were counted, as of
    counted_tables: int = 0  # models behind transformers (foreign_shape.py); 0 = by these sizes
    # Numbers a token that autograd keeps of transformers' code before and after attention, which is
    # more than of native ops (longseq/foreign_graph.py); None = native
    graph: tuple[int, int] | None = None
    has_experts: bool = False  # rows meet experts, so the half after attention is not tiled

    @staticmethod
    def of(config: Any) -> Shape:
        """From a ModelConfig; for models behind transformers see foreign_shape.py."""
        return Shape(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size,
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            config.vocab_size, config.tie_word_embeddings,
            2 if config.family.has_gated_mlp else 1, config.num_positions * len(config.ropes),
        )  # fmt: skip

    @property
    def qkv(self) -> int:
        """Width of query, key and value heads together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attention(self) -> int:
        """Width of the attention output."""
        return self.heads * self.head_dim

    @property
    def block_weights(self) -> int:
        """Weights of one block, norms included."""
        if self.counted_block:
            return self.counted_block
        matrices = self.qkv + self.attention + (self.gates + 1) * self.inner
        return self.hidden * (matrices + 2)

    @property
    def table_weights(self) -> int:
        """Weights of the embedding and, where it has its own, of the head."""
        return self.counted_tables or self.vocab * self.hidden * (1 if self.is_tied else 2)

    @property
    def weights(self) -> int:
        """All weights."""
        return self.layers * self.block_weights + self.table_weights + self.hidden


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained at once."""

    tokens: int  # of a micro-batch, before it is cut over sp ranks
    dtype_bytes: int = 2
    states: str = "float32"
    has_master: bool = True
    sums_micros: bool = False
    longest: int | None = None  # longest document; None = one document


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks share what."""

    sp: int = 1
    shards: int = 1  # ranks over which weights and states are cut (FSDP2), 1 = none


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one rank: `parts` by name, the moment of the peak, and the other tiers."""

    parts: dict[str, float]
    moments: dict[str, float]
    host: float
    disk: float
    moved: float = 0.0  # by offloading, to and from the tiers in a step

    @property
    def peak(self) -> float:
        """The largest moment."""
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        """Its name."""
        return max(self.moments, key=lambda name: self.moments[name])


def estimate(
    shape: Shape,
    job: Job,
    settings: LongseqSection,
    layout: Layout,
    offload: OffloadSection = KEPT,
) -> Estimate:
    """The memory of one rank's step, without what the process takes before it has a model.

    `offload` counts for all weights; an adapter's run has its frozen base in the tier alone.
    """
    tokens = -(-job.tokens // layout.sp)
    tables = 4.0 * shape.positions * shape.head_dim
    away, buffers = _offloaded(shape, job, offload)
    states = shape.weights * _state_bytes(job) / layout.shards + tables + RUNTIME_BYTES
    states += buffers["weights"] - sum(away.values())
    gathered = _gathered(shape, job, layout)
    saved, kept = _saved(shape, job, settings, tokens)
    head, head_grads = _head(shape, job, settings, tokens)
    block = _block(shape, job, settings, tokens, layout)
    grads = shape.weights * job.dtype_bytes / layout.shards
    sums = 4 * shape.weights / layout.shards if job.sums_micros and job.dtype_bytes < 4 else 0.0
    rows = 2 * job.dtype_bytes * tokens * shape.hidden  # the last block's output, normed
    table = shape.vocab * shape.hidden * job.dtype_bytes
    behind = (shape.layers - 1) * shape.block_weights + shape.vocab * shape.hidden  # the head's
    others = behind * job.dtype_bytes / layout.shards
    moments = {
        "head": states + sums + saved + rows + head + gathered,
        "block": states + sums + saved + rows + head_grads + block + gathered,
        "first block": states + sums + others + saved / shape.layers + rows / 2 + block + gathered,
        "embedding": states + sums + grads + 2 * table + rows,
        "optimizer": states + sums + grads + OPTIM_BYTES + buffers["states"],
    }
    parts = {"states": states, "gradients": grads + sums, "saved": saved, "block": block,
             "head": head, "gathered": gathered}  # fmt: skip
    tiers = {"memory": 0.0, "host": 0.0, "disk": 0.0}
    tiers[settings.tier] += kept
    tiers[offload.states] += away["states"]
    tiers[offload.weights] += away["weights"]
    moved = 2 * away["states"] + 4 * away["weights"]  # forward, backward, and the update both ways
    return Estimate(parts, moments, tiers["host"], tiers["disk"], moved)


def _offloaded(
    shape: Shape, job: Job, offload: OffloadSection
) -> tuple[dict[str, float], dict[str, float]]:
    """(bytes in the tiers, buffers on the device for them), of states and of weights."""
    away, buffers = dict.fromkeys(("states", "weights"), 0.0), {"states": 0.0, "weights": 0.0}
    state, b = _state_bytes(job) - job.dtype_bytes, job.dtype_bytes
    if offload.weights != "memory":
        away["weights"] = float(shape.layers * shape.block_weights * b)
        buffers["weights"] = 2.0 * shape.block_weights * b
        buffers["states"] = 2.0 * SLICE * b
    if offload.states != "memory":
        away["states"] = shape.weights * state
        buffers["states"] += 2.0 * SLICE * state
    return away, buffers


def _state_bytes(job: Job) -> float:
    master = 4.0 if job.has_master and job.dtype_bytes < 4 else 0.0
    return job.dtype_bytes + master + MOMENT_BYTES[job.states]


def _gathered(shape: Shape, job: Job, layout: Layout) -> float:
    """Whole weights that FSDP2 holds at a time: two blocks (one ahead), or the tables."""
    if layout.shards == 1:
        return 0.0
    return job.dtype_bytes * float(max(2 * shape.block_weights, shape.table_weights))


def _saved(shape: Shape, job: Job, settings: LongseqSection, tokens: int) -> tuple[float, float]:
    """(on the device, in the tier): what waits for the backward."""
    row = job.dtype_bytes * tokens
    if not settings.checkpoint:
        return row * shape.layers * _graph_width(shape, settings), 0.0
    count = -(-shape.layers // settings.every)
    inside = row * shape.hidden * (settings.every - 1)  # inputs of a segment's blocks
    kept = float(row * shape.hidden * count)
    return (kept + inside, 0.0) if settings.tier == "memory" else (float(inside), kept)


def _graph_width(shape: Shape, settings: LongseqSection) -> int:
    """Numbers a token that autograd keeps of a block: the inputs of its ops."""
    d, q, o, i = shape.hidden, shape.qkv, shape.attention, shape.inner
    if shape.graph is not None:
        own_front, own_back = shape.graph
        front = d if settings.attention_tile else own_front
        return front + q + o + (d if settings.mlp_tile else own_back)
    front = d if settings.attention_tile else 2 * d + q  # norm, qkv, rotation
    back = d + o if settings.mlp_tile else o + 2 * d + i  # out, norm, gate and up, down
    return front + q + back


def _head(shape: Shape, job: Job, settings: LongseqSection, tokens: int) -> tuple[float, float]:
    """(working set of the chunked head, what it leaves): bytes."""
    most = chunk_rows_of(shape.vocab, settings.head_rows or None)
    rows, table = min(tokens, most), shape.vocab * shape.hidden
    b = job.dtype_bytes
    left = b * tokens * shape.hidden + 4.0 * table
    logits = (4 + (b if b < 4 else 0)) * rows * shape.vocab
    # The packed table, the product of a chunk and the float32 sums oneDNN makes of it.
    copies = b * table + (5.2 * table if b < 4 else 4.0 * table)
    return logits + left + copies, left


def _block(shape: Shape, job: Job, settings: LongseqSection, tokens: int, layout: Layout) -> float:
    """The working set of one block's backward, whole rows and tiles."""
    b = job.dtype_bytes
    row = b * tokens
    d, q, o, i = shape.hidden, shape.qkv, shape.attention, shape.inner
    mlp = min(settings.mlp_tile or tokens, tokens)
    front = min(settings.attention_tile or tokens, tokens)
    inner = shape.gates * i
    tile = b * max(mlp * (inner + 3 * i + 6 * d + o), front * (2 * q + 4 * d))
    if shape.graph is not None:
        own_front, own_back = shape.graph
        back = own_front + own_back + inner + 2 * d + o  # back computes the front once more
        tile = b * max(mlp * back, front * (own_front + 2 * q + 2 * d))
    sums = (4.0 + 3 * b) * shape.block_weights  # float32 sums, a tile's gradients, the result
    ring = 2.0 * row * (q + o) if layout.sp > 1 else 0.0
    partial = 8.0 * tokens * shape.heads * -(-shape.head_dim // 32) * 32
    if partial > PARTIAL_BYTES:
        partial *= shape.kv_heads / shape.heads
    attention = row * (2 * q + 2 * o + 2 * d) + partial
    whole = row * (q + 2 * o + 2 * d)
    if not settings.checkpoint:
        return max(tile, row * (2 * q + o) + partial) + ring + sums / 3
    return max(whole + tile, attention) + ring + sums

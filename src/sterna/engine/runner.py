"""From scheduled chunks to logits: fills the input buffers, builds the Batch, calls the decoder.

The buffers are allocated once and written in place through numpy views, and the Batch over a
given shape (T tokens, S sequences, R output rows) is built once and kept. So a decode step does a
handful of array writes in Python, and a recorded step can replay on the same addresses.

On a CUDA device the same host buffers are pinned and copied to device buffers each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sterna.engine.adapter_slots import RowSlots
from sterna.engine.capture import CapturedForward, capture
from sterna.engine.memory import SizedModel
from sterna.engine.request import TokenLogprob
from sterna.engine.sampler import token_logprob
from sterna.engine.scheduler import Chunk
from sterna.kernels.pages import discard, restore
from sterna.model.batch import Batch, KVView

if TYPE_CHECKING:
    from sterna.engine.sequence import Sequence as EngineSequence

# Rows of logits held at once for prompt_logprobs: 256 rows x 150k vocabulary x 4 B = 154 MB.
LOGITS_ROWS = 256
# Shapes whose Batch is kept. A Batch is nine views, about 3 KB.
MAX_KEPT_BATCHES = 1024


class InferenceModel(SizedModel, Protocol):
    """What the engine needs of a decoder; see model/decoder.py."""

    @property
    def prompt_layers(self) -> str:
        """For people: how many layers a prompt token runs."""
        ...

    @property
    def skips_prompt_rows(self) -> bool:
        """Whether prompt tokens stop before the last layer, so that they have no logits."""
        ...

    def hidden(self, batch: Batch) -> Tensor:
        """[R, D] final hidden states of `batch.output_rows`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 [R, V] logits of hidden states [R, D]."""
        ...

    def rope_row_offset(self, total_len: int) -> int:
        """Added to the positions of a sequence that may reach `total_len` tokens."""
        ...


@dataclass(frozen=True, slots=True)
class BatchShape:
    """T tokens, S sequences, R output rows: the key of a kept Batch."""

    num_tokens: int
    num_seqs: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Logits:
    """`values[rows[i]]` are the logits of the i-th chunk that samples, at its last committed token;
    those of its drafts follow.
    """

    values: NDArray[np.float32]
    rows: tuple[int, ...]
    # Of chunk c (by its place in the step): entries for prompt tokens start + 1 .. start + count.
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    # [R, D] the final hidden states behind `values`, row by row; valid until the next step.
    hidden: Tensor | None = None


class InputBuffers:
    """Fixed-address inputs of a step: torch tensors on the device, numpy views on the host.

    Counts are upper bounds: T <= max_tokens, S <= max_seqs, block tables are max_blocks wide.
    """

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int, device: str) -> None:
        self.max_tokens = max_tokens
        self.max_seqs = max_seqs
        shapes = {
            "tokens": ((max_tokens,), torch.int32),
            "positions": ((max_tokens,), torch.int32),
            "slots": ((max_tokens,), torch.int64),
            "query_starts": ((max_seqs + 1,), torch.int32),
            "context_lens": ((max_seqs,), torch.int32),
            "output_rows": ((max_tokens,), torch.int32),
            "output_starts": ((max_seqs + 1,), torch.int32),
            "block_tables": ((max_seqs, max_blocks), torch.int32),
        }
        pinned = device != "cpu"
        self._host = {
            name: torch.zeros(shape, dtype=dtype, pin_memory=pinned)
            for name, (shape, dtype) in shapes.items()
        }
        self._device = (
            {name: tensor.to(device) for name, tensor in self._host.items()}
            if pinned
            else self._host
        )
        self.tokens: NDArray[np.int32] = self._host["tokens"].numpy()
        self.positions: NDArray[np.int32] = self._host["positions"].numpy()
        self.slots: NDArray[np.int64] = self._host["slots"].numpy()
        self.query_starts: NDArray[np.int32] = self._host["query_starts"].numpy()
        self.context_lens: NDArray[np.int32] = self._host["context_lens"].numpy()
        self.output_rows: NDArray[np.int32] = self._host["output_rows"].numpy()
        self.output_starts: NDArray[np.int32] = self._host["output_starts"].numpy()
        self.block_tables: NDArray[np.int32] = self._host["block_tables"].numpy()

    def upload(self) -> None:
        """Copy the host buffers to the device; nothing to do on a CPU.

        Waits for the copies: the next step may be written before this one's kernels have run.
        """
        if self._device is not self._host:
            for name, tensor in self._host.items():
                self._device[name].copy_(tensor)

    def batch(self, shape: BatchShape, layers: tuple[Tensor, ...], block_size: int) -> Batch:
        """A Batch of views into the buffers."""
        t, s, r = shape.num_tokens, shape.num_seqs, shape.num_rows
        view = self._device
        return Batch(
            tokens=view["tokens"][:t],
            positions=view["positions"][:t],
            query_starts=view["query_starts"][: s + 1],
            context_lens=view["context_lens"][:s],
            output_rows=view["output_rows"][:r],
            kv=KVView(layers, view["block_tables"][:s], view["slots"][:t], block_size),
            output_starts=view["output_starts"][: s + 1],
        )


class Runner:
    """Owns the KV tensors and the input buffers of one engine."""

    def __init__(
        self,
        decoder: InferenceModel,
        *,
        num_blocks: int,
        block_size: int,
        max_tokens: int,
        max_seqs: int,
        max_blocks: int,
        max_drafts: int = 0,
        kv_dtype: torch.dtype | None = None,
        device: str = "cpu",
        replay: bool = False,
        slots: RowSlots | None = None,
    ) -> None:
        """A step has at most `max_seqs` + `max_drafts` output rows: their logits are kept.

        `slots`: where each row's adapter is written, where there can be adapters.
        """
        self.decoder = decoder
        self.block_size = block_size
        self.layers = decoder.new_kv_layers(num_blocks, block_size, kv_dtype)
        self.buffers = InputBuffers(max_tokens, max_seqs, max_blocks, device)
        self._batches: dict[BatchShape, Batch] = {}
        self._offsets = np.arange(max_tokens, dtype=np.int32)
        self._slots = slots
        self._widest = BatchShape(max_tokens, max_seqs, min(max_tokens, max_seqs + max_drafts))
        self.captured = self._capture() if replay else None
        self._adapted: CapturedForward | None = None  # recorded when it is first wanted

    def forward(self, batch: Batch) -> Tensor:
        """Float32 logits [R, V] of the output rows. The one place where the model is called."""
        return self.decoder.logits(self.decoder.hidden(batch))

    def fill_cache(self, batch: Batch) -> None:
        """Like `forward` for a batch that samples nothing; its one output row is not used."""
        self.decoder.hidden(batch)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Logits:
        """Compute the chunks' keys and values, and the logits of those that sample.

        Running the same chunks again writes the same values to the same slots, so a failed step
        may be repeated.
        """
        if any(_asks(chunk) for chunk in chunks):
            return self._run_with_prompt_logprobs(chunks)
        rows = self._fill(chunks)
        self._fill_outputs(rows, len(chunks))
        captured = self._recorded()
        if captured is not None:
            num_tokens = int(self.buffers.query_starts[len(chunks)])
            logits = captured(num_tokens, len(rows), len(chunks))
            hidden = captured.hidden[: len(rows)]
        elif rows:
            hidden = self.decoder.hidden(self._batch_of(chunks, len(rows)))
            logits = self.decoder.logits(hidden)
        else:
            return self._run_without_logits(chunks)
        return Logits(_as_numpy(logits), _first_rows(chunks), hidden=hidden)

    @torch.inference_mode()
    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks (from, to) in all layers, in order: a target may be a later source."""
        for source, target in pairs:
            for layer in self.layers:
                layer[target].copy_(layer[source])

    @torch.inference_mode()
    def wipe_blocks(self, blocks: Sequence[int]) -> None:
        """Zero blocks. NaN left behind would survive a masked softmax: 0 * NaN is NaN."""
        for layer in self.layers if blocks else ():
            layer[torch.tensor(blocks, device=layer.device)] = 0

    def discard_cache(self) -> int:
        """Give the cache's memory back while no sequence holds a block; returns the bytes.

        On a CPU the next step takes it again by itself; on CUDA call `restore_cache` before.
        """
        return sum(discard(layer) for layer in self.layers)

    def restore_cache(self) -> None:
        """Take back what `discard_cache` gave; the cache is zeros."""
        for layer in self.layers:
            restore(layer)

    @torch.inference_mode()
    def run_probe(self, num_tokens: int) -> None:
        """A forward of one prompt chunk, to be timed. Only while no sequence holds a block."""
        self._probe(num_tokens, 0, 1)

    @torch.inference_mode()
    def run_verify_probe(self, num_rows: int, num_keys: int) -> None:
        """As `run_probe`, a decode with drafts: `num_rows` output rows behind `num_keys` keys."""
        self._probe(num_rows, num_keys, num_rows)

    def _capture(self) -> CapturedForward | None:
        """Record the step, with adapters if these are on."""
        widest = self._widest
        if self._slots is not None:
            self._slots.begin(widest.num_tokens, widest.num_rows)
        return capture(self.decoder, self.buffers.batch(widest, self.layers, self.block_size))

    def _recorded(self) -> CapturedForward | None:
        """The recorded step to replay: that of plain modules while no row has an adapter."""
        if self.captured is None or self._slots is None or not self._slots.is_on:
            return self.captured
        if self._adapted is None:
            self._adapted = self._capture()
        return self._adapted

    def _probe(self, num_tokens: int, num_keys: int, num_rows: int) -> None:
        buffers, size = self.buffers, self.block_size
        if self._slots is not None:
            self._slots.is_on = False
        at = self._offsets[:num_tokens] + num_keys
        buffers.tokens[:num_tokens] = 0
        buffers.positions[:num_tokens] = at
        buffers.slots[:num_tokens] = at + size  # block 1 and up
        buffers.query_starts[:2] = (0, num_tokens)
        buffers.context_lens[0] = num_keys + num_tokens
        buffers.output_rows[:num_rows] = self._offsets[num_tokens - num_rows : num_tokens]
        buffers.output_starts[:2] = (0, num_rows)
        num_blocks = -(-(num_keys + num_tokens) // size)
        buffers.block_tables[0] = 0
        buffers.block_tables[0, :num_blocks] = np.arange(1, num_blocks + 1)
        if self.captured is not None:
            self.captured(num_tokens, num_rows, 1)
        else:
            _as_numpy(self.forward(self._batch(BatchShape(num_tokens, 1, num_rows))))

    def _batch_of(self, chunks: Sequence[Chunk], num_rows: int) -> Batch:
        num_tokens = int(self.buffers.query_starts[len(chunks)])
        return self._batch(BatchShape(num_tokens, len(chunks), num_rows))

    def _batch(self, shape: BatchShape) -> Batch:
        self.buffers.upload()
        if self._slots is not None:
            self._slots.begin(shape.num_tokens, shape.num_rows)
        batch = self._batches.get(shape)
        if batch is None:
            if len(self._batches) >= MAX_KEPT_BATCHES:
                self._batches.clear()
            batch = self.buffers.batch(shape, self.layers, self.block_size)
            self._batches[shape] = batch
        return batch

    def _fill(self, chunks: Sequence[Chunk]) -> list[int]:
        """Write all inputs but the output rows; returns each sampling chunk's last row, and those
        of its drafts.
        """
        buffers, end = self.buffers, 0
        rows: list[int] = []
        for chunk_idx, chunk in enumerate(chunks):
            if chunk.num_tokens == 1:
                self._fill_one(chunk, end)
            else:
                self._fill_many(chunk, end)
            end += chunk.num_tokens
            buffers.query_starts[chunk_idx + 1] = end
            buffers.context_lens[chunk_idx] = chunk.start + chunk.num_tokens
            table = chunk.seq.table
            assert table is not None, "a scheduled sequence has a table"
            buffers.block_tables[chunk_idx] = table
            if chunk.samples:
                rows.extend(range(end - 1 - chunk.num_drafts, end))
        if self._slots is not None:
            self._fill_slots(self._slots, chunks)
        return rows

    def _fill_slots(self, slots: RowSlots, chunks: Sequence[Chunk]) -> None:
        """Each row's adapter; with none at all the step runs the plain modules."""
        of_chunks = [chunk.seq.state.adapter_slot for chunk in chunks]
        slots.is_on = max(of_chunks) >= 0
        if slots.is_on:
            counts = [chunk.num_tokens for chunk in chunks]
            slots.tokens[: sum(counts)] = np.repeat(of_chunks, counts)

    def _fill_outputs(self, rows: list[int], num_chunks: int) -> None:
        """Write `output_rows` (ascending) and how many of them lie before each chunk's end."""
        buffers = self.buffers
        written = buffers.output_rows[: len(rows)]
        written[:] = rows
        if self._slots is not None and self._slots.is_on:
            self._slots.outputs[: len(rows)] = self._slots.tokens[written]
        ends = buffers.query_starts[1 : num_chunks + 1]
        buffers.output_starts[1 : num_chunks + 1] = written.searchsorted(ends)

    def _fill_one(self, chunk: Chunk, row: int) -> None:
        """The decode's way: scalars only."""
        seq, at, size = chunk.seq, chunk.start, self.block_size
        split = seq.num_prompt_tokens
        token = seq.output[at - split] if at >= split else seq.state.prompt[at]
        self.buffers.tokens[row] = token
        self.buffers.positions[row] = at + seq.state.rope_offset
        self.buffers.slots[row] = seq.blocks[at // size] * size + at % size

    def _fill_many(self, chunk: Chunk, row: int) -> None:
        seq, count = chunk.seq, chunk.num_tokens
        part = slice(row, row + count)
        at = self._offsets[:count] + chunk.start
        assert seq.table is not None, "a scheduled sequence has a table"
        committed = row + chunk.num_committed
        self.buffers.tokens[row:committed] = seq.tokens(chunk.start, chunk.num_committed)
        self.buffers.tokens[committed : row + count] = seq.draft
        self.buffers.positions[part] = at + seq.state.rope_offset
        self.buffers.slots[part] = block_slots(seq, at, self.block_size)

    def _run_without_logits(self, chunks: Sequence[Chunk]) -> Logits:
        """Inner chunks of prompts: only keys and values are wanted. One row keeps shapes sound;
        the head, a fifth of a small model's weights, is not read for it.
        """
        self._fill_outputs([int(self.buffers.query_starts[len(chunks)]) - 1], len(chunks))
        self.fill_cache(self._batch_of(chunks, 1))
        return Logits(np.empty((0, 1), np.float32), ())

    def _run_with_prompt_logprobs(self, chunks: Sequence[Chunk]) -> Logits:
        """Rows of such prompts all need logits: computed in parts, kept only where sampled."""
        last_rows = self._fill(chunks)
        asked = {i: rows for i, rows in enumerate(_token_rows(chunks)) if _asks(chunks[i])}
        wanted = sorted(set(last_rows).union(*asked.values()))
        self._fill_outputs(wanted, len(chunks))
        hidden = self.decoder.hidden(self._batch_of(chunks, len(wanted)))
        place = {row: i for i, row in enumerate(wanted)}
        entries: dict[int, list[TokenLogprob]] = {}
        for chunk_idx, rows in asked.items():
            part = hidden[place[rows[0]] : place[rows[-1]] + 1]
            entries[chunk_idx] = self._prompt_logprobs(chunks[chunk_idx], part)
        if not last_rows:
            return Logits(np.empty((0, 1), np.float32), (), entries)
        index = torch.tensor([place[row] for row in last_rows], device=hidden.device)
        hidden = hidden[index]
        values = _as_numpy(self.decoder.logits(hidden))
        return Logits(values, _first_rows(chunks), entries, hidden)

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> list[TokenLogprob]:
        """Row i of the chunk predicts prompt token start + i + 1; the last may predict none."""
        num_top = chunk.seq.state.request.params.prompt_logprobs or 0
        targets = chunk.seq.state.prompt[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
        found: list[TokenLogprob] = []
        for start in range(0, len(targets), LOGITS_ROWS):
            part = targets[start : start + LOGITS_ROWS]
            logits = _as_numpy(self.decoder.logits(hidden[start : start + len(part)]))
            pairs = zip(logits, part, strict=True)
            found.extend(token_logprob(row, int(target), num_top) for row, target in pairs)
        return found


def _asks(chunk: Chunk) -> bool:
    """The request asked for its prompt's logprobs and has not been told them yet."""
    return chunk.seq.state.prompt_logprobs is not None


def _first_rows(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    """Of each chunk that samples: where its output rows begin."""
    counts = [1 + chunk.num_drafts for chunk in chunks if chunk.samples]
    return tuple(accumulate(counts[:-1], initial=0)) if counts else ()


def block_slots(seq: EngineSequence, at: NDArray[np.int32], block_size: int) -> NDArray[np.int64]:
    """Cache slots of the token positions `at`: block * block_size + offset."""
    assert seq.table is not None, "a scheduled sequence has a table"
    blocks = seq.table[at // block_size].astype(np.int64)
    return blocks * block_size + at % block_size


def _token_rows(chunks: Sequence[Chunk]) -> list[range]:
    """The rows of each chunk."""
    found, end = [], 0
    for chunk in chunks:
        found.append(range(end, end + chunk.num_tokens))
        end += chunk.num_tokens
    return found


def _as_numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array

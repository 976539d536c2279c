"""A step recorded once and replayed by one native call.

While `StepTape` runs `forward`, the CPU kernels compute nothing: each op becomes a call on a C++
tape with its output in an arena. Buffers are reused as soon as the Python tensor that stood for
them dies, so the arena is as small as the forward's liveness allows. Replaying needs only the
counts T, R, S: the batch's buffers are written in place.

Why: Python and the dispatcher cost about 5 us an op, 1-2 ms of a 240-op step that lasts 5.
Roads not taken: one tape a batch shape (kernels take their row counts at replay, so one tape
serves every shape up to the arena's); a TorchDispatchMode, whose first use imports torch._dynamo
(1.4 s of start-up). A stray PyTorch op in a forward is caught because its result is not a
recorded buffer; a test also proves that the decoder has none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sterna.core.errors import KernelError
from sterna.kernels import _cpu
from sterna.kernels.cpu_backend import CpuBackend

B = TypeVar("B")


class RecordingSink:
    """Appends calls to a tape; outputs come from an arena of reusable buffers."""

    def __init__(self, kernels: Any, tape: Any, inputs: Mapping[int, int]) -> None:
        self.kernels = kernels
        self.tape = tape
        self._kinds = dict(inputs)
        self._free: dict[tuple[int, int], list[Tensor]] = {}
        self.buffers: list[Tensor] = []

    def kind(self, x: Tensor) -> int:
        """See Sink. Raises KernelError for a tensor this recording has not made."""
        kind = self._kinds.get(x.data_ptr())
        if kind is None:
            raise KernelError("a recorded forward reads rows that no recorded op has written")
        return kind

    def empty(self, rows: int, cols: int, dtype: torch.dtype, kind: int) -> Tensor:
        """See Sink."""
        size = rows * cols * dtype.itemsize
        free = self._free.setdefault((size, kind), [])
        buffer = free.pop() if free else self._grow(size, kind)
        out = buffer.view(dtype).view(rows, cols)
        weakref.finalize(out, free.append, buffer)
        return out

    def _grow(self, size: int, kind: int) -> Tensor:
        buffer = torch.empty(max(size, 1), dtype=torch.uint8)
        self.buffers.append(buffer)
        self._kinds[buffer.data_ptr()] = kind
        return buffer

    def counts(self, rows: int, seqs: int) -> tuple[int, int, int]:
        """Counts come at replay."""
        return 0, 0, 0


class StepTape(Generic[B]):
    """A recorded forward over the buffers of one batch.

    `output` [max rows, cols] holds the result; after `replay(t, r, s)` its first r rows are valid.
    """

    def __init__(
        self,
        backend: CpuBackend,
        forward: Callable[[B], Tensor],
        batch: B,
        token_inputs: tuple[Tensor, ...],
        row_inputs: tuple[Tensor, ...],
    ) -> None:
        self._backend = backend
        self._tape = _cpu.Tape()
        self._batch = batch  # keeps the recorded addresses alive
        kinds = {x.data_ptr(): 0 for x in token_inputs} | {x.data_ptr(): 1 for x in row_inputs}
        sink = RecordingSink(backend.kernels, self._tape, kinds)
        with torch.inference_mode(), backend.sending_to(sink):
            self.output = forward(batch)
        sink.kind(self.output)  # refuses a result that no recorded op has written
        self._buffers = sink.buffers
        self._sink = sink

    def __len__(self) -> int:
        return len(self._tape)

    def replay(self, num_tokens: int, num_rows: int, num_seqs: int) -> None:
        """Run the step on the first `num_tokens` tokens, `num_rows` rows, `num_seqs` sequences."""
        self._backend.kernels.replay(self._tape, num_tokens, num_rows, num_seqs)

    def profile(self, num_tokens: int, num_rows: int, num_seqs: int) -> list[tuple[str, float]]:
        """One replay with the seconds of each call."""
        seconds = self._backend.kernels.profile(self._tape, num_tokens, num_rows, num_seqs)
        return [(self._tape.name(i), s) for i, s in enumerate(seconds)]

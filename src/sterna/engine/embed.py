"""Texts to vectors (or scores): packed steps through an encoder or a decoder, then pooling.

One step is one forward over whole texts. On a CPU with the C++ kernels it is recorded once and
replayed (kernels/tape.py); pooling, normalising and a classification head are part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sterna.core.errors import KernelError, StepError
from sterna.core.log import get_logger
from sterna.engine.pack import pack_arrays, plan_steps
from sterna.kernels import ops
from sterna.kernels.backend import backend_for
from sterna.model.batch import Batch
from sterna.model.decoder import Decoder
from sterna.model.encoder import Encoder
from sterna.model.encoder_heads import SequenceHead
from sterna.model.pooling import PoolingConfig
from sterna.text.inputs import EncodedText, InputEncoder

_log = get_logger(__name__)
Floats = NDArray[np.float32]
# Tokens of a step. Twice as many gain 1 % (fewer stages to meet at), half as many lose 2 %.
TOKEN_BUDGET = 4096
MAX_SEQS = 1024


@dataclass(frozen=True, slots=True)
class EmbedModel:
    """A model and what follows its hidden states. `head`: a cross encoder's."""

    body: Encoder | Decoder
    pooling: PoolingConfig
    head: SequenceHead | None = None
    has_sigmoid: bool = False

    @property
    def width(self) -> int:
        """Columns of a result: the vector's, or the head's labels."""
        return self.body.config.hidden_size if self.head is None else self.head.out.out_features

    @property
    def rows_a_type(self) -> int:
        """See `pack_arrays`; 0 for a model without token types."""
        if isinstance(self.body, Decoder) or not self.body.config.family.has_learned_positions:
            return 0
        return self.body.config.num_positions

    def forward(self, batch: Batch, unit_starts: Tensor) -> Tensor:
        """float32 [S, width]. unit_starts [S + 1] counts from 0: each row a sequence of its own."""
        hidden = self.body.hidden(batch)
        starts = batch.query_starts if batch.output_rows is None else unit_starts
        is_unit = self.pooling.is_normalized and self.head is None
        pooled = ops.pool(hidden, starts, self.pooling.kind, is_unit)
        if self.head is None:
            return pooled
        logits: Tensor = self.head(pooled)
        return logits


class _Inputs:
    """The buffers of a step, written in place."""

    def __init__(self, budget: int, max_seqs: int) -> None:
        self.ids, self.positions = (torch.zeros(budget, dtype=torch.int32) for _ in range(2))
        self.starts = torch.zeros(max_seqs + 1, dtype=torch.int32)
        self.lengths, self.rows = (torch.zeros(max_seqs, dtype=torch.int32) for _ in range(2))
        self.units = torch.arange(max_seqs + 1, dtype=torch.int32)

    def batch(self, tokens: int, seqs: int, has_rows: bool) -> Batch:
        """The first `tokens` tokens of `seqs` texts, as views."""
        rows = self.rows[:seqs] if has_rows else None
        starts = self.starts[: seqs + 1]
        return Batch(self.ids[:tokens], self.positions[:tokens], starts, self.lengths[:seqs], rows)


class Embedder:
    """Runs steps. One thread at a time; `encoder` may be used by any."""

    def __init__(
        self, model: EmbedModel, encoder: InputEncoder, capture: bool = True, budget: int = 0
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.max_tokens = encoder.max_tokens
        self.token_budget = max(budget or TOKEN_BUDGET, encoder.max_tokens)
        self.max_seqs = min(MAX_SEQS, self.token_budget)
        self._inputs = _Inputs(self.token_budget, self.max_seqs)
        self._has_rows = model.pooling.kind != "mean"
        self._replay = self._captured() if capture else None

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed."""
        return self._replay is not None

    @property
    def width(self) -> int:
        """Columns of a result."""
        return self.model.width

    def embed(
        self, texts: Sequence[EncodedText], note: Callable[[int], None] | None = None
    ) -> Floats:
        """float32 [N, width], in the order of the texts. note: gets the size of each step."""
        out = np.empty((len(texts), self.width), np.float32)
        lengths = [len(text) for text in texts]
        for step in plan_steps(lengths, self.token_budget, self.max_seqs):
            out[step] = self.run([texts[i] for i in step])
            if note is not None:
                note(len(step))
        return out

    @torch.inference_mode()
    def run(self, texts: Sequence[EncodedText]) -> Floats:
        """One step: float32 [S, width]. Raises StepError when a result is not finite."""
        seqs, tokens = len(texts), self._fill(texts)
        if self._replay is not None:
            found = self._replay(tokens, seqs)
        else:
            found = self._forward(tokens, seqs)
        values: Floats = found.cpu().numpy().copy()
        if self.model.has_sigmoid:
            values = (1 / (1 + np.exp(-values))).astype(np.float32)
        if not np.isfinite(values).all():
            raise StepError("the model's output is not finite (NaN or infinity) for this input")
        return values

    def _fill(self, texts: Sequence[EncodedText]) -> int:
        model, inputs = self.model, self._inputs
        packed = pack_arrays(texts, model.rows_a_type)
        tokens, seqs = len(packed.ids), packed.num_seqs
        inputs.ids[:tokens] = torch.from_numpy(packed.ids)
        inputs.positions[:tokens] = torch.from_numpy(self._moved(packed.positions, texts))
        inputs.starts[: seqs + 1] = torch.from_numpy(packed.starts)
        inputs.lengths[:seqs] = inputs.starts[1 : seqs + 1] - inputs.starts[:seqs]
        if self._has_rows:
            is_last = model.pooling.kind == "last"
            inputs.rows[:seqs] = (
                inputs.starts[1 : seqs + 1] - 1 if is_last else inputs.starts[:seqs]
            )
        return tokens

    def _moved(
        self, positions: NDArray[np.int32], texts: Sequence[EncodedText]
    ) -> NDArray[np.int32]:
        """Positions of a LongRope decoder: long texts use the second table."""
        body = self.model.body
        if isinstance(body, Encoder):
            return positions
        offsets = [body.rope_row_offset(len(text)) for text in texts]
        if any(offsets):
            positions = positions + np.repeat(np.array(offsets, np.int32), [len(t) for t in texts])
        return positions

    def _forward(self, tokens: int, seqs: int) -> Tensor:
        batch = self._inputs.batch(tokens, seqs, self._has_rows)
        units, device = self._inputs.units[: seqs + 1], self.model.body.device
        if device.type != "cpu":
            batch, units = _moved_to(batch, device), units.to(device)
        return self.model.forward(batch, units)

    def _captured(self) -> Callable[[int, int], Tensor] | None:
        if backend_for("cpu").name != "cpu" or isinstance(self.model.body, Decoder):
            return None
        if self.model.body.device.type != "cpu":
            return None
        try:
            return _record(self.model, self._inputs, self.token_budget, self.max_seqs)
        except KernelError as error:
            _log.info("steps are interpreted, not replayed: %s", error)
            return None


def _record(
    model: EmbedModel, inputs: _Inputs, budget: int, max_seqs: int
) -> Callable[[int, int], Tensor]:
    from sterna.kernels.cpu_backend import CpuBackend
    from sterna.kernels.tape import StepTape

    backend = backend_for("cpu")
    assert isinstance(backend, CpuBackend), "asked by name"
    widest = inputs.batch(budget, max_seqs, model.pooling.kind != "mean")
    rows = () if widest.output_rows is None else (widest.output_rows,)
    tape: StepTape[Batch] = StepTape(
        backend,
        lambda batch: model.forward(batch, inputs.units),
        widest,
        (widest.tokens, widest.positions),
        rows,
    )

    def replay(tokens: int, seqs: int) -> Tensor:
        tape.replay(tokens, seqs, seqs)
        return tape.output[:seqs]

    return replay


def _moved_to(batch: Batch, device: torch.device) -> Batch:
    rows = None if batch.output_rows is None else batch.output_rows.to(device)
    parts = (batch.tokens, batch.positions, batch.query_starts, batch.context_lens)
    tokens, positions, starts, lengths = (part.to(device) for part in parts)
    return Batch(tokens, positions, starts, lengths, rows)

"""The engine's forward, recorded once and replayed by one native call a step.

Only on a CPU with the C++ kernels. Anything else (CUDA, reference kernels, a model whose forward
is not made of sterna ops) keeps the interpreted forward, and the reason is logged once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sterna.core.errors import KernelError
from sterna.core.log import get_logger
from sterna.kernels.backend import backend_for
from sterna.model.batch import Batch
from sterna.model.decoder import Decoder

if TYPE_CHECKING:
    from sterna.engine.runner import InferenceModel
    from sterna.kernels.tape import StepTape

_log = get_logger(__name__)


class CapturedForward:
    """Logits of a step by replay. `widest` spans the engine's whole input buffers."""

    def __init__(self, model: InferenceModel, widest: Batch) -> None:
        """Raises KernelError when the forward cannot be recorded."""
        from sterna.kernels.cpu_backend import CpuBackend
        from sterna.kernels.tape import StepTape

        backend = backend_for("cpu")
        if not isinstance(backend, CpuBackend) or widest.output_rows is None:
            raise KernelError("only the C++ kernels replay recorded steps")
        self._tape: StepTape[Batch] = StepTape(
            backend,
            lambda batch: model.logits(self._keep_hidden(model.hidden(batch))),
            widest,
            (widest.tokens, widest.positions),
            (widest.output_rows,),
        )

    def __call__(self, num_tokens: int, num_rows: int, num_seqs: int) -> Tensor:
        """Float32 logits [num_rows, V]; valid until the next call."""
        self._tape.replay(num_tokens, num_rows, num_seqs)
        return self._tape.output[:num_rows]

    def _keep_hidden(self, hidden: Tensor) -> Tensor:
        """While it lives its buffer is nobody else's: `hidden` [max rows, D] of the last step."""
        self.hidden = hidden
        return hidden

    def profile(self, num_tokens: int, num_rows: int, num_seqs: int) -> list[tuple[str, float]]:
        """(kernel, seconds) of each call of one step."""
        return self._tape.profile(num_tokens, num_rows, num_seqs)


def capture(model: InferenceModel, widest: Batch) -> CapturedForward | None:
    """Record the forward, or say why steps are interpreted."""
    is_native = widest.tokens.device.type == "cpu" and backend_for("cpu").name == "cpu"
    if not is_native or not isinstance(model, Decoder):
        return None
    try:
        return CapturedForward(model, widest)
    except KernelError as error:
        _log.info("steps are interpreted, not replayed: %s", error)
        return None

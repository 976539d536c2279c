"""The gradient of log-probs and entropies by their logits, a row at a time (native only).

    d z_j = (g (1[j = y] - p_j) - k p_j (log p_j + H)) / temperature

g and k are the upstream gradients of the row's log-prob and entropy, p the distribution that
`scores.py` scores, 0 for tokens it leaves out. One walk over a row where PyTorch makes five tensors
of the logits' size. The reference is `train/longseq/head.py`, which other devices run.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sterna.kernels.backend import backend_for
from sterna.kernels.scores import Distribution

_OUT = {torch.float32: 0, torch.bfloat16: 1}


def can_differentiate(hidden: Tensor, vocab: int) -> bool:
    """Whether `row_gradient` serves logits of such hidden states."""
    if hidden.device.type != "cpu" or hidden.dtype not in _OUT:
        return False
    if getattr(backend_for("cpu"), "kernels", None) is None:
        return False
    from sterna.kernels import _cpu

    return bool(vocab <= _cpu.MAX_DRAW_VOCAB)


def row_gradient(
    logits: Tensor,
    chosen: Tensor,
    distribution: Distribution,
    d_logprobs: Tensor,
    d_entropies: Tensor,
    out: Tensor,
) -> None:
    """logits [r, V] float32, chosen [r], upstream gradients [r] -> `out` [r, V], both contiguous.

    Only where `can_differentiate`. A row that is not finite becomes NaN.
    """
    count, vocab = logits.shape
    assert logits.is_contiguous() and out.is_contiguous(), "rows one behind the other"
    ids = chosen.numpy().astype(np.int32)
    top_k = np.full(count, distribution.top_k, np.int32)
    of = (distribution.temperature, distribution.top_p, distribution.min_p)
    temperature, top_p, min_p = (np.full(count, value, np.float32) for value in of)
    grads = [g.detach().float().contiguous() for g in (d_logprobs, d_entropies)]
    rows = (ids, temperature, top_k, top_p, min_p)
    backend = backend_for("cpu")
    backend.kernels.score_grad(  # type: ignore[attr-defined]
        logits.data_ptr(), *(a.ctypes.data for a in rows), *(g.data_ptr() for g in grads),
        out.data_ptr(), count, vocab, _OUT[out.dtype],
    )  # fmt: skip

"""A model as a scorer of windows, with the kernels it is served with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sterna.core.errors import ConfigError
from sterna.model.batch import Batch
from sterna.model.decoder import Decoder
from sterna.model.load import DTypeName
from sterna.quant.linear import use_int8_activations
from sterna.quant.load import load_quantized


def load_scorer(
    path: Path, dtype: DTypeName = "bfloat16", int8_activations: bool = False
) -> DecoderScorer:
    """A plain folder, a GGUF file or a quantised folder; errors as `load_quantized`.

    int8_activations: score as `activations=int8` serves; ConfigError for plain or fp8 weights.
    """
    decoder = load_quantized(path, dtype).decoder
    if int8_activations:
        use_int8_activations(decoder)
    return DecoderScorer(decoder)


class DecoderScorer:
    """Packs the decoder for serving: quantised weights run on their own kernels."""

    def __init__(self, decoder: Decoder) -> None:
        decoder.prepare_inference()
        self._decoder = decoder
        self.vocab_size = decoder.config.vocab_size

    @torch.inference_mode()
    def __call__(self, window: Tensor) -> Tensor:
        """See `quality.Scorer`. ConfigError when the window is longer than the model's context."""
        n, limit = len(window), self._decoder.config.num_positions
        if n > limit:
            raise ConfigError(f"a window of {n} tokens, the model has {limit} positions")
        rows = torch.arange(n - n // 2, n, dtype=torch.int32)
        bounds, lens = torch.tensor([0, n]).int(), torch.tensor([n]).int()
        batch = Batch(window, torch.arange(n).int(), bounds, lens, rows)
        logits: Tensor = self._decoder(batch)
        return logits.log_softmax(dim=-1)

"""What reads the decoder's hidden states. Heads are apart from the decoder, so that training,
serving, scoring and embedding share one `hidden(batch)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sterna.kernels import ops
from sterna.model.config import ModelConfig
from sterna.model.layers import new_parameter, packed


class Embedding(nn.Module):
    """Token rows, scaled (Gemma) by a factor that is first rounded to the weight's dtype."""

    def __init__(
        self, config: ModelConfig, num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_rows = num_rows
        self.scale = torch.tensor(config.embed_scale, dtype=dtype).item()
        self.weight = new_parameter(num_rows, config.hidden_size, dtype=dtype, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, D]."""
        return ops.embed(tokens, self.weight, self.hidden_size, self.scale)

    def logits(self, hidden: Tensor, softcap: float) -> Tensor:
        """hidden [R, D] -> float32 logits [R, V], for models whose head is tied to this table."""
        return ops.logits(hidden, self.weight, self.num_rows, softcap)

    def prepare_inference(self) -> None:
        """Pack the table; only useful when the logits read it too (tied embeddings)."""
        self.weight = packed(self.weight)


class PositionEmbedding(nn.Module):
    """Learned positions (OPT), whose table starts `offset` rows late."""

    def __init__(
        self, config: ModelConfig, offset: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.offset = offset
        self.num_rows = config.max_position_embeddings
        self.hidden_size = config.hidden_size
        num_rows = offset + self.num_rows
        self.weight = new_parameter(num_rows, config.hidden_size, dtype=dtype, device=device)

    def forward(self, positions: Tensor) -> Tensor:
        """positions [T] -> [T, D]."""
        table = self.weight.narrow(0, self.offset, self.num_rows)  # a view of the parameter
        return ops.embed(positions, table, self.hidden_size)


class LMHead(nn.Module):
    """The weight of the logits when it is not the embedding's."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        shape = (config.vocab_size, config.hidden_size)
        self.weight = new_parameter(*shape, dtype=dtype, device=device)

    def logits(self, hidden: Tensor, softcap: float) -> Tensor:
        """hidden [R, D] -> float32 logits [R, V]."""
        return ops.logits(hidden, self.weight, self.vocab_size, softcap)

    def prepare_inference(self) -> None:
        """Replace the weight by the back end's packed one."""
        self.weight = packed(self.weight)

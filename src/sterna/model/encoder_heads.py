"""Classification heads of encoders: pooled float32 rows to scores.

    BERT, GTE      out(tanh(pooler(first row)))
    RoBERTa        out(tanh(dense(first row)))
    ModernBERT     out(norm(act(dense(first row or mean))))

Heads stay in float32 whatever the encoder computes in: they are a ten-thousandth of its work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sterna.model.config import ACTIVATIONS
from sterna.model.encoder import Norm
from sterna.model.encoder_config import EncoderConfig
from sterna.model.families import Names
from sterna.model.layers import Linear


class SequenceHead(nn.Module):
    """Pooled rows [S, D] -> logits [S, num_labels], all float32."""

    norm: Norm | None

    def __init__(self, config: EncoderConfig, device: torch.device) -> None:
        super().__init__()
        hidden, is_prediction = config.hidden_size, config.family.head == "prediction"
        dtype = torch.float32
        has_bias = bool(config.hf.get("classifier_bias", False)) if is_prediction else True
        act = str(config.hf.get("classifier_activation", "gelu"))
        self.activation = ACTIVATIONS[act] if is_prediction else "tanh"
        self.dense = Linear(hidden, hidden, has_bias, dtype, device)
        self.norm = Norm(config, dtype, device) if is_prediction else None
        self.out = Linear(hidden, config.num_labels, True, dtype, device)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled [S, D] -> [S, num_labels]."""
        x = self.dense(pooled, activation=self.activation)
        if self.norm is not None:
            x = self.norm(x)
        y: Tensor = self.out(x)
        return y


def score_of(logits: Tensor, has_sigmoid: bool) -> Tensor:
    """The score of a cross encoder: its only logit, through a sigmoid when the model has one."""
    return torch.sigmoid(logits[:, 0]) if has_sigmoid else logits[:, 0]


def head_names(config: EncoderConfig, prefix: str) -> Names:
    """Our names -> the checkpoint's, whose base model's names begin with `prefix`."""
    if config.family.head == "dense":
        return {"dense": ("classifier.dense",), "out": ("classifier.out_proj",)}
    if config.family.head == "prediction":
        return {"dense": ("head.dense",), "norm": ("head.norm",), "out": ("classifier",)}
    return {"dense": (prefix + "pooler.dense",), "out": ("classifier",)}

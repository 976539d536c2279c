"""The one encoder of all families, on the same flat Batch as the decoder; `kv` is None.

post norm:  h = norm(out(attention(h)) + h);   h = norm(mlp(h) + h)
pre norm:   h = h + out(attention(norm(h)));   h = h + mlp(norm(h));   at the end norm(h)

Learned positions and token types are one float32 table, made at load: row p + P * t is position p
of type t, so `Batch.positions` says both and the embeddings are one op. Rotary encoders have no
such row; their type 0 is added to every token.

The forward consists of sterna ops alone and can be recorded (kernels/tape.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sterna.kernels import ops
from sterna.model.batch import Batch
from sterna.model.decoder import RopeTables
from sterna.model.encoder_config import EncoderConfig
from sterna.model.layers import GatedLinear, Linear, new_parameter


class Norm(nn.Module):
    """(x - mean) / std * weight (+ bias)."""

    bias: nn.Parameter | None

    def __init__(self, config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = config.norm_eps
        size, has_bias = config.hidden_size, config.has_norm_bias
        self.weight = new_parameter(size, dtype=dtype, device=device)
        self.bias = new_parameter(size, dtype=dtype, device=device) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Weight(nn.Module):
    """Holds a table of rows."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = new_parameter(rows, cols, dtype=dtype, device=device)


class EncoderEmbeddings(nn.Module):
    """Word rows plus the row of position and type, normed."""

    def __init__(self, config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.word = Weight(config.vocab_size, config.hidden_size, dtype, device)
        self.norm = Norm(config, dtype, device)
        self.places: Tensor | None = None  # float32 [types * P, D], or [1, D] with rotation

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions [T] -> [T, D]."""
        norm = self.norm
        return ops.embed_norm(
            tokens, self.word.weight, positions, self.places, norm.weight, norm.bias, norm.eps
        )


class EncoderLayer(nn.Module):
    """Attention and MLP with their norms, before or after."""

    attn_norm: Norm | None
    gate_up: GatedLinear | None
    up: Linear | None

    def __init__(
        self, config: EncoderConfig, layer_idx: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.is_pre_norm = config.family.is_pre_norm
        self.activation = config.hidden_act
        self.heads = (config.num_attention_heads, config.num_attention_heads, config.head_dim)
        self.scale = config.attention_scale
        self.window = config.layer_windows[layer_idx]
        self.qkv = Linear(hidden, 3 * hidden, config.has_qkv_bias, dtype, device)
        self.out = Linear(hidden, hidden, config.has_out_bias, dtype, device)
        is_bare = config.family.is_pre_norm and layer_idx == 0  # its input is normed already
        self.attn_norm = None if is_bare else Norm(config, dtype, device)
        is_gated = config.family.is_gated
        self.gate_up = (
            GatedLinear(hidden, inner, self.activation, dtype, device) if is_gated else None
        )
        self.up = None if is_gated else Linear(hidden, inner, True, dtype, device)
        self.down = Linear(inner, hidden, config.has_mlp_bias, dtype, device)
        self.mlp_norm = Norm(config, dtype, device)

    def forward(self, h: Tensor, batch: Batch, table: Tensor | None, rows: Tensor | None) -> Tensor:
        """h [T, D] -> [T, D], or [R, D] when `rows` names those wanted (the last layer)."""
        x = self.attn_norm(h) if self.is_pre_norm and self.attn_norm is not None else h
        o = self.attend(x, batch, table)
        if rows is not None:
            h, o = ops.select_rows(h, rows), ops.select_rows(o, rows)
        h = self.out(o, h)
        if self.is_pre_norm:
            return self.mlp(self.mlp_norm(h), h)
        assert self.attn_norm is not None, "only the first layer of a pre-norm encoder has none"
        h = self.attn_norm(h)
        out: Tensor = self.mlp_norm(self.mlp(h, h))
        return out

    def attend(self, x: Tensor, batch: Batch, table: Tensor | None) -> Tensor:
        """x [T, D] -> attention output [T, H * C], before `out`."""
        qkv = self.qkv(x)
        if table is not None:
            qkv = ops.rope(qkv, batch.positions, table, None, None, 0.0, False, *self.heads)
        return ops.bidirectional_attention(
            qkv, batch.query_starts, *self.heads, self.scale, self.window
        )

    def mlp(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [T, D] -> [T, D]."""
        if self.gate_up is not None:
            inner = self.gate_up(x)
        else:
            assert self.up is not None, "a layer has one of the two"
            inner = self.up(x, activation=self.activation)
        y: Tensor = self.down(inner, residual)
        return y


class Encoder(nn.Module):
    """Hidden states of whole sequences; every token sees its sequence, or a window of it."""

    norm: Norm | None

    def __init__(
        self,
        config: EncoderConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rope_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.dtype = dtype
        self.embed = EncoderEmbeddings(config, dtype, device)
        self.layers = nn.ModuleList(
            EncoderLayer(config, i, dtype, device) for i in range(config.num_hidden_layers)
        )
        self.norm = Norm(config, dtype, device) if config.family.is_pre_norm else None
        self.ropes = RopeTables(config, torch.device(rope_device or device))

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [R, D] of batch.output_rows, or [T, D] when that is None."""
        h: Tensor = self.embed(batch.tokens, batch.positions)
        last = len(self.layers) - 1
        for layer_idx, layer in enumerate(self.layers):
            rows = batch.output_rows if layer_idx == last else None
            h = layer(h, batch, self._rope_of(layer_idx), rows)
        return h if self.norm is None else self.norm(h)

    def prepare_inference(self) -> None:
        """Replace weights by the packed ones of the back end; there is no way back."""
        for module in self.modules():
            if isinstance(module, Linear | GatedLinear):
                module.prepare_inference()
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.norm.weight.device

    def _rope_of(self, layer_idx: int) -> Tensor | None:
        rope_idx = self.config.layer_ropes[layer_idx]
        return self.ropes.tables[rope_idx] if rope_idx >= 0 else None

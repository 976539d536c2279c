"""The layers of a decoder. Their forwards are sterna ops and nothing else.

A stray PyTorch op (`h + x`, a slice, a cast) would be invisible to the CPU runner, which records
the sterna ops of a step and replays them without Python. What can be computed beforehand (fused
weights, rope tables) is. Weights are plain Parameters in the Hugging Face layout until
`prepare_inference` packs them, so training uses the very same modules.

Legend: T tokens, R output rows, D hidden_size, H query heads, G key/value heads, C head_dim,
I intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sterna.kernels import gated, ops
from sterna.model.batch import Batch
from sterna.model.config import ModelConfig
from sterna.parallel.ulysses import ParallelPlan


def new_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised Parameter; loading or `init_weights` fills it."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


class Linear(nn.Module):
    """y = activation(x @ weight.T + bias) + residual."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.weight = new_parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = new_parameter(out_features, dtype=dtype, device=device) if has_bias else None

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str = "none"
    ) -> Tensor:
        """x [T, K] -> [T, N]; `residual` [T, N] is added before the rounding."""
        return ops.linear(x, self.weight, self.bias, residual, self.out_features, activation)

    def prepare_inference(self) -> None:
        """Replace the weight by the back end's packed one."""
        self.weight = packed(self.weight)


class GatedLinear(nn.Module):
    """act(x @ gate.T) * (x @ up.T), the two weights stacked."""

    keeps_sums = False  # training: keep 2 I numbers a token for the backward, not compute them anew

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.activation = activation
        self.weight = new_parameter(2 * out_features, in_features, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, I]."""
        if self.keeps_sums and torch.is_grad_enabled() and self.weight.requires_grad:
            return gated.gated_linear(x, self.weight, self.activation, self.out_features)
        return ops.gated_linear(x, self.weight, self.activation, self.out_features)

    def prepare_inference(self) -> None:
        """Replace the weight by the back end's packed one."""
        self.weight = packed(self.weight, gated=True)


def packed(weight: nn.Parameter, gated: bool = False) -> nn.Parameter:
    """A frozen Parameter in the layout of the back end in use; itself when packed already."""
    if weight.dim() == 4:
        return weight
    return nn.Parameter(ops.pack_weight(weight.detach(), gated), requires_grad=False)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (+ 1 for families that store the weight minus one)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.has_unit_offset = config.family.has_unit_offset
        self.weight = new_parameter(config.hidden_size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return ops.rms_norm(x, self.weight, self.eps, self.has_unit_offset)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = new_parameter(config.hidden_size, dtype=dtype, device=device)
        self.bias = new_parameter(config.hidden_size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def new_norm(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The family's normalisation of the hidden states."""
    kind = LayerNorm if config.family.norm == "layer" else RMSNorm
    return kind(config, dtype, device)


class HeadNorm(nn.Module):
    """Holds the weight of a query or key head norm; the `rope` ops apply it."""

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = new_parameter(head_dim, dtype=dtype, device=device)


class Attention(nn.Module):
    """Causal attention over a packed batch: by sequence in training, paged in serving."""

    q_norm: HeadNorm | None
    k_norm: HeadNorm | None

    def __init__(
        self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.scale = config.attention_scale
        self.window = config.layer_windows[layer_idx]
        self.softcap = config.attention_softcap
        self.eps = config.rms_norm_eps
        self.has_unit_offset = config.family.has_unit_offset
        hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.qkv = Linear(hidden, config.qkv_size, config.has_qkv_bias, dtype, device)
        self.out = Linear(inner, hidden, config.has_out_bias, dtype, device)
        has_norm = config.family.has_qk_norm
        self.q_norm = HeadNorm(config.head_dim, dtype, device) if has_norm else None
        self.k_norm = HeadNorm(config.head_dim, dtype, device) if has_norm else None
        self.plan: ParallelPlan | None = None  # how training spreads a row over ranks

    def forward(self, x: Tensor, batch: Batch, table: Tensor | None) -> Tensor:
        """Normed x [T, D] -> attention output [T, H * C], before the `out` projection.

        `table`: rope table of this layer, None = no rotation.
        """
        if batch.kv is None:
            return self.attend_batch(self.project(x, batch.positions, table), batch)
        qkv, rope = self.qkv(x), self._rope_args(batch.positions, table)
        kv = batch.kv
        cache = kv.layers[self.layer_idx]
        q = ops.rope_store(qkv, *rope, *self.heads, cache, kv.slots, kv.block_size)
        return ops.paged_attention(
            q,
            cache,
            kv.block_tables,
            batch.query_starts,
            batch.context_lens,
            *self.heads,
            kv.block_size,
            self.scale,
            self.window,
            self.softcap,
        )

    def project(self, x: Tensor, positions: Tensor, table: Tensor | None) -> Tensor:
        """Training: normed x [T, D] -> rotated qkv [T, (H + 2G) * C], row by row."""
        return ops.rope(self.qkv(x), *self._rope_args(positions, table), *self.heads)

    def _rope_args(
        self, positions: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float, bool]:
        q_norm = self.q_norm.weight if self.q_norm is not None else None
        k_norm = self.k_norm.weight if self.k_norm is not None else None
        return positions, table, q_norm, k_norm, self.eps, self.has_unit_offset

    def attend_batch(self, qkv: Tensor, batch: Batch) -> Tensor:
        """Training: rotated qkv of a whole batch, whose sequences may share prefixes."""
        if batch.shared is None:
            return self.attend(qkv, batch.query_starts)
        keys = (batch.query_starts, batch.shared.rows, batch.shared.starts)
        return ops.shared_attention(qkv, *keys, *self.heads, self.scale, self.window, self.softcap)

    def attend(self, qkv: Tensor, query_starts: Tensor) -> Tensor:
        """Training: rotated qkv [T, (H + 2G) * C] -> [T, H * C]; T may be a rank's slice."""
        options = (*self.heads, self.scale, self.window, self.softcap)
        if self.plan is None:
            return ops.attention(qkv, query_starts, *options)
        return self.plan.attend(qkv, query_starts, *options, ops.attention)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): Llama and most others."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = GatedLinear(hidden, inner, config.hidden_act, dtype, device)
        self.down = Linear(inner, hidden, False, dtype, device)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """x, residual [T, D] -> [T, D]."""
        y: Tensor = self.down(self.gate_up(x), residual)
        return y


class MLP(nn.Module):
    """down(act(up(x))) with biases: OPT."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.up = Linear(hidden, inner, True, dtype, device)
        self.down = Linear(inner, hidden, True, dtype, device)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """x, residual [T, D] -> [T, D]."""
        y: Tensor = self.down(ops.activate(self.up(x), self.activation), residual)
        return y


class Block(nn.Module):
    """Attention and MLP, each on normed input and added to the residual stream.

    With post norms (Gemma 3) each branch is normed again before it is added.
    """

    post_attn_norm: nn.Module | None
    post_mlp_norm: nn.Module | None

    def __init__(
        self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        family = config.family
        self.attn_norm = new_norm(config, dtype, device)
        self.attn = Attention(config, layer_idx, dtype, device)
        self.mlp_norm = new_norm(config, dtype, device)
        kind = GatedMLP if family.has_gated_mlp else MLP
        self.mlp: nn.Module = kind(config, dtype, device)
        has_post = family.has_post_norms
        self.post_attn_norm = new_norm(config, dtype, device) if has_post else None
        self.post_mlp_norm = new_norm(config, dtype, device) if has_post else None

    def forward(self, h: Tensor, batch: Batch, table: Tensor | None, rows: Tensor | None) -> Tensor:
        """h [T, D] -> [T, D], or [R, D] when `rows` names those wanted (the last block).

        Rows are dropped as soon as attention has read the others.
        """
        o = self.attn(self.attn_norm(h), batch, table)
        if rows is not None:
            h, o = ops.select_rows(h, rows), ops.select_rows(o, rows)
        return self.finish(h, o)

    def finish(self, h: Tensor, o: Tensor) -> Tensor:
        """What follows attention, row by row: h [R, D], its output o [R, H * C] -> [R, D]."""
        if self.post_attn_norm is None or self.post_mlp_norm is None:
            h = self.attn.out(o, h)
            out: Tensor = self.mlp(self.mlp_norm(h), h)
            return out
        h = ops.add(h, self.post_attn_norm(self.attn.out(o)))
        return ops.add(h, self.post_mlp_norm(self.mlp(self.mlp_norm(h), None)))

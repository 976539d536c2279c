"""SwiftKV (arXiv 2410.03960): the later layers' keys and values from one hidden state.

x_k, the output of layer k - 1, is normed once; every later layer's keys and values are
projections of it, so a prompt token needs no more than the first k layers and these projections:

    s = norm_swiftkv(x_k)
    q_i = q_proj_swiftkv_i(attn_norm_i(h_i))       i = k .. L - 1
    K, V = kv_proj_swiftkv_j(s)                    j = the first layer of i's group

Groups (AcrossKV) are consecutive layers that share one pair of keys and values. A cached key is
already rotated, so a group ends early where the rotation changes (Gemma 3's local layers, SmolLM3's
unrotated ones). A key's head norm, where a family has one, is that of its group's first layer.
Everything else is the original model's.

Training (kv=None) runs every row through every layer. Serving runs all rows through the first k,
writes the keys and values of all groups in one projection and one bulk write, and takes only the
output rows through the rest. The values of a row are the same, since they depend on no other row
but through keys and values. The projections of all groups are one stacked weight: 15 layers of
SmolLM2-135M read s once, and a weight of few rows (384 a layer there) would not fill the threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sterna.core.errors import UnsupportedModelError
from sterna.kernels import ops
from sterna.model.batch import Batch, KVView
from sterna.model.config import ModelConfig
from sterna.model.decoder import Decoder
from sterna.model.layers import Attention, Block, Linear, new_norm
from sterna.model.swiftkv_config import owners


class SwiftAttention(Attention):
    """Attention whose queries and whose keys and values come from different hidden states."""

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        is_owner: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(config, layer_idx, dtype, torch.device("meta"))
        del self.qkv
        self.to_empty(device=device)
        num_heads, _, head_dim = self.heads
        size = (config.hidden_size, num_heads * head_dim)
        self.q_swiftkv = Linear(*size, config.has_qkv_bias, dtype, device)
        self.is_owner = is_owner
        if not is_owner:
            self.k_norm = None

    def forward(self, x: Tensor, batch: Batch, table: Tensor | None) -> Tensor:
        """Refused: a layer of this kind needs the keys and values too, see SwiftKVDecoder."""
        raise UnsupportedModelError("a SwiftKV layer runs inside its decoder only")

    def attend_to(
        self, x: Tensor, kv: Tensor, batch: Batch, table: Tensor | None, k_norm: Tensor | None
    ) -> Tensor:
        """Training: normed x [T, D], kv [T, 2G * C] before rotation -> [T, H * C]."""
        qkv = torch.cat([self.q_swiftkv(x), kv], dim=-1)
        options = (table, self._q_norm, k_norm, self.eps, self.has_unit_offset)
        rotated = ops.rope(qkv, batch.positions, *options, *self.heads)
        return self.attend_batch(rotated, batch)

    def attend_paged(self, x: Tensor, batch: Batch, cache: Tensor, table: Tensor | None) -> Tensor:
        """Serving: normed x [R, D] of the output rows -> [R, H * C], over a stored cache."""
        assert batch.kv is not None, "training has no cache"
        num_heads, _, head_dim = self.heads
        options = (table, self._q_norm, self.eps, self.has_unit_offset, num_heads, head_dim)
        q = ops.rope_queries(self.q_swiftkv(x), batch.positions, batch.output_rows, *options)
        return ops.paged_attention(
            q,
            cache,
            batch.kv.block_tables,
            batch.row_starts,
            batch.context_lens,
            *self.heads,
            batch.kv.block_size,
            self.scale,
            self.window,
            self.softcap,
        )

    @property
    def _q_norm(self) -> Tensor | None:
        return self.q_norm.weight if self.q_norm is not None else None


class SwiftKVDecoder(Decoder):
    """A decoder whose layers from k on read keys and values of x_k; `config.swiftkv` says k.

    Serving refuses nothing but log-probs of prompt tokens: their rows do not reach the head.
    """

    skips_prompt_rows = True

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rope_device: torch.device | str | None = None,
    ) -> None:
        assert config.swiftkv is not None, "a plain config makes a Decoder"
        super().__init__(config, dtype, device, rope_device)
        device = torch.device(device)
        self.swift = config.swiftkv
        self.owners = owners(config, self.swift)
        self.groups = tuple(dict.fromkeys(self.owners.values()))  # the first layer of each
        for i, owner in self.owners.items():
            self.block(i).attn = SwiftAttention(config, i, owner == i, dtype, device)
        self.norm_swiftkv = new_norm(config, dtype, device)
        self._kv_width = 2 * config.num_key_value_heads * config.head_dim
        size = (config.hidden_size, len(self.groups) * self._kv_width)
        self.kv_swiftkv = Linear(*size, config.has_qkv_bias, dtype, device)

    def block(self, layer_idx: int) -> Block:
        """The block of a layer."""
        found = self.layers[layer_idx]
        assert isinstance(found, Block)
        return found

    def attention(self, layer_idx: int) -> SwiftAttention:
        """The attention of a layer from k on."""
        found = self.block(layer_idx).attn
        assert isinstance(found, SwiftAttention)
        return found

    def first(self, batch: Batch) -> Tensor:
        """x_k [T, D]: what the first k layers, which the original model shares, make of a batch."""
        return self._first_layers(self.embedded(batch), batch)

    def later(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Training: x_k [T, D] -> (output of layer L - 2 [T, D], of the last one [T or R, D])."""
        kv = self.kv_swiftkv(self.norm_swiftkv(x)).split(self._kv_width, dim=1)
        kv_of = dict(zip(self.groups, kv, strict=True))
        before, h, last = x, x, len(self.layers) - 1
        for i, owner in self.owners.items():
            block = self.block(i)
            before = h
            table, k_norm = self.rope_of(i), self._k_norm(owner)
            o = self.attention(i).attend_to(block.attn_norm(h), kv_of[owner], batch, table, k_norm)
            if i == last and batch.output_rows is not None:
                h, o = (ops.select_rows(rows, batch.output_rows) for rows in (h, o))
            h = block.finish(h, o)
        return before, h

    def new_kv_layers(
        self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """One cache tensor for each of the first k layers, then one a group."""
        count = self.swift.num_key_value_layers + len(self.groups)
        return tuple(self.new_kv_layer(num_blocks, block_size, dtype) for _ in range(count))

    def _walk(self, h: Tensor, batch: Batch) -> Tensor:
        x = self._first_layers(h, batch)
        return self.later(x, batch)[1] if batch.kv is None else self._served(x, batch, batch.kv)

    def _first_layers(self, h: Tensor, batch: Batch) -> Tensor:
        for i in range(self.swift.num_key_value_layers):
            h = self.layers[i](h, batch, self.rope_of(i), None)
        return h

    def _served(self, x: Tensor, batch: Batch, kv: KVView) -> Tensor:
        """x_k [T, D] -> the last layer's output [R, D], with all keys and values stored."""
        caches = kv.layers[self.swift.num_key_value_layers :]
        self._store(x, batch, kv, caches)
        h = x if batch.output_rows is None else ops.select_rows(x, batch.output_rows)
        cache_of = dict(zip(self.groups, caches, strict=True))
        for i, owner in self.owners.items():
            block, table = self.block(i), self.rope_of(i)
            o = self.attention(i).attend_paged(block.attn_norm(h), batch, cache_of[owner], table)
            h = block.finish(h, o)
        return h

    def _store(self, x: Tensor, batch: Batch, kv: KVView, caches: tuple[Tensor, ...]) -> None:
        config = self.config
        ops.store_kv(
            self.kv_swiftkv(self.norm_swiftkv(x)),
            batch.positions,
            [self.rope_of(i) for i in self.groups],
            [self._k_norm(i) for i in self.groups],
            config.rms_norm_eps,
            config.family.has_unit_offset,
            config.num_key_value_heads,
            config.head_dim,
            caches,
            kv.slots,
            kv.block_size,
        )

    def _k_norm(self, owner: int) -> Tensor | None:
        norm = self.attention(owner).k_norm
        return None if norm is None else norm.weight


def new_decoder(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rope_device: torch.device | str | None = None,
) -> Decoder:
    """The decoder of a config, plain or SwiftKV; see Decoder for the arguments."""
    kind = Decoder if config.swiftkv is None else SwiftKVDecoder
    return kind(config, dtype, device, rope_device)

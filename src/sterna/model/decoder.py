"""The one decoder: every family, in training, rollout and serving.

h = embed(tokens)
for block in layers: h = block(h)
hidden = norm(h); logits = head(hidden)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sterna.core.errors import DataError
from sterna.kernels import ops
from sterna.model.batch import Batch
from sterna.model.config import ModelConfig
from sterna.model.heads import Embedding, LMHead, PositionEmbedding
from sterna.model.layers import Attention, Block, GatedLinear, Linear, new_norm
from sterna.model.rope import rope_table, short_rows
from sterna.model.rope_config import RopeConfig
from sterna.parallel.ulysses import ParallelPlan

# (decoder, embedded h [T, D], batch) -> the last block's output, or None: take the usual way
Walk = Callable[["Decoder", Tensor, Batch], Tensor | None]


class RopeSettings(Protocol):
    """What rope tables are made from."""

    @property
    def num_positions(self) -> int:
        """Longest sequence."""
        ...

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotations in use."""
        ...


class RopeTables(nn.Module):
    """The float32 rope tables of a model; they follow its device but never its dtype."""

    def __init__(self, config: RopeSettings, device: torch.device) -> None:
        super().__init__()
        length = config.num_positions
        self.tables = [rope_table(rope, length).to(device) for rope in config.ropes]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RopeTables:
        self.tables = [table.to(fn(table[:0]).device) for table in self.tables]
        return self


class Decoder(nn.Module):
    """A causal language model on flat batches.

    `device` "meta" makes parameters without storage, to be filled by `weights.assign`.
    """

    embed_positions: PositionEmbedding | None
    lm_head: LMHead | None
    skips_prompt_rows = False  # whether served prompt tokens stop before the last layer

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rope_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.dtype = dtype
        self.embed_tokens = Embedding(config, config.vocab_size, dtype, device)
        offset = config.family.position_offset
        self.embed_positions = (
            None if offset is None else PositionEmbedding(config, offset, dtype, device)
        )
        self.layers = nn.ModuleList(
            Block(config, i, dtype, device) for i in range(config.num_hidden_layers)
        )
        self.norm = new_norm(config, dtype, device)
        self.lm_head = None if config.tie_word_embeddings else LMHead(config, dtype, device)
        self.ropes = RopeTables(config, torch.device(rope_device or device))
        self.walk: Walk | None = None  # another way through the blocks, for training

    def hidden(self, batch: Batch) -> Tensor:
        """Final normed hidden states [R, D] of batch.output_rows, or [T, D] when that is None.

        DataError for a token or position the model has no row for, in a batch without a cache on
        the CPU. The engine refuses such requests before they make a batch.
        """
        if batch.kv is None and batch.tokens.device.type == "cpu":
            self._check_range(batch)
        h = self.embedded(batch)
        walked = self.walk(self, h, batch) if self.walk is not None else None
        out: Tensor = self.norm(self._walk(h, batch) if walked is None else walked)
        return out

    def _check_range(self, batch: Batch) -> None:
        """Kernels read tables unchecked: a row beyond the end would be somebody else's memory."""
        rows = min((table.shape[0] for table in self.ropes.tables), default=None)
        if self.embed_positions is not None:
            rows = self.config.num_positions
        limits = (("token", batch.tokens, self.config.vocab_size),
                  ("position", batch.positions, rows))  # fmt: skip
        for name, values, limit in limits:
            if limit is None or not len(values):
                continue
            low, high = (int(x) for x in torch.aminmax(values))
            if low < 0 or high >= limit:
                raise DataError(
                    f"the batch holds {name} {high if high >= limit else low}, the model has "
                    f"{name}s 0 to {limit - 1}; use documents (a vocabulary) that fit the model"
                )

    def _walk(self, h: Tensor, batch: Batch) -> Tensor:
        last = len(self.layers) - 1
        for layer_idx, block in enumerate(self.layers):
            rows = batch.output_rows if layer_idx == last else None
            h = block(h, batch, self.rope_of(layer_idx), rows)
        return h

    def embedded(self, batch: Batch) -> Tensor:
        """What the first block reads: [T, D]."""
        h: Tensor = self.embed_tokens(batch.tokens)
        if self.embed_positions is not None:
            h = ops.add(h, self.embed_positions(batch.positions))
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> float32 logits [R, V]."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return head.logits(hidden, self.config.logits_softcap)

    def head_weight(self) -> Tensor:
        """The weight of the logits [V, D]: the embedding's where they are tied."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return head.weight

    def head_bias(self) -> Tensor | None:
        """The bias of the logits; no family of the table has one."""
        return None

    @property
    def reads_shared_keys(self) -> bool:
        """Whether a training batch may have `shared` prefixes: not on another way, nor spread."""
        plans = (m.plan for m in self.modules() if isinstance(m, Attention))
        return self.walk is None and all(plan is None for plan in plans)

    def set_parallel(self, plan: ParallelPlan | None) -> None:
        """Training batches are slices of rows from now on, spread as `plan` says."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.plan = plan

    @property
    def prompt_layers(self) -> str:
        """For people: how many layers a served prompt token runs."""
        swift, count = self.config.swiftkv, self.config.num_hidden_layers
        return f"all {count}" if swift is None else swift.line(count)

    def forward(self, batch: Batch) -> Tensor:
        """float32 logits [R, V] of the batch."""
        return self.logits(self.hidden(batch))

    def new_kv_layers(
        self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """One zeroed cache tensor a layer, in the layout of the back end in use.

        `dtype`: int8 or float8_e4m3fn for a quantised cache; None = the model's.
        """
        return tuple(self.new_kv_layer(num_blocks, block_size, dtype) for _ in self.layers)

    def new_kv_layer(
        self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """One of `new_kv_layers`."""
        config = self.config
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        return ops.new_kv_cache(*shape, dtype or self.dtype, self.device)

    def rope_row_offset(self, total_len: int) -> int:
        """What to add to the positions of a sequence that may grow to `total_len` tokens.

        0, but for LongRope sequences beyond the original length, which use the long table.
        Decided once a sequence: its cached keys keep the rotation they were stored with.
        """
        ropes = self.config.ropes
        if not ropes or ropes[0].rope_type != "longrope":
            return 0
        is_long = total_len > ropes[0].original_max_positions
        return short_rows(ropes[0], self.config.num_positions) if is_long else 0

    def prepare_inference(self) -> None:
        """Replace weights by the packed ones of the back end; there is no way back."""
        for module in self.modules():
            if isinstance(module, Linear | GatedLinear | LMHead):
                module.prepare_inference()
        if self.lm_head is None:
            self.embed_tokens.prepare_inference()
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.norm.parameters()).device

    def rope_of(self, layer_idx: int) -> Tensor | None:
        """The rope table of a layer; None = it rotates nothing."""
        rope_idx = self.config.layer_ropes[layer_idx]
        return self.ropes.tables[rope_idx] if rope_idx >= 0 else None

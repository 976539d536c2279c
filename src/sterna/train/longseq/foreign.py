"""Checkpoints and tiles for models behind transformers: each layer is cut at its attention.

A transformers layer is one forward: norms, projections, attention, MLP and residuals in its own
order. Its attention goes through the registry (model/hf.py), and there it can be cut without
knowing the rest:

    front(h)     the layer's forward, ended at attention by an exception that carries q, k, v
    back(h, o)   the layer's forward, with o in the place of what attention would return

Both are the layer's own code on a tile of rows, so blocks.py does the rest, and no pattern of
module names is needed. back computes q, k, v for nothing and frees them at once: 11 % of the
layer's weights of Llama-8B, in the tiled forward and once in the backward. A tile is right only
where the layer works row by row beside its attention: foreign_proof.py proves that before the first
batch.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sterna.core.errors import UnsupportedModelError
from sterna.model.batch import Batch
from sterna.model.hf import AttentionContext, AttentionOptions, Captured, HFDecoder
from sterna.train.longseq.blocks import Halves, LongBlock, checkpointed
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.store import Store


@dataclass(frozen=True, slots=True)
class Call:
    """What a layer is given beside its hidden states, on one batch of T tokens."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    starts: Tensor  # of the whole row's documents
    num_rows: int  # of this rank


@dataclass(slots=True)
class ForeignHalves:
    """A transformers layer on one batch. See Halves."""

    layer: nn.Module
    context: AttentionContext
    call: Call
    options: AttentionOptions | None = None  # as the layer asks for them, known after `front`

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """See Halves: numbers of the rows, by which arguments are cut."""
        return (torch.arange(self.call.num_rows, device=self.call.starts.device),)

    def front(self, h: Tensor, *rows: Tensor) -> Tensor:
        """See Halves."""
        self.context.captures = True
        try:
            self._forward(h, rows[0])
        except Captured as captured:
            self.options = captured.options
            return captured.qkv
        finally:
            self.context.captures = False
        raise UnsupportedModelError(
            f"{type(self.layer).__name__} did not attend through transformers' registry; switch "
            "[longseq] checkpoints and tiles off"
        )

    def attend(self, qkv: Tensor) -> Tensor:
        """See Halves."""
        assert self.options is not None
        return self.context.attend(qkv, self.call.starts, self.options)

    def back(self, h: Tensor, o: Tensor, *rows: Tensor) -> Tensor:
        """See Halves."""
        self.context.given = o
        try:
            return self._forward(h, rows[0])
        finally:
            self.context.given = None

    def _forward(self, h: Tensor, rows: Tensor) -> Tensor:
        args, kwargs = self.call.args, self.call.kwargs
        if len(rows) < self.call.num_rows:
            args, kwargs = (cut(x, rows, self.call.num_rows) for x in (args, kwargs))
        return hidden_of(class_forward(self.layer, h[None], *args, **kwargs))[0]


class ForeignBlock(LongBlock):
    """A transformers layer's way through a row; `table` of the methods is its Call."""

    def __init__(
        self,
        layer: nn.Module,
        settings: LongseqSection,
        store: Store,
        context: AttentionContext,
        num_outputs: int = 0,
    ) -> None:
        """`num_outputs`: the length of the tuple the layer returns, 0 = the tensor alone."""
        super().__init__(layer, settings, store)
        self.context = context
        self.num_outputs = num_outputs

    def halves(self, batch: Batch | None, table: Any) -> Halves:
        """See LongBlock."""
        return ForeignHalves(self.block, self.context, table)

    def run(self, h: Tensor, batch: Batch | None, table: Any) -> Tensor:
        """See LongBlock; without tiles the layer runs as it is.

        Not where adapters drop inputs: cut in two, as the backward runs it, it draws more numbers.
        """
        if self.settings.mlp_tile or self.settings.attention_tile or _drops(self.block):
            return super().run(h, batch, table)
        with torch.no_grad():
            return hidden_of(class_forward(self.block, h[None], *table.args, **table.kwargs))[0]

    def call(self, h: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """What a forward is given beside h. UnsupportedModelError where that needs a gradient."""
        assert self.context.starts is not None
        if any(t.requires_grad for t in tensors_in((args, kwargs))):
            raise UnsupportedModelError(
                f"{type(self.block).__name__} is given tensors that need gradients beside its "
                "hidden states, which [longseq] would lose; switch its checkpoints and tiles off"
            )
        return Call(args, kwargs, self.context.starts, len(h))

    def output(self, h: Tensor) -> Any:
        """h [T, D] in the form in which the layer returns it."""
        return (h[None], *(None,) * (self.num_outputs - 1)) if self.num_outputs else h[None]


class Segment:
    """Blocks with one checkpoint: all but the last only note what they are given."""

    def __init__(self, blocks: Sequence[ForeignBlock]) -> None:
        self._blocks = list(blocks)
        self._calls: list[Call] = []
        self._h: Tensor | None = None

    def forward_of(self, index: int) -> Callable[..., Any]:
        """The forward of the block at `index`, to be bound to its layer."""

        def forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            block, own = self._blocks[index], hidden_states[0]
            if index == 0:
                self._calls, self._h = [], own
            self._calls.append(block.call(own, args, kwargs))
            if index + 1 < len(self._blocks):
                return block.output(own)
            h, self._h = self._h, None
            assert h is not None
            return block.output(_walk(self._blocks, h, self._calls))

        return forward


def apply_foreign(decoder: HFDecoder, settings: LongseqSection, store: Store) -> None:
    """Train a model behind transformers in the memory `settings` allow.

    Call it before weights are sharded or attention is spread. UnsupportedModelError for a model
    whose layers cannot be cut, with the reason.
    """
    from sterna.train.longseq.foreign_proof import prove_layers, prove_walk

    if not (settings.checkpoint or settings.mlp_tile or settings.attention_tile):
        return
    outputs = prove_layers(decoder, settings)
    layers = zip(decoder.layers, outputs, strict=True)
    blocks = [ForeignBlock(x, settings, store, decoder.context, n) for x, n in layers]
    with prove_walk(decoder):
        size = settings.every if settings.checkpoint else 1
        for i in range(0, len(blocks), size):
            segment = Segment(blocks[i : i + size])
            for k, block in enumerate(blocks[i : i + size]):
                block.block.forward = types.MethodType(segment.forward_of(k), block.block)


def _drops(layer: nn.Module) -> bool:
    rates = (getattr(m, "dropout", 0.0) for m in layer.modules() if m.training)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _walk(blocks: list[ForeignBlock], h: Tensor, calls: list[Call]) -> Tensor:
    if blocks[0].settings.checkpoint:
        return checkpointed(blocks, h, None, calls)
    return blocks[0].in_tiles(h, None, calls[0])


def class_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, whatever was put in its place on the instance."""
    forward: Any = type(layer).forward
    return forward(layer, *args, **kwargs)


def hidden_of(output: Any) -> Tensor:
    """The hidden states [1, T, D] of what a layer returned."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def cut(value: Any, rows: Tensor, num_rows: int) -> Any:
    """Arguments of some rows: tensors [1, T, ...] and [T] are cut, others stay.

    UnsupportedModelError for one that has T in another place: it may be rows or not.
    """
    return map_tensors(value, lambda x: _cut_tensor(x, rows, num_rows))


def _cut_tensor(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    if x.dim() >= 2 and x.shape[:2] == (1, num_rows):
        return x.index_select(1, rows)
    if x.shape == (num_rows,):
        return x.index_select(0, rows)
    if num_rows in x.shape:
        raise UnsupportedModelError(
            f"a layer is given a tensor of shape {tuple(x.shape)} for {num_rows} tokens, whose "
            "rows [longseq] cannot tell; switch its tiles off"
        )
    return x


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor in its tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in tuples, lists and dicts."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(value, note)
    return found

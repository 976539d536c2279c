"""What autograd keeps of a transformers layer, counted by running it: for the planner.

Works on the meta device too, where nothing is computed: attention is left out (its result is
given), so only the family's own code runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sterna.model.batch import Batch
from sterna.model.hf import Captured, HFDecoder
from sterna.model.hf_checks import probe
from sterna.train.longseq.foreign import class_forward, map_tensors

_TOKENS = 64


def graph_widths(decoder: HFDecoder) -> tuple[int, int] | None:
    """Numbers a token that the first layer keeps before its attention, and after it.

    In numbers of the model's dtype; weights and the attention's own inputs are not among them. None
    where the layer cannot run without values, as with experts on the meta device.
    """
    layer, context = decoder.layers[0], decoder.context
    batch = probe((_TOKENS,), decoder.config.vocab_size, decoder.device)
    width = decoder.config.num_attention_heads * _head_dim(decoder)
    try:
        h, args, kwargs = _arguments(decoder, batch, width)
        context.given = torch.zeros(_TOKENS, width, dtype=decoder.dtype, device=decoder.device)
        whole = _kept(layer, lambda: class_forward(layer, h, *args, **kwargs))
        context.given, context.captures = None, True
        front = _kept(layer, lambda: class_forward(layer, h, *args, **kwargs))
    except (RuntimeError, NotImplementedError):  # data-dependent code on the meta device
        return None
    finally:
        context.given, context.captures = None, False
    unit = _TOKENS * decoder.dtype.itemsize
    return front // unit, (whole - front) // unit


def _head_dim(decoder: HFDecoder) -> int:
    hf = decoder.config.hf
    return int(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)


@torch.no_grad()
def _arguments(decoder: HFDecoder, batch: Batch, width: int) -> tuple[Tensor, Any, Any]:
    """What the model gives its first layer."""
    found: list[tuple[Any, Any]] = []

    def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args, dict(kwargs)))

    hook = decoder.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    context = decoder.context
    context.starts = batch.query_starts
    context.given = torch.zeros(_TOKENS, width, dtype=decoder.dtype, device=decoder.device)
    try:
        decoder.model.base_model(
            input_ids=batch.tokens[None].long(), position_ids=batch.positions[None].long(),
            use_cache=False,
        )  # fmt: skip
    finally:
        hook.remove()
        context.given = None
    args, kwargs = found[0]
    h: Tensor = args[0] if args else kwargs.pop("hidden_states")
    return h.detach().requires_grad_(), args[1:], map_tensors(kwargs, lambda x: x.detach())


def _kept(layer: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd keeps of a run, without weights."""
    held: list[Tensor] = []  # keeps storages apart: a freed one's id would come again

    def note(x: Tensor) -> Tensor:
        held.append(x)
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with suppress(Captured), torch.enable_grad(), hooks:
        run()
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held}
    own = {p.untyped_storage()._cdata for p in layer.parameters()}
    return sum(size for key, size in storages.items() if key not in own)

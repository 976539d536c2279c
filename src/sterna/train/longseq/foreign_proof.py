"""Proof, before the first batch, that a transformers model may be cut into tiles and checkpoints.

Each kind of layer is copied in float64 and run on a probe of two short documents: once as it is,
and once cut at its attention with every enabled half in two tiles. Output, gradient of the input
and gradient of every weight have to agree to 1e-6. The float64 is there so that nothing but the cut
can differ; layers with quantised weights stay in the model's dtype, with its tolerance.

Layers with experts are refused for mlp_tile whatever a probe says: which rows share an expert
depends on the tile, so a capacity limit, or noise in the routing, shows only on rows longer than
any probe; and every tile would hold a gradient of all experts. Checkpoints and attention_tile are
theirs too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sterna.core.errors import UnsupportedModelError
from sterna.model.batch import Batch
from sterna.model.hf import AttentionContext, HFDecoder, redirect
from sterna.model.hf_checks import TOLERANCE, probe
from sterna.quant.linear import QuantModule
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.foreign import (
    Call,
    ForeignBlock,
    class_forward,
    hidden_of,
    map_tensors,
)
from sterna.train.longseq.store import MemoryStore
from sterna.train.longseq.tiles import RandomState

LIMIT = 1e-6  # of float64 copies; norms and softmaxes round to float32 inside (6e-8)
_EXPERTS = re.compile(r"moe|expert|router", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one layer was given and returned on the probe."""

    h: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def experts_of(decoder: HFDecoder) -> str:
    """The class of the first module that routes rows to experts; "" when there is none."""
    modules = (module for layer in decoder.layers for module in layer.modules())
    names = (type(module).__name__ for module in modules)
    return next((name for name in names if _EXPERTS.search(name)), "")


def prove_layers(decoder: HFDecoder, settings: LongseqSection) -> list[int]:
    """Each layer's number of outputs in a tuple, 0 = a tensor alone.

    UnsupportedModelError naming the layer and the reason where the proof fails.
    """
    experts = experts_of(decoder)
    if experts and settings.mlp_tile:
        raise UnsupportedModelError(
            f"longseq.mlp_tile = {settings.mlp_tile} is refused for "
            f"{type(decoder.model).__name__}: its {experts} sends rows to experts, which a tiny "
            "input cannot prove to be done row by row at every length; set longseq.mlp_tile = 0 "
            "(checkpoints and attention_tile work)",
            param="longseq.mlp_tile",
        )
    batch, seen = _record(decoder)
    proven: set[str] = set()
    for layer, what in zip(decoder.layers, seen, strict=True):
        kind = _kind(layer)
        if kind not in proven:
            _prove(decoder, layer, what, batch, settings)
            proven.add(kind)
    return [len(what.output) if isinstance(what.output, tuple) else 0 for what in seen]


def _kind(layer: nn.Module) -> str:
    """Alike for layers of the same code: modules, sizes, and what was put on single ones."""
    own = [id(vars(m)["forward"]) for m in layer.modules() if "forward" in vars(m)]
    hooked = [n for n, m in layer.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    return f"{layer!r} {getattr(layer, 'attention_type', '')} {own} {hooked}"


@contextmanager
def prove_walk(decoder: HFDecoder) -> Iterator[None]:
    """Around the switch: the model's hidden states have to be the same after it."""
    batch = _probe(decoder)
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()  # dropout of adapters would differ
    with torch.no_grad():
        before = decoder.hidden(batch)
        yield
        error = _error(decoder.hidden(batch), before, 0.0)
    for module, mode in modes:
        module.training = mode
    if not error <= TOLERANCE[decoder.dtype]:
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__}: with [longseq] its hidden states differ by "
            f"{error:.1e} (allowed {TOLERANCE[decoder.dtype]:.0e}): it computes something between "
            "its layers; set longseq.every = 1 or leave [longseq] out"
        )


def _probe(decoder: HFDecoder) -> Batch:
    return probe((11, 6), decoder.config.vocab_size, decoder.device)


@torch.no_grad()
def _record(decoder: HFDecoder) -> tuple[Batch, list[_Seen]]:
    """Run the probe and note what each layer is given and returns."""
    seen: list[_Seen] = []

    def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        rest = dict(kwargs)
        h = args[0] if args else rest.pop("hidden_states")
        seen.append(_Seen(h, args[1:], rest, output))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in decoder.layers]
    batch = _probe(decoder)
    try:
        decoder.hidden(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return batch, seen


def _prove(
    decoder: HFDecoder, layer: nn.Module, seen: _Seen, batch: Batch, settings: LongseqSection
) -> None:
    name = type(layer).__name__
    if isinstance(seen.output, tuple) and any(x is not None for x in seen.output[1:]):
        raise UnsupportedModelError(
            f"{name} returns more than hidden states, which [longseq] would lose; switch its "
            "checkpoints and tiles off"
        )
    is_quantised = any(isinstance(module, QuantModule) for module in layer.modules())
    dtype = decoder.dtype if is_quantised else torch.float64
    limit = TOLERANCE[decoder.dtype] if is_quantised else LIMIT
    copied, context = _copy(decoder, layer, batch, dtype)
    h, args, kwargs = map_tensors((seen.h, seen.args, seen.kwargs), lambda x: _cast(x, dtype))
    call = Call(args, kwargs, batch.query_starts, h.shape[1])
    upstream = torch.randn(h[0].shape, generator=torch.Generator().manual_seed(0)).to(h)
    block = ForeignBlock(copied, _small(settings, h.shape[1]), MemoryStore(), context)
    expected, found = _plain(block, h[0], call, upstream), _cut(block, h[0], call, upstream)
    floor = 1e-3 * max(float(x.abs().max()) for x in expected[1:])
    pairs = zip(found, expected, strict=True)
    errors = [_error(a, b, floor) for a, b in pairs]
    if not max(errors) <= limit:
        where = (errors[0], max(errors[1:]))
        raise UnsupportedModelError(
            f"{name} does not work row by row beside its attention: cut in two tiles its output "
            f"differs by {where[0]:.1e} and its gradients by {where[1]:.1e} (allowed {limit:.0e}); "
            "set longseq.mlp_tile and attention_tile to 0, or leave [longseq] out"
        )


def _copy(
    decoder: HFDecoder, layer: nn.Module, batch: Batch, dtype: torch.dtype
) -> tuple[nn.Module, AttentionContext]:
    """The layer in another dtype, attending with a context of its own."""
    context = AttentionContext(starts=batch.query_starts)
    copied = copy.deepcopy(layer, {id(decoder.context): context})
    redirect(copied, context)
    return copied.to(dtype).eval(), context


def _plain(block: ForeignBlock, h: Tensor, call: Call, upstream: Tensor) -> list[Tensor]:
    """[output, gradient of h, gradients of the weights] of the layer as it is."""
    leaf, weights = h.clone().requires_grad_(), block.weights()
    with torch.enable_grad():
        out = hidden_of(class_forward(block.block, leaf[None], *call.args, **call.kwargs))[0]
    inputs = [leaf, *weights]
    grads = torch.autograd.grad(out, inputs, upstream, allow_unused=True)
    return [out.detach(), *(_or_zero(g, x) for g, x in zip(grads, inputs, strict=True))]


def _cut(block: ForeignBlock, h: Tensor, call: Call, upstream: Tensor) -> list[Tensor]:
    """The same of the layer cut at its attention and into tiles."""
    out = block.run(h, None, call)
    d_h, grads = block.backward(h, None, call, upstream, RandomState.now(h))
    pairs = zip(grads, block.weights(), strict=True)
    return [out, d_h, *(_or_zero(g, w) for g, w in pairs)]


def _small(settings: LongseqSection, num_rows: int) -> LongseqSection:
    """The settings with two uneven tiles where there are any."""
    tile = num_rows // 2 + 1
    update = {
        "mlp_tile": tile if settings.mlp_tile else 0,
        "attention_tile": tile if settings.attention_tile else 0,
    }
    return settings.model_copy(update=update)


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _error(value: Tensor, reference: Tensor, floor: float) -> float:
    scale = max(float(reference.abs().max()), floor)
    difference = float((value.double() - reference.double()).abs().max())
    return difference / scale if scale > 0 else difference

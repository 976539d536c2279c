"""AdamW over model weights of any dtype, its states in 32, 16 or 8 bits.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The arithmetic is torch's fused float32 kernel in every case; storage decides what a slice is
loaded from and rounded to:

    weights   float32: in place. bfloat16 with a master: the float32 master is updated and the
              weight is its nearest bfloat16. Without: the update is rounded stochastically.
    moments   float32: in place. bfloat16: rounded stochastically. 8bit: float8 e4m3 times a
              float32 scale for each block of 256 (as in arXiv 2110.02861, with e4m3's own exponents
              for its dynamic codes), rounded stochastically; v is kept as its root, never below the
              least code, so that a root that rounds to zero cannot make a step explode.

Bytes a bfloat16 weight, gradient excluded: 2 + 4 + 8 = 14; 8-bit states 8.03; bfloat16 states
without a master 6; 8-bit states without one 4.03.

Weights are walked in slices of 2^20 numbers, so temporaries stay small (24 MB) and in the cache.
Under FSDP2 each rank walks its own shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sterna.core.errors import ConfigError
from sterna.parallel.fsdp import local
from sterna.train import rounding
from sterna.train.config import OptimSection
from sterna.train.gradients import Gradients

SLICE = 1 << 20
BLOCK = 256

State = dict[str, dict[str, Tensor]]


@dataclass(slots=True)
class _Slot:
    """One weight and what is kept of it, all flat: n numbers of this rank."""

    name: str
    weight: nn.Parameter
    decay: float
    states: dict[str, Tensor]


class AdamW:
    """The optimizer of the trainer. `named`: (name, parameter) of the weights to train."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], settings: OptimSection, seed: int = 0
    ) -> None:
        """ConfigError when every weight is frozen."""
        self._settings = settings
        self._seed = seed
        self._slots = [self._new_slot(name, p) for name, p in named if p.requires_grad]
        if not self._slots:
            raise ConfigError("no weight is to be trained; every parameter is frozen")

    def _new_slot(self, name: str, weight: nn.Parameter) -> _Slot:
        flat = local(weight.detach()).reshape(-1)
        decay = self._settings.weight_decay if is_decayed(name, weight) else 0.0
        states = _new_moments(flat, self._settings.states)
        if self._has_master(weight):
            states["master"] = flat.float()
        return _Slot(name, weight, decay, states)

    def _has_master(self, weight: Tensor) -> bool:
        return self._settings.master and weight.dtype != torch.float32

    @torch.no_grad()
    def step(self, grads: Gradients, step: int, lr: float, grad_scale: float = 1.0) -> None:
        """Update every weight that has a gradient. `step` counts from 0; gradients are multiplied
        by `grad_scale` first (clipping) and forgotten after."""
        for index, slot in enumerate(self._slots):
            found = grads.of(slot.weight)
            if found is None:
                continue
            grad = found.reshape(-1)
            source = rounding.generator(self._seed, step, index)
            for part in _slices(grad.numel()):
                self._step_slice(slot, part, grad[part], step, lr, grad_scale, source)
        grads.clear()

    def _step_slice(
        self,
        slot: _Slot,
        part: slice,
        grad: Tensor,
        step: int,
        lr: float,
        grad_scale: float,
        source: torch.Generator,
    ) -> None:
        weight = local(slot.weight.detach()).view(-1)[part]
        w = slot.states["master"][part] if "master" in slot.states else weight.float()
        moments = _load(slot.states, part)
        g = grad.float() if grad_scale == 1.0 else grad.float().mul_(grad_scale)
        self._fused(w, g, moments, step, lr, slot.decay)
        _store(slot.states, part, moments, source)
        if "master" in slot.states:
            weight.copy_(w)
        elif weight.dtype != torch.float32:
            weight.copy_(rounding.to_bfloat16(w, rounding.low(rounding.noise(w, source))))

    def _fused(
        self,
        w: Tensor,
        g: Tensor,
        moments: tuple[Tensor, Tensor],
        step: int,
        lr: float,
        decay: float,
    ) -> None:
        settings = self._settings
        adamw(
            [w], [g], [moments[0]], [moments[1]], [],
            [torch.tensor(float(step), device=w.device)],
            fused=True, amsgrad=False, beta1=settings.beta1, beta2=settings.beta2, lr=lr,
            weight_decay=decay, eps=settings.eps, maximize=False,
        )  # fmt: skip

    def state_dict(self) -> State:
        """Name -> state tensors of this rank, themselves and not copies."""
        return {slot.name: dict(slot.states) for slot in self._slots}


def is_decayed(name: str, weight: Tensor) -> bool:
    """Whether weight decay applies: to matrices, never to norms, biases and other vectors."""
    return weight.dim() >= 2 and not name.endswith("bias")


def _slices(size: int) -> Iterator[slice]:
    for begin in range(0, size, SLICE):
        yield slice(begin, min(begin + SLICE, size))


def _new_moments(flat: Tensor, kind: str) -> dict[str, Tensor]:
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "8bit": torch.float8_e4m3fn,
    }
    n, device = flat.numel(), flat.device
    states = {
        key: torch.zeros(n, dtype=torch.uint8 if kind == "8bit" else dtypes[kind], device=device)
        for key in ("m", "v")
    }
    if kind == "8bit":  # codes as bytes: checkpoints and copies know uint8 everywhere
        blocks = -(-n // BLOCK)
        states |= {f"{key}_scale": torch.zeros(blocks, device=device) for key in ("m", "v")}
    return states


def _load(states: Mapping[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
    """float32 m and v of a slice; the stored tensors themselves when they are float32."""
    m, v = states["m"][part], states["v"][part]
    if "m_scale" not in states:
        return m.float(), v.float()
    blocks = _blocks(part)
    root = _decode(v, states["v_scale"][blocks])
    return _decode(m, states["m_scale"][blocks]), root.square_()


def _store(
    states: Mapping[str, Tensor],
    part: slice,
    moments: tuple[Tensor, Tensor],
    source: torch.Generator,
) -> None:
    """Round m and v back to where `_load` took them from; nothing to do for float32."""
    m, v = states["m"][part], states["v"][part]
    if m.dtype == torch.float32:
        return
    bits = rounding.noise(moments[0], source)
    if m.dtype == torch.bfloat16:
        m.copy_(rounding.to_bfloat16(moments[0], rounding.low(bits)))
        v.copy_(rounding.to_bfloat16(moments[1], rounding.high(bits)))
        return
    blocks = _blocks(part)
    _encode(moments[0], m, states["m_scale"][blocks], rounding.low(bits))
    least = rounding.E4M3_LEAST
    _encode(moments[1].sqrt_(), v, states["v_scale"][blocks], rounding.high(bits), least)


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _decode(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [n] uint8 holding e4m3, scales [ceil(n / BLOCK)] -> float32 [n]."""
    values = codes.view(torch.float8_e4m3fn).float()
    return values * scales.repeat_interleave(BLOCK)[: values.numel()]


def _encode(x: Tensor, codes: Tensor, scales: Tensor, bits: Tensor, least: float = 0.0) -> None:
    """float32 x [n] into codes and block scales. Positive numbers become at least `least`."""
    padded = torch.nn.functional.pad(x, (0, scales.numel() * BLOCK - x.numel()))
    scales.copy_(padded.view(-1, BLOCK).abs().amax(1) / rounding.E4M3_MAX)
    safe = torch.where(scales > 0, scales, 1.0).repeat_interleave(BLOCK)[: x.numel()]
    scaled = x / safe
    if least:  # zero stays zero: a weight that never had a gradient
        scaled.clamp_(min=least).mul_(x > 0)
    codes.copy_(
        rounding.to_e4m3(scaled.clamp_(-rounding.E4M3_MAX, rounding.E4M3_MAX), bits).view(
            torch.uint8
        )
    )

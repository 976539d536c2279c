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
States live in a home (`offload/homes.py`): memory, or a tier from which the slices come one by one;
the arithmetic is the same, and so are the bits.
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
from sterna.train.offload.homes import Home, Kept, MemoryHome, Piece

SLICE = 1 << 20
BLOCK = 256

State = dict[str, dict[str, Tensor]]


@dataclass(slots=True)
class _Slot:
    """One weight and what is kept of it, all flat: n numbers of this rank."""

    name: str
    weight: nn.Parameter
    decay: float
    states: dict[str, Kept]
    place: Kept | None  # where an offloaded weight lives


@dataclass(frozen=True, slots=True)
class _Slice:
    """What is updated at a time."""

    index: int
    slot: _Slot
    part: slice
    grad: Tensor

    def piece(self) -> Piece:
        """The slices of its states, and of a weight that is not here."""
        blocks = _blocks(self.part)
        found = {
            key: (kept, blocks if key.endswith("_scale") else self.part)
            for key, kept in self.slot.states.items()
        }
        if self.slot.place is not None:
            found["weight"] = (self.slot.place, self.part)
        return found


class AdamW:
    """The optimizer of the trainer. `named`: (name, parameter) of the weights to train.

    `home`: where states live, None = the weights' memory. `places`: those offloaded weights that
    are updated at home.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        settings: OptimSection,
        seed: int = 0,
        home: Home | None = None,
        places: Mapping[nn.Parameter, Kept] | None = None,
    ) -> None:
        """ConfigError when every weight is frozen."""
        self._settings = settings
        self._seed = seed
        self._home = home or MemoryHome()
        self._places = places or {}
        self._slots = [self._new_slot(name, p) for name, p in named if p.requires_grad]
        if not self._slots:
            raise ConfigError("no weight is to be trained; every parameter is frozen")

    @property
    def is_offloaded(self) -> bool:
        """Whether states are elsewhere than in the weights' memory."""
        return self._home.is_apart

    def _new_slot(self, name: str, weight: nn.Parameter) -> _Slot:
        flat = local(weight.detach()).reshape(-1)
        decay = self._settings.weight_decay if is_decayed(name, weight) else 0.0
        states = _new_moments(flat, self._settings.states, self._home)
        if self._has_master(weight):
            states["master"] = self._home.new(flat.numel(), torch.float32, flat.device)
            states["master"].tensor.copy_(flat)
        return _Slot(name, weight, decay, states, self._places.get(weight))

    def _has_master(self, weight: Tensor) -> bool:
        return self._settings.master and weight.dtype != torch.float32

    @torch.no_grad()
    def step(self, grads: Gradients, step: int, lr: float, grad_scale: float = 1.0) -> None:
        """Update every weight that has a gradient. `step` counts from 0; gradients are multiplied
        by `grad_scale` first (clipping) and forgotten after. TrainError when a tier fails."""
        slices = list(self._slices_of(grads))
        source = torch.Generator()
        walk = self._home.walk([one.piece() for one in slices])
        for one, states in zip(slices, walk, strict=True):
            if one.part.start == 0:
                source = rounding.generator(self._seed, step, one.index)
            self._step_slice(one, states, step, lr, grad_scale, source)
        grads.clear()

    def _slices_of(self, grads: Gradients) -> Iterator[_Slice]:
        for index, slot in enumerate(self._slots):
            found = grads.of(slot.weight)
            if found is not None:
                grad = found.reshape(-1)
                for part in _slices(grad.numel()):
                    yield _Slice(index, slot, part, grad[part])

    def _step_slice(
        self,
        one: _Slice,
        states: Mapping[str, Tensor],
        step: int,
        lr: float,
        grad_scale: float,
        source: torch.Generator,
    ) -> None:
        weight = states.get("weight")
        if weight is None:
            weight = local(one.slot.weight.detach()).view(-1)[one.part]
        w = states["master"] if "master" in states else weight.float()
        moments = _load(states)
        g = one.grad.float() if grad_scale == 1.0 else one.grad.float().mul_(grad_scale)
        self._fused(w, g, moments, step, lr, one.slot.decay)
        _store(states, moments, source)
        if "master" in states:
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
        """Name -> state tensors of this rank, themselves and not copies, wherever they live."""
        return {
            slot.name: {key: kept.tensor for key, kept in slot.states.items()}
            for slot in self._slots
        }


def is_decayed(name: str, weight: Tensor) -> bool:
    """Whether weight decay applies: to matrices, never to norms, biases and other vectors."""
    return weight.dim() >= 2 and not name.endswith("bias")


def _slices(size: int) -> Iterator[slice]:
    for begin in range(0, size, SLICE):
        yield slice(begin, min(begin + SLICE, size))


def _new_moments(flat: Tensor, kind: str, home: Home) -> dict[str, Kept]:
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "8bit": torch.uint8,  # codes as bytes: checkpoints and copies know uint8 everywhere
    }
    n, device = flat.numel(), flat.device
    states = {key: home.new(n, dtypes[kind], device) for key in ("m", "v")}
    if kind == "8bit":
        scales = (home.new(-(-n // BLOCK), torch.float32, device) for _ in range(2))
        states |= dict(zip(("m_scale", "v_scale"), scales, strict=True))
    return states


def _load(states: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """float32 m and v of a slice; the stored tensors themselves when they are float32."""
    m, v = states["m"], states["v"]
    if "m_scale" not in states:
        return m.float(), v.float()
    return _decode(m, states["m_scale"]), _decode(v, states["v_scale"]).square_()


def _store(
    states: Mapping[str, Tensor], moments: tuple[Tensor, Tensor], source: torch.Generator
) -> None:
    """Round m and v back to where `_load` took them from; nothing to do for float32."""
    m, v = states["m"], states["v"]
    if m.dtype == torch.float32:
        return
    bits = rounding.noise(moments[0], source)
    if m.dtype == torch.bfloat16:
        m.copy_(rounding.to_bfloat16(moments[0], rounding.low(bits)))
        v.copy_(rounding.to_bfloat16(moments[1], rounding.high(bits)))
        return
    _encode(moments[0], m, states["m_scale"], rounding.low(bits))
    least = rounding.E4M3_LEAST
    _encode(moments[1].sqrt_(), v, states["v_scale"], rounding.high(bits), least)


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

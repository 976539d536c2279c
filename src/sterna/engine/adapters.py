"""Adapters that requests name: several, and the base, in one flat batch.

Every projection of the blocks is wrapped. A wrapper keeps the A and B of a few slots; each row of a
step says which slot it wants, or none, and the adapter ops add to the rows that want one. A row's
bits do not depend on its neighbours, so a request's output does not either. A step in which no row
has an adapter runs the plain modules.

A and B are float32 whatever the model computes in, as in training: one op for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from sterna.core.errors import AdapterError, ConfigError, UnknownModelError, UnsupportedModelError
from sterna.core.lookup import unknown
from sterna.kernels import ops
from sterna.model.decoder import Decoder
from sterna.model.peft import PeftFile
from sterna.quant.adapted import GATED, Span, Wrapper, native_spans, wide_product


class RowSlots:
    """The slot of each row of the step: of its tokens, and of its output rows. -1 = none."""

    def __init__(self, max_tokens: int, device: str) -> None:
        self._host = torch.full((2, max_tokens), -1, dtype=torch.int32)
        self._device = self._host if device == "cpu" else self._host.to(device)
        self.tokens, self.outputs = self._host.numpy()
        self._num_tokens = 0
        self._num_outputs = 0
        self.is_on = False

    def begin(self, num_tokens: int, num_outputs: int) -> None:
        """The counts of the step to come; its slots are written."""
        self._num_tokens, self._num_outputs = num_tokens, num_outputs
        if self._device is not self._host:
            self._device.copy_(self._host)

    def of(self, x: Tensor) -> Tensor:
        """[T] int32 for rows of tokens, [R] for output rows; x tells by its length.

        T = R means that every row is an output row: both say the same. A step is recorded with
        R < T (engine.py sees to it).
        """
        of_tokens = len(x) == self._num_tokens
        assert of_tokens or len(x) == self._num_outputs, "rows of another step"
        return self._device[0 if of_tokens else 1, : len(x)]


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs [start, start + size) of a weight: rows [row, row + size) of B of `span`."""

    span: Span
    start: int
    size: int
    row: int = 0


def parts_of(spans: Sequence[Span], is_gated: bool) -> tuple[Part, ...]:
    """One part a span; two where gate and up are one in checkpoints (Phi-3) and share A."""
    if not (is_gated and len(spans) == 1):
        return tuple(Part(span, span.start, span.size) for span in spans)
    half = spans[0].size // 2
    return (Part(spans[0], 0, half), Part(spans[0], half, half, half))


class Slots(Wrapper):
    """One weight with the adapters of all slots."""

    def __init__(
        self, base: nn.Module, spans: Sequence[Span], rows: RowSlots, num_slots: int, max_rank: int
    ) -> None:
        super().__init__(base)
        self.parts = parts_of(spans, isinstance(base, GATED))
        self.in_features = _in_features(base)
        self._rows = rows
        device = next(chain(base.parameters(), base.buffers())).device
        # Not zeroed: ranks and scales say what is there, and untouched memory is not taken.
        size = max_rank * self.in_features
        self.a = [torch.empty(num_slots, size, device=device) for _ in self.parts]
        sizes = [max_rank * part.size for part in self.parts]
        self.b = [torch.empty(num_slots, size, device=device) for size in sizes]
        self.scales = torch.zeros(len(self.parts), num_slots, device=device)
        self.ranks = torch.zeros_like(self.scales, dtype=torch.int32)

    def put(self, slot: int, found: PeftFile) -> None:
        """Copy an adapter's part of this weight into a slot."""
        self.scales[:, slot] = 0.0
        for p, part in enumerate(self.parts):
            roles = found.modules.get(part.span.name)
            if roles is None:
                continue
            rows = roles["B"][part.row : part.row + part.size]
            for memory, value in ((self.a[p], roles["A"]), (self.b[p], rows)):
                memory[slot, : value.numel()] = value.reshape(-1).to(memory)
            self.ranks[p, slot] = roles["A"].shape[0]
            self.scales[p, slot] = found.scale(part.span.name)


class SlotsLinear(Slots):
    """In place of Linear or QuantLinear."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N]; `residual` [T, N] is added."""
        y: Tensor = self.base(x, residual)
        if self._rows.is_on:
            starts = [0, *(part.start + part.size for part in self.parts)]
            ops.lora(x, y, self._rows.of(x), self.a, self.b, self.scales, self.ranks, starts)
        return y


class SlotsGated(Slots):
    """In place of GatedLinear or QuantGatedLinear."""

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> act(gate) * up, [T, I]."""
        base = self.base
        if not self._rows.is_on:
            plain: Tensor = base(x)
            return plain
        product, slots = wide_product(base, x), self._rows.of(x)
        of = (self.a, self.b, self.scales, self.ranks, base.activation, base.out_features)
        return ops.lora_gated(x, product, slots, *of)


@dataclass(slots=True)
class LoadedAdapter:
    """An adapter in a slot. `serial` tells it from a later one of the same name."""

    name: str
    path: str
    slot: int
    serial: int
    rank: int
    num_requests: int = 0  # in flight


@dataclass(slots=True)
class AdapterTable:
    """Which adapter is in which slot. Changed by the engine's thread alone, between steps."""

    decoder: Decoder
    modules: tuple[Slots, ...]
    rows: RowSlots
    num_slots: int
    max_rank: int
    loaded: dict[str, LoadedAdapter] = field(default_factory=dict)
    leaving: list[LoadedAdapter] = field(default_factory=list)  # unloaded, requests still run
    _serials: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def find(self, name: str) -> LoadedAdapter:
        """UnknownModelError when no such adapter is loaded."""
        if name not in self.loaded:
            raise UnknownModelError(unknown("adapter", name, self.loaded), param="model")
        return self.loaded[name]

    def check(self, found: PeftFile) -> None:
        """Raise AdapterError when an adapter cannot be served on this model; see `load`."""
        spans = {part.span.name: (m, part.span) for m in self.modules for part in m.parts}
        if found.is_dora:
            raise AdapterError(
                f"{found.weights_path}: a DoRA adapter scales whole rows of the weight, which is "
                "not done a request at a time; merge it (`sterna merge`) and serve the result"
            )
        if found.max_rank > self.max_rank:
            raise AdapterError(
                f"{found.weights_path}: rank {found.max_rank}; this server holds adapters up to "
                f"rank {self.max_rank}: start it with max_lora_rank={found.max_rank} or more"
            )
        for name, roles in found.modules.items():
            if name not in spans:
                leaves = {span.leaf for _, span in spans.values()}
                count = self.decoder.config.num_hidden_layers
                raise AdapterError(found.unknown(name, leaves, count).message)
            module, span = spans[name]
            rank = roles["A"].shape[0]
            wanted = {"A": (rank, module.in_features), "B": (span.size, rank)}
            for role, shape in wanted.items():
                if tuple(roles[role].shape) != shape:
                    raise AdapterError(found.unfitting(name, role, shape).message)

    def load(self, name: str, found: PeftFile) -> LoadedAdapter:
        """Put an adapter into a free slot.

        AdapterError: it does not fit this model, the name is taken, or no slot is free.
        """
        self.check(found)
        if name in self.loaded:
            raise AdapterError(
                f"an adapter {name!r} is loaded already; unload it first, or choose another name",
                param="lora_name",
            )
        entry = LoadedAdapter(
            name, str(found.weights_path.parent), self._free_slot(), next(self._serials),
            found.max_rank,
        )  # fmt: skip
        with torch.inference_mode():
            for module in self.modules:
                module.put(entry.slot, found)
        self.loaded[name] = entry
        return entry

    def unload(self, name: str) -> None:
        """Take no new request for an adapter; its slot is free when those in flight have ended."""
        if name not in self.loaded:
            raise AdapterError(unknown("adapter", name, self.loaded), param="lora_name")
        entry = self.loaded.pop(name)
        if entry.num_requests:
            self.leaving.append(entry)

    def acquire(self, name: str) -> LoadedAdapter:
        """An adapter for one more request. UnknownModelError as `find`."""
        entry = self.find(name)
        entry.num_requests += 1
        return entry

    def release(self, entry: LoadedAdapter) -> None:
        """A request of this adapter has ended."""
        entry.num_requests -= 1
        if not entry.num_requests and entry in self.leaving:
            self.leaving.remove(entry)

    def _free_slot(self) -> int:
        taken = {entry.slot for entry in (*self.loaded.values(), *self.leaving)}
        free = next((slot for slot in range(self.num_slots) if slot not in taken), None)
        if free is None:
            raise AdapterError(
                f"all {self.num_slots} places for adapters are taken; unload one, or start the "
                "server with a larger max_loras"
            )
        return free


def add_slots(
    decoder: Decoder, num_slots: int, max_rank: int, max_tokens: int, device: str
) -> AdapterTable:
    """Wrap every projection of the blocks. UnsupportedModelError for a SwiftKV model."""
    if decoder.config.swiftkv is not None:
        raise UnsupportedModelError(
            "adapters are not served on a SwiftKV model, whose later layers share keys and values; "
            "serve the original model, or merge the adapter"
        )
    rows = RowSlots(max_tokens, device)
    modules = []
    for name, spans in list(native_spans(decoder)):
        parent, _, leaf = name.rpartition(".")
        base = decoder.get_submodule(name)
        kind = SlotsGated if isinstance(base, GATED) else SlotsLinear
        module = kind(base, spans, rows, num_slots, max_rank)
        setattr(decoder.get_submodule(parent), leaf, module)
        modules.append(module)
    return AdapterTable(decoder, tuple(modules), rows, num_slots, max_rank)


def parse_pairs(pairs: Sequence[str]) -> dict[str, Path]:
    """("name=path", ...) -> name -> folder. ConfigError for another form or a name twice."""
    found: dict[str, Path] = {}
    for pair in pairs:
        name, is_pair, path = pair.partition("=")
        if not (name and is_pair and path) or name in found:
            raise ConfigError(
                f"lora is {pair!r}; give name=folder, each name once", param="engine.lora"
            )
        found[name] = Path(path).expanduser()
    return found


def _in_features(base: nn.Module) -> int:
    if hasattr(base, "in_features"):
        return int(base.in_features)  # type: ignore[arg-type]
    weight = base.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1] if weight.dim() == 2 else weight.shape[1] * weight.shape[3])

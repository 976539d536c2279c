"""Adapters that requests name: several, and the base, in one flat batch.

Every projection of the blocks is wrapped (adapter_slots.py) and has room for the adapters of a few
slots. A row's bits do not depend on its neighbours, so a request's output does not either. A step
in which no row has an adapter runs the plain modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sterna.core.errors import AdapterError, ConfigError, UnknownModelError, UnsupportedModelError
from sterna.core.lookup import unknown
from sterna.engine.adapter_slots import RowSlots, Slots, SlotsGated, SlotsLinear
from sterna.model.decoder import Decoder
from sterna.model.peft import PeftFile
from sterna.quant.adapted import GATED, native_spans


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

    def names_in_flight(self) -> tuple[str, str]:
        """For metrics: adapters that requests under way have, comma-separated; and "".

        Requests that wait are counted with those that run: both hold the adapter.
        """
        entries = (*self.loaded.values(), *self.leaving)
        return ",".join(sorted({e.name for e in entries if e.num_requests})), ""

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

"""How new weights reach an engine: in place, through shared memory, or by broadcast.

Every transport carries a policy version and a checksum a tensor. A receiver says which version it
wants; another version, other names, shapes or dtypes, or a checksum that the copied bytes do not
have are refused by name, and the engine must then not be used.

    InPlace      one process: the receiver's tensors are the sender's; nothing moves
    SharedFile   processes of one machine: one copy in, one copy out of mapped memory
    Broadcast    process groups of torch.distributed (broadcast.py)
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sterna.align.transport_checks import (
    MASK,
    TORN,
    Weights,
    check_kind,
    check_names,
    check_sum,
    check_version,
    checksum,
    kind,
    put,
    raw_bytes,
    signed,
)
from sterna.core.errors import TransportError

_STATE = "__state__"  # int64: version, then a checksum a tensor


class WeightTransport(Protocol):
    """Carries named weights of one version; both sides name the same tensors."""

    is_collective: bool  # sender and receivers call at the same time, else the sender first

    def send(self, weights: Weights, version: int) -> None:
        """Offer these weights as `version`."""
        ...

    def receive(self, weights: Weights, version: int) -> None:
        """Overwrite `weights` by those of `version`. TransportError on any difference."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class InPlace:
    """Of one process. `receive` proves that the tensors are the ones that were sent."""

    is_collective = False

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}
        self._version = TORN

    def send(self, weights: Weights, version: int) -> None:
        """See WeightTransport."""
        self._sent = {name: tensor.data_ptr() for name, tensor in weights.items()}
        self._version = version

    def receive(self, weights: Weights, version: int) -> None:
        """See WeightTransport."""
        check_version(self._version, version)
        check_names(self._sent, weights)
        for name, tensor in weights.items():
            if tensor.data_ptr() != self._sent[name]:
                raise TransportError(
                    f"{name} is a copy of the trained weight, not the weight itself; in-place "
                    "publishing would leave it as it was. Build the engine on the trainer's model"
                )

    def close(self) -> None:
        """See WeightTransport."""


class SharedFile:
    """A mapped file in the layout of safetensors, which any process of the machine may map."""

    is_collective = False

    def __init__(self, path: Path | None = None) -> None:
        """`path` of an existing file to receive from it; None makes one, to send."""
        self._is_owner = path is None
        self.path = path or _new_path()
        self._map: mmap.mmap | None = None
        self._parts: dict[str, Tensor] = {}  # uint8 views of the mapped memory
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}

    def send(self, weights: Weights, version: int) -> None:
        """See WeightTransport. The file is made by the first call."""
        if self._map is None:
            self._create(weights)
        check_names(self._shapes, weights)
        state = self._state()
        state[0] = TORN
        for i, (name, tensor) in enumerate(weights.items()):
            self._check_shape(name, tensor)
            self._parts[name].copy_(raw_bytes(tensor))
            state[1 + i] = signed(checksum(tensor))
        state[0] = version

    def receive(self, weights: Weights, version: int) -> None:
        """See WeightTransport. A file that is written meanwhile is refused."""
        if self._map is None:
            self._open()
        check_names(self._shapes, weights)
        state = self._state()
        check_version(int(state[0]), version)
        order = {name: i for i, name in enumerate(self._shapes)}
        with torch.no_grad():
            for name, tensor in weights.items():
                self._check_shape(name, tensor)
                put(tensor, self._parts[name])
                check_sum(name, checksum(tensor), int(state[1 + order[name]]) & MASK)
        check_version(int(state[0]), version)

    def close(self) -> None:
        """See WeightTransport; the sender's file goes."""
        self._parts = {}
        self._map = None  # its pages go with the last view
        if self._is_owner:
            self.path.unlink(missing_ok=True)

    def _state(self) -> Tensor:
        return self._parts[_STATE].view(torch.int64)

    def _check_shape(self, name: str, tensor: Tensor) -> None:
        check_kind(name, self._shapes[name], kind(tensor))

    def _create(self, weights: Weights) -> None:
        header: dict[str, Any] = {}
        end = 8 * (1 + len(weights))
        header[_STATE] = {"dtype": "I64", "shape": [1 + len(weights)], "data_offsets": [0, end]}
        for name, tensor in weights.items():
            dtype, shape = kind(tensor)
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        self._open()
        self._state()[0] = TORN

    def _open(self) -> None:
        try:
            with self.path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError) as error:
            raise TransportError(f"{self.path}: no weights to receive ({error})") from error
        size = int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : 8 + size])
        data = torch.from_numpy(np.frombuffer(self._map, np.uint8))[8 + size :]
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            self._parts[name] = data[begin:end]
            if name != _STATE:
                self._shapes[name] = (entry["dtype"], tuple(entry["shape"]))


def _new_path() -> Path:
    """In memory where the system has a place for it; readable by this user alone."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    handle, name = tempfile.mkstemp(".safetensors", "sterna-weights-", folder)
    os.close(handle)
    return Path(name)

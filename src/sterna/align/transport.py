"""How new weights reach an engine: in place, through shared memory, or by broadcast.

Every transport carries a policy version and a checksum a tensor. A receiver says which version it
wants; another version, other names, shapes or dtypes, or a checksum that the copied bytes do not
have are refused by name, and the engine must then not be used.

    InPlace      one process: the receiver's tensors are the sender's; nothing moves
    SharedFile   processes of one machine: one copy in, one copy out of mapped memory
    Broadcast    process groups of torch.distributed, in buckets: gloo, or NCCL (not run on a GPU)
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sterna.core.errors import TransportError

Weights = Mapping[str, Tensor]
# (dtype, shape, checksum) by name
Manifest = dict[str, tuple[str, tuple[int, ...], int]]

BUCKET_BYTES = 64 << 20
_WORDS = 1 << 20
_MASK = (1 << 64) - 1
_PRIME = 0x9E3779B97F4A7C15
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_STATE = "__state__"  # int64: version, then a checksum a tensor
_TORN = -1  # the version while a sender writes


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


def checksum(tensor: Tensor) -> int:
    """64 bits over a tensor's bytes: sum of words times odd numbers, so that one flipped bit or two
    words exchanged within 8 MiB show. The same on every device and for any number of threads."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    rest = data.numel() % 8
    if rest:
        data = torch.cat([data, data.new_zeros(8 - rest)])
    words = data.view(torch.int64)
    factors = 2 * torch.arange(min(_WORDS, len(words)), device=data.device) + 1
    found = tensor.numel() * tensor.element_size()
    for part in torch.split(words, _WORDS):
        found = (found * _PRIME + int((part * factors[: len(part)]).sum())) & _MASK
    return found


class InPlace:
    """Of one process. `receive` proves that the tensors are the ones that were sent."""

    is_collective = False

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}
        self._version = _TORN

    def send(self, weights: Weights, version: int) -> None:
        """See WeightTransport."""
        self._sent = {name: tensor.data_ptr() for name, tensor in weights.items()}
        self._version = version

    def receive(self, weights: Weights, version: int) -> None:
        """See WeightTransport."""
        _check_version(self._version, version)
        _check_names(self._sent, weights)
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
        _check_names(self._shapes, weights)
        state = self._state()
        state[0] = _TORN
        for i, (name, tensor) in enumerate(weights.items()):
            self._check_shape(name, tensor)
            self._parts[name].copy_(_bytes(tensor))
            state[1 + i] = _signed(checksum(tensor))
        state[0] = version

    def receive(self, weights: Weights, version: int) -> None:
        """See WeightTransport. A file that is written meanwhile is refused."""
        if self._map is None:
            self._open()
        _check_names(self._shapes, weights)
        state = self._state()
        _check_version(int(state[0]), version)
        order = {name: i for i, name in enumerate(self._shapes)}
        with torch.no_grad():
            for name, tensor in weights.items():
                self._check_shape(name, tensor)
                _put(tensor, self._parts[name])
                _check_sum(name, checksum(tensor), int(state[1 + order[name]]) & _MASK)
        _check_version(int(state[0]), version)

    def close(self) -> None:
        """See WeightTransport; the sender's file goes."""
        self._parts = {}
        self._map = None  # its pages go with the last view
        if self._is_owner:
            self.path.unlink(missing_ok=True)

    def _state(self) -> Tensor:
        return self._parts[_STATE].view(torch.int64)

    def _check_shape(self, name: str, tensor: Tensor) -> None:
        _check_kind(name, self._shapes[name], _kind(tensor))

    def _create(self, weights: Weights) -> None:
        header: dict[str, Any] = {}
        end = 8 * (1 + len(weights))
        header[_STATE] = {"dtype": "I64", "shape": [1 + len(weights)], "data_offsets": [0, end]}
        for name, tensor in weights.items():
            dtype, shape = _kind(tensor)
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        self._open()
        self._state()[0] = _TORN

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


class Broadcast:
    """From the group's rank 0 to all others. `group` is a ProcessGroup of gloo or NCCL."""

    is_collective = True

    def __init__(
        self,
        group: Any,
        device: torch.device | str = "cpu",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """`device`: of the buckets; NCCL wants "cuda". A larger tensor is a bucket of its own."""
        self._group = group
        self._device = torch.device(device)
        self._bucket_bytes = bucket_bytes

    def send(self, weights: Weights, version: int) -> None:
        """See WeightTransport. Errors of a receiver are raised there."""
        manifest = {n: (*_kind(t), checksum(t)) for n, t in weights.items()}
        self._send_object((version, manifest))
        for names in self._buckets(manifest):
            data = torch.cat([_bytes(weights[name]).to(self._device) for name in names])
            self._broadcast(data)

    def receive(self, weights: Weights, version: int) -> None:
        """See WeightTransport. All buckets are taken before anything is refused, so that the
        others do not wait."""
        sent, manifest = self._receive_object()
        error: TransportError | None = None
        try:
            _check_version(sent, version)
            _check_names(manifest, weights)
            for name, tensor in weights.items():
                _check_kind(name, manifest[name][:2], _kind(tensor))
        except TransportError as found:
            error = found
        for names in self._buckets(manifest):
            sizes = [_num_bytes(manifest[name]) for name in names]
            data = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            self._broadcast(data)
            if error is None:
                error = _take(weights, manifest, names, torch.split(data, sizes))
        if error is not None:
            raise error

    def close(self) -> None:
        """See WeightTransport; the group is its owner's."""

    def _buckets(self, manifest: Manifest) -> Iterator[list[str]]:
        bucket: list[str] = []
        size = 0
        for name, entry in manifest.items():
            if bucket and size + _num_bytes(entry) > self._bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += _num_bytes(entry)
        if bucket:
            yield bucket

    def _broadcast(self, data: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([data], options).wait()

    def _send_object(self, value: Any) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(data)], device=self._device))
        self._broadcast(data.to(self._device))

    def _receive_object(self) -> tuple[int, Manifest]:
        size = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._broadcast(size)
        data = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        self._broadcast(data)
        found: tuple[int, Manifest] = pickle.loads(data.cpu().numpy().tobytes())
        return found


def _take(
    weights: Weights, manifest: Manifest, names: Sequence[str], parts: Sequence[Tensor]
) -> TransportError | None:
    with torch.no_grad():
        for name, part in zip(names, parts, strict=True):
            _put(weights[name], part)
            try:
                _check_sum(name, checksum(weights[name]), manifest[name][2])
            except TransportError as error:
                return error
    return None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _put(tensor: Tensor, data: Tensor) -> None:
    """Bytes into a weight, which stays where it is: recorded steps keep its address."""
    held = tensor.detach()
    if held.is_contiguous():
        held.view(-1).view(torch.uint8).copy_(data)
    else:
        held.copy_(data.clone().view(held.dtype).view(held.shape))


def _kind(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return _DTYPES[tensor.dtype], tuple(tensor.shape)


def _num_bytes(entry: tuple[str, tuple[int, ...], int]) -> int:
    return int(np.prod(entry[1], dtype=np.int64)) * (4 if entry[0] == "F32" else 2)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _check_version(found: int, wanted: int) -> None:
    if found != wanted:
        what = "is being written" if found == _TORN else f"is {found}"
        raise TransportError(
            f"the version of the weights {what}, {wanted} was asked for; sender and receiver have "
            "lost each other. Continue the run from its newest checkpoint"
        )


def _check_names(sent: Mapping[str, Any], weights: Weights) -> None:
    if set(sent) != set(weights):
        odd = sorted(set(sent) ^ set(weights))
        raise TransportError(
            f"sender and receiver hold different weights: {', '.join(odd[:4])}"
            f"{', ...' if len(odd) > 4 else ''}; both sides need the same model"
        )


def _check_kind(
    name: str, sent: tuple[str, tuple[int, ...]], own: tuple[str, tuple[int, ...]]
) -> None:
    if sent != own:
        raise TransportError(
            f"{name} was sent as {sent[0]} {list(sent[1])}, the receiver's is {own[0]} "
            f"{list(own[1])}; both sides need the same model in one dtype"
        )


def _check_sum(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise TransportError(
            f"{name} arrived with another checksum than it was sent with ({found:016x}, not "
            f"{wanted:016x}); the engine's weights are not to be used"
        )


def _new_path() -> Path:
    """In memory where the system has a place for it; readable by this user alone."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    handle, name = tempfile.mkstemp(".safetensors", "sterna-weights-", folder)
    os.close(handle)
    return Path(name)

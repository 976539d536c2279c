"""Weights over process groups of torch.distributed, in buckets: gloo, NCCL (not run on a GPU)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sterna.align.transport_checks import (
    Manifest,
    Weights,
    check_kind,
    check_names,
    check_sum,
    check_version,
    checksum,
    kind,
    num_bytes,
    put,
    raw_bytes,
)
from sterna.core.errors import TransportError

BUCKET_BYTES = 64 << 20


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
        manifest = {n: (*kind(t), checksum(t)) for n, t in weights.items()}
        self._send_object((version, manifest))
        for names in self._buckets(manifest):
            data = torch.cat([raw_bytes(weights[name]).to(self._device) for name in names])
            self._broadcast(data)

    def receive(self, weights: Weights, version: int) -> None:
        """See WeightTransport. All buckets are taken before anything is refused, so that the
        others do not wait."""
        sent, manifest = self._receive_object()
        error: TransportError | None = None
        try:
            check_version(sent, version)
            check_names(manifest, weights)
            for name, tensor in weights.items():
                check_kind(name, manifest[name][:2], kind(tensor))
        except TransportError as found:
            error = found
        for names in self._buckets(manifest):
            sizes = [num_bytes(manifest[name]) for name in names]
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
            if bucket and size + num_bytes(entry) > self._bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += num_bytes(entry)
        if bucket:
            yield bucket

    def _broadcast(self, data: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([data], options).wait()

    def _send_object(self, value: Any) -> None:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(data)], device=self._device))
        self._broadcast(data.to(self._device))

    def _receive_object(self) -> tuple[int, Manifest]:
        size = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._broadcast(size)
        data = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        self._broadcast(data)
        version, manifest = json.loads(data.cpu().numpy().tobytes())
        return version, {
            n: (dtype, tuple(shape), total) for n, (dtype, shape, total) in manifest.items()
        }


def _take(
    weights: Weights, manifest: Manifest, names: Sequence[str], parts: Sequence[Tensor]
) -> TransportError | None:
    with torch.no_grad():
        for name, part in zip(names, parts, strict=True):
            put(weights[name], part)
            try:
                check_sum(name, checksum(weights[name]), manifest[name][2])
            except TransportError as error:
                return error
    return None

"""Weights arrive as they were sent, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sterna.align.broadcast import Broadcast
from sterna.align.transport import InPlace, SharedFile
from sterna.align.transport_checks import checksum
from sterna.core.errors import TransportError
from sterna.parallel.launch import LocalRanks

HERE = str(Path(__file__).resolve())


def weights(seed=0):
    """Odd sizes, two dtypes, a transposed view."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 7, generator=generator),
        "b.weight": torch.randn(3, 3, generator=generator).to(torch.bfloat16),
        "c.weight": torch.randn(4, 6, generator=generator).t(),
        "d.bias": torch.randn(1, generator=generator),
    }


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_checksum_sees_bits_order_and_length():
    x = torch.arange(1000, dtype=torch.float32)
    found = {
        checksum(x),
        checksum(x.flip(0)),
        checksum(x[:-1]),
        checksum(torch.cat([x, x[:1] * 0])),
    }
    flipped = x.clone()
    flipped.view(torch.int32)[500] ^= 1
    assert len({*found, checksum(flipped)}) == 5
    assert checksum(x) == checksum(x.clone())
    big = torch.randn(3 << 20)
    moved = torch.cat([big[1 << 21 :], big[: 1 << 21]])  # whole chunks exchanged
    assert checksum(big) != checksum(moved)


def test_shared_memory_carries_versions(tmp_path):
    sender = SharedFile()
    sent, got = weights(), weights(1)
    sender.send(sent, 3)
    receiver = SharedFile(sender.path)
    receiver.receive(got, 3)
    assert equal(sent, got)
    place = got["a.weight"].data_ptr()
    sender.send(weights(2), 4)
    with pytest.raises(TransportError, match="is 4, 3 was asked for"):
        receiver.receive(got, 3)
    receiver.receive(got, 4)
    assert equal(weights(2), got)
    assert got["a.weight"].data_ptr() == place
    as_file = load_file(sender.path)  # any reader of safetensors understands it
    assert torch.equal(as_file["a.weight"], got["a.weight"])
    sender.close()
    assert not sender.path.exists()


def test_a_torn_or_damaged_file_is_refused():
    sender = SharedFile()
    sender.send(weights(), 0)
    receiver = SharedFile(sender.path)
    got = weights(1)
    receiver.receive(got, 0)
    receiver._parts["b.weight"][3] ^= 16
    with pytest.raises(TransportError, match=r"b\.weight arrived with another checksum"):
        receiver.receive(got, 0)
    sender._state()[0] = -1
    with pytest.raises(TransportError, match="is being written"):
        receiver.receive(got, 0)
    sender.close()
    with pytest.raises(TransportError, match="no weights to receive"):
        SharedFile(sender.path).receive(got, 0)


def test_another_model_is_refused():
    sender = SharedFile()
    sender.send(weights(), 0)
    receiver = SharedFile(sender.path)
    other = weights()
    del other["d.bias"]
    with pytest.raises(TransportError, match=r"different weights: d\.bias"):
        receiver.receive(other, 0)
    other = {**weights(), "a.weight": torch.zeros(5, 7, dtype=torch.bfloat16)}
    with pytest.raises(TransportError, match=r"a\.weight was sent as F32 .* BF16"):
        receiver.receive(other, 0)
    sender.close()


def test_in_place_is_proven():
    transport, own = InPlace(), weights()
    transport.send(own, 1)
    transport.receive(own, 1)
    with pytest.raises(TransportError, match="is 1, 2 was asked for"):
        transport.receive(own, 2)
    with pytest.raises(TransportError, match="is a copy"):
        transport.receive(weights(), 1)


def across_processes(kind, path):
    """Run on two ranks: rank 0 sends twice, rank 1 receives and says what it got."""
    import torch.distributed as dist

    rank = dist.get_rank()
    if kind == "broadcast":
        transport = Broadcast(dist.group.WORLD, bucket_bytes=64)
    else:
        transport = SharedFile() if rank == 0 else None
        box = [str(transport.path) if rank == 0 else ""]
        dist.broadcast_object_list(box, src=0)
        transport = transport or SharedFile(Path(box[0]))
    own, sums = weights(rank), []
    for version, wanted in ((1, 1), (2, 2), (3, 4)):
        if rank == 0:
            own = weights(10 + version)
            transport.send(own, version)
        if not transport.is_collective:
            dist.barrier()
        if rank == 1:
            try:
                transport.receive(own, wanted)
                sums.append(equal(own, weights(10 + version)))
            except TransportError as error:
                sums.append(str(error)[:36])
        dist.barrier()
    transport.close()
    return sums


@pytest.mark.parametrize("kind", ["shared", "broadcast"])
def test_two_processes(kind):
    with LocalRanks() as ranks:
        _, found = ranks.run(2, f"{HERE}:across_processes", kind, "", timeout_s=120)
    assert found == [True, True, "the version of the weights is 3, 4 wa"[:36]]

"""Weights, gradients and optimiser states cut over the data ranks (FSDP2), or replicated.

Both ways a gradient is the mean over the data ranks (dp x sp), so a loss of

    local sum * number of data ranks / valid targets of all ranks

gives the exact gradient of the mean over all targets.

Cut: each block is gathered before it runs and again in backward; embeddings, last norm and head
form the root group, gathered once a micro-batch and kept to the end of its backward, since the
chunked head reads its weight after `hidden` returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sterna.parallel.mesh import Axis, Mesh

BUCKET_ELEMENTS = 2**24  # gradients reduced in one call when weights are replicated


def shard_model(model: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh) -> nn.Module:
    """Cut every weight of `model` over mesh.data, in place; nothing on one rank.

    `blocks`: the modules gathered one at a time. `model.hidden` becomes the method that gathers
    the root group. Every rank must hold the same weights (the same checkpoint or seed).
    """
    if mesh.data.size == 1:
        return model
    assert mesh.data.group is not None
    device_mesh = DeviceMesh.from_group(mesh.data.group, mesh.device.type)
    for block in blocks:
        fully_shard(block, mesh=device_mesh)
    fully_shard(model, mesh=device_mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    return model


def release(model: nn.Module) -> None:
    """Give back gathered weights after a forward without backward (eval), before an update."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(x: Tensor) -> Tensor:
    """This rank's shard of a weight or gradient; x itself when it is whole."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    """The whole weight or gradient on every rank (collective when it is cut)."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Replace gradients of replicated weights by their mean over the ranks, in buckets.

    A weight without gradient on some rank counts as zero there; one without on all stays zero.
    """
    if axis.size == 1:
        return
    grads = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    average_tensors(grads, axis)


@torch.no_grad()
def average_tensors(tensors: Iterable[Tensor], axis: Axis) -> None:
    """Replace tensors by their mean over the ranks, in buckets; every rank has the same shapes."""
    if axis.size == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size > BUCKET_ELEMENTS or bucket[0].dtype != tensor.dtype):
            _average(bucket, axis)
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        _average(bucket, axis)


def _average(grads: list[Tensor], axis: Axis) -> None:
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=axis.group)
    flat /= axis.size
    for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))

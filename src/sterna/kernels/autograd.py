"""The backward of every op: a formula of `backward.py`, or the reference run again under autograd.

The second is correct for every op from one function, and the oracle of the first. Both save only
the op's inputs. The forward is whatever back end the dispatcher picks, so the gradient belongs to
the reference, which agrees with the back end within the op's tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sterna.core.errors import KernelError
from sterna.kernels.backward import BACKWARDS, Backward


class _Differentiable(torch.autograd.Function):
    """Runs `forward_op` below autograd; its backward is `formula`, or that of `reference`."""

    @staticmethod
    def forward(
        ctx: Any,
        forward_op: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        formula: Backward | None,
        *args: Any,
    ) -> Tensor:
        ctx.reference, ctx.formula = reference, formula
        ctx.args = [None if isinstance(a, Tensor) else a for a in args]
        ctx.tensor_idx = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.tensor_idx))
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.args)
        for i, saved in zip(ctx.tensor_idx, ctx.saved_tensors, strict=True):
            args[i] = saved.detach()
        wants = ctx.needs_input_grad[3:]
        found = ctx.formula(grad.contiguous(), wants, *args) if ctx.formula is not None else None
        return (None, None, None, *(found or recompute(ctx.reference, grad, wants, args)))


def recompute(
    reference: Callable[..., Tensor], grad: Tensor, wants: tuple[bool, ...], args: list[Any]
) -> tuple[Tensor | None, ...]:
    """One gradient an argument, by PyTorch through the reference; None where none is wanted."""
    leaves = [
        a.requires_grad_(wanted) if isinstance(a, Tensor) else a
        for a, wanted in zip(args, wants, strict=True)
    ]
    wanted_idx = [i for i, wanted in enumerate(wants) if wanted]
    with torch.enable_grad():
        output = reference(*leaves)
    found = torch.autograd.grad(output, [leaves[i] for i in wanted_idx], grad)
    result: list[Tensor | None] = [None] * len(args)
    for i, value in zip(wanted_idx, found, strict=True):
        result[i] = value
    return tuple(result)


def autograd_kernel(
    name: str, reference: Callable[..., Tensor | None], inference_only: bool
) -> Callable[..., Tensor | None]:
    """The Autograd kernel of op `name`: records a backward when some input asks for one.

    Raises KernelError when an inference-only op is asked to record one.
    """

    record: Callable[..., Tensor] = _Differentiable.apply
    formula = BACKWARDS.get(name)

    def kernel(*args: Any) -> Tensor | None:
        op: Callable[..., Tensor | None] = getattr(torch.ops.sterna, name).default
        if not (torch.is_grad_enabled() and any(_requires_grad(a) for a in args)):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        if inference_only:
            raise KernelError(
                f"op sterna::{name} has no backward but an input requires a gradient; "
                "run it under torch.inference_mode(), or use a Batch with kv=None to train"
            )
        return record(op, reference, formula, *args)

    return kernel


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad

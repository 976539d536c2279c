"""The backward of every op: recompute the reference under autograd, then differentiate it.

Correct for every op from one function, and it saves only the op's inputs. The forward is whatever
back end the dispatcher picks, so the gradient belongs to the reference, which agrees with the
back end within the op's tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import KernelError


class _Recompute(torch.autograd.Function):
    """Runs `forward_op` below autograd; its backward differentiates `reference`."""

    @staticmethod
    def forward(
        ctx: Any, forward_op: Callable[..., Tensor], reference: Callable[..., Tensor], *args: Any
    ) -> Tensor:
        ctx.reference = reference
        ctx.args = [None if isinstance(a, Tensor) else a for a in args]
        ctx.tensor_idx = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.tensor_idx))
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.args)
        for i, saved in zip(ctx.tensor_idx, ctx.saved_tensors, strict=True):
            args[i] = saved.detach().requires_grad_(ctx.needs_input_grad[i + 2])
        wanted = [i for i in ctx.tensor_idx if ctx.needs_input_grad[i + 2]]
        with torch.enable_grad():
            output = ctx.reference(*args)
        found = torch.autograd.grad(output, [args[i] for i in wanted], grads[0])
        result: list[Tensor | None] = [None] * (len(args) + 2)
        for i, grad in zip(wanted, found, strict=True):
            result[i + 2] = grad
        return tuple(result)


def autograd_kernel(
    name: str, reference: Callable[..., Tensor], inference_only: bool
) -> Callable[..., Tensor]:
    """The Autograd kernel of op `name`: records a backward when some input asks for one.

    Raises KernelError when an inference-only op is asked to record one.
    """

    record: Callable[..., Tensor] = _Recompute.apply

    def kernel(*args: Any) -> Tensor:
        op: Callable[..., Tensor] = getattr(torch.ops.sterna, name).default
        if not (torch.is_grad_enabled() and any(_requires_grad(a) for a in args)):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        if inference_only:
            raise KernelError(
                f"op sterna::{name} has no backward but an input requires a gradient; "
                "run it under torch.inference_mode(), or use a Batch with kv=None to train"
            )
        return record(op, reference, *args)

    return kernel


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad

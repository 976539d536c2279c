"""The backward of the training ops, by formula; for the rest `autograd.py` runs the reference.

Each takes the upstream gradient, which inputs want one, and the op's arguments; it returns one
gradient an argument (None where none is wanted). Only inputs were saved, so what a formula needs of
the forward is computed again here, cheap parts only: norms, activations, the probabilities of a
tile. Matrix products run in the dtype of the activations through PyTorch, which sums bfloat16
products in float32; everything else is float32, or float64 for float64.

    y = x W^T + b + r            dx = g W, dW = g^T x, db = sum g, dr = g
    y = x r w, r = rsqrt(mean x^2 + eps)
                                 dx = r (g w - xr mean(g w xr)), dw = sum g xr
    rotation                     the rotation by the negative angle
    o = P v, P = softmax(s q k^T)  dv = P^T g, dP = g v^T, dS = P (dP - sum P dP), dq = s dS k

Legend: T tokens, K in_features, N out_features, D hidden_size, H, G, C as in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from sterna.kernels.attention_backward import attention, shared_attention
from sterna.kernels.backend import backend_for
from sterna.kernels.reference import activate_wide, wide

Grads = tuple[Tensor | None, ...]
Wants = tuple[bool, ...]
Backward = Callable[..., Grads | None]

NORM_ROWS = 2048


def linear(
    grad: Tensor,
    wants: Wants,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Grads | None:
    """grad [T, N]."""
    if weight.dim() != 2 or activation != "none":
        return None
    return (
        grad @ weight if wants[0] else None,
        grad.t() @ x if wants[1] else None,
        _sum_rows(grad, bias) if wants[2] else None,
        grad if wants[3] else None,
        None,
    )


def gated_linear(
    grad: Tensor, wants: Wants, x: Tensor, weight: Tensor, activation: str, out_features: int
) -> Grads | None:
    """grad [T, I]; the pre-activations are computed again."""
    if weight.dim() != 2:
        return None
    return (*gated_gradients(grad, x @ weight.t(), wants, x, weight, activation), None, None)


def gated_gradients(
    grad: Tensor, sums: Tensor, wants: Wants, x: Tensor, weight: Tensor, activation: str
) -> Grads:
    """Of x and weight, from sums [T, 2 I]: those of the gate, then those of up."""
    d_sums = backend_for(grad.device.type).gated_backward(grad, sums, activation)
    if d_sums is None:
        d_sums = _gated_rows(grad, sums, activation)
    return d_sums @ weight if wants[0] else None, d_sums.t() @ x if wants[1] else None


def _gated_rows(grad: Tensor, sums: Tensor, activation: str) -> Tensor:
    gate, up = torch.split(sums, grad.shape[1], dim=1)
    d_sums = torch.empty_like(sums)
    d_gate, d_up = torch.split(d_sums, grad.shape[1], dim=1)
    torch.mul(grad, activate_wide(gate, activation), out=d_up)
    d_gate.copy_(d_activate(grad * up, gate, activation))
    return d_sums


def activate(grad: Tensor, wants: Wants, x: Tensor, kind: str) -> Grads:
    """grad, x [T, I]."""
    return d_activate(grad, x, kind), None


def add(grad: Tensor, wants: Wants, x: Tensor, y: Tensor) -> Grads:
    """grad [T, D] for both."""
    return grad if wants[0] else None, grad if wants[1] else None


def select_rows(grad: Tensor, wants: Wants, x: Tensor, rows: Tensor) -> Grads:
    """grad [R, D] -> [T, D]; a row named twice collects both."""
    return torch.zeros_like(x).index_add_(0, rows, grad), None


def embed(
    grad: Tensor, wants: Wants, tokens: Tensor, table: Tensor, hidden_size: int, scale: float = 1.0
) -> Grads | None:
    """grad [T, D] -> the table's [V, D]."""
    if table.dim() != 2:
        return None
    scaled = grad if scale == 1.0 else (wide(grad) * scale).to(grad.dtype)
    dense = torch.ops.aten.embedding_dense_backward
    return None, dense(scaled, tokens.long(), table.shape[0], -1, False), None, None


def rms_norm(
    grad: Tensor, wants: Wants, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False
) -> Grads:
    """grad, x [T, D]."""
    d_x = torch.empty_like(x) if wants[0] else None
    total = torch.zeros_like(wide(weight))
    for part in _slices(len(x)):  # float32 rows of all of x would be the peak of a long step
        d_part, d_weight = _rms_norm_rows(grad[part], x[part], weight, eps, unit_offset)
        total += d_weight
        if d_x is not None:
            d_x[part] = d_part
    return d_x, total.to(weight.dtype) if wants[1] else None, None, None


def _rms_norm_rows(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    g, normed = wide(grad), wide(x)
    root = torch.rsqrt(normed.square().mean(1, keepdim=True) + eps)
    normed = normed * root
    d_weight = (g * normed).sum(0)
    g = g * (wide(weight) + 1.0 if unit_offset else wide(weight))
    dot = (g * normed).mean(1, keepdim=True)
    return g.addcmul_(normed, dot, value=-1.0).mul_(root), d_weight


def _slices(num_rows: int) -> list[slice]:
    return [slice(i, i + NORM_ROWS) for i in range(0, num_rows, NORM_ROWS)]


def rope(
    grad: Tensor,
    wants: Wants,
    qkv: Tensor,
    positions: Tensor,
    table: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    *heads: int,
) -> Grads | None:
    """The op itself with the angle turned round; head norms are left to the reference."""
    if q_norm is not None or k_norm is not None:
        return None
    rest: Grads = (None,) * 9
    if table is None:
        return (grad, *rest)
    turned = table.index_select(0, positions)
    turned[:, table.shape[1] // 2 :].neg_()
    rows = torch.arange(len(positions), dtype=positions.dtype, device=positions.device)
    op: Callable[..., Tensor] = torch.ops.sterna.rope
    return (op(grad, rows, turned, None, None, eps, unit_offset, *heads), *rest)


def _sum_rows(grad: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else wide(grad).sum(0).to(like.dtype)


def d_activate(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """Gradient through an activation of x, in x's dtype."""
    if kind == "silu":
        return _tensor(torch.ops.aten.silu_backward(grad, x))
    if kind == "relu":
        return grad * (x > 0)
    if kind == "tanh":
        return _tensor(torch.ops.aten.tanh_backward(grad, torch.tanh(x)))
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[kind]
    return _tensor(torch.ops.aten.gelu_backward(grad, x, approximate=approximate))


def _tensor(value: Tensor) -> Tensor:
    """What an untyped torch op returned."""
    return value


BACKWARDS: MappingProxyType[str, Backward] = MappingProxyType(
    {
        "linear": linear,
        "gated_linear": gated_linear,
        "activate": activate,
        "add": add,
        "select_rows": select_rows,
        "embed": embed,
        "rms_norm": rms_norm,
        "rope": rope,
        "attention": attention,
        "shared_attention": shared_attention,
    }
)

"""GPTQ: round one input's weights at a time and let the others make up for the error.

Minimises tr((W - Q) H (W - Q)^T), the squared output error over the calibration text, where RTN
looks at H's diagonal only. With U the upper Cholesky factor of (H + damping I)^-1, for each k:

    q = round(w_k / s) s;   W[:, k+1:] -= (w_k - q) / U[k, k] * U[k, k+1:]

Source: GPTQ (arXiv 2210.17323), algorithm 1, sections 3.3 (blocks, Cholesky) and 4 (damping 1%).
Scales come from the search of RTN on the plain weights, before the walk, so the order of k is free
of groups ("static groups"): act-order takes inputs by falling H[k, k] and costs nothing to read.
Afterwards the scales are fitted again to the codes in closed form, s = w^T H q / q^T H q, for
groups one after the other with the others held; a scale that got no better is not changed.

Rows do not meet: each thread takes a run of rows. The walk works on transposed weights [K, n], so
that one input's weights are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sterna.core.errors import QuantizeError
from sterna.core.machine import num_usable_cpus
from sterna.kernels.quant_weight import QuantWeight, scale_values
from sterna.quant.formats import Element, WeightFormat, encode, round_to_grid
from sterna.quant.rtn import Rows, check_finite, divisors, pack_rows, quantize_rows
from sterna.quant.threads import map_runs

_RUN_ROWS = 8192
_REFIT_PASSES = 2


@dataclass(frozen=True, slots=True)
class GPTQOptions:
    """damping: share of H's mean diagonal added to it. block: inputs between two large updates."""

    damping: float = 0.01
    block: int = 128
    is_act_order: bool = True
    is_refitted: bool = True


DEFAULT_GPTQ = GPTQOptions()


def gptq_weight(
    weight: Tensor,
    hessian: Tensor,
    fmt: WeightFormat,
    options: GPTQOptions = DEFAULT_GPTQ,
    *,
    is_gated: bool = False,
    name: str = "weight",
) -> QuantWeight:
    """weight [N, K] of any float dtype, hessian [K, K] -> its tiles. Zero rows stay exactly zero.

    Raises QuantizeError, naming `name`, for weights that are not finite, a Hessian of another size
    or one that no damping makes positive.
    """
    check_finite(weight, name)
    size = weight.shape[1]
    if hessian.shape != (size, size):
        raise QuantizeError(
            f"{name}: a Hessian of {tuple(hessian.shape)}, the weight has {size} inputs; calibrate "
            "on the same model"
        )
    walk = _Walk(hessian.float(), fmt, options, name)
    per_run = min(_RUN_ROWS, -(-len(weight) // num_usable_cpus()))
    parts = map_runs(walk.rows, torch.split(weight, max(1, per_run)))
    formats = [part.formats for part in parts if part.formats is not None]
    rows = Rows(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(formats) if formats else None,
    )
    return pack_rows(rows, fmt, is_gated)


class _Walk:
    """What all rows of a weight share: the order of its inputs and the Cholesky factor."""

    def __init__(self, hessian: Tensor, fmt: WeightFormat, options: GPTQOptions, name: str) -> None:
        self.hessian, self.fmt, self.options = hessian, fmt, options
        diagonal = hessian.diagonal()
        keys = -diagonal if options.is_act_order else torch.arange(len(diagonal))
        self.order = torch.argsort(keys, stable=True)
        self.factor = _factor(hessian[self.order][:, self.order], options.damping, name)

    def rows(self, weight: Tensor) -> Rows:
        """Rows [n, K] to codes and scales."""
        plain = weight.float()
        start = quantize_rows(plain, self.fmt, "mse", self.hessian.diagonal())
        scale = _spread(scale_values(start.scales), self.fmt.group_size, plain.shape[1])
        values = self._walk(plain, scale, start.formats)
        scales = start.scales
        if self.options.is_refitted and self.fmt.scale != "e8m0":
            scales = _refit(plain, values, scales, self.hessian, self.fmt.group_size)
        return Rows(_encode(values, self.fmt, start.formats), scales, start.formats)

    def _walk(self, plain: Tensor, scale: Tensor, formats: Tensor | None) -> Tensor:
        """Code values [n, K] of the rows; the loop of the paper's algorithm 1."""
        order, factor = self.order, self.factor
        left = plain.t()[order].contiguous()
        steps = scale.t().expand(plain.shape[1], -1)[order].contiguous()
        divisor, found = divisors(steps), torch.empty_like(left)
        for first, stop in _blocks(len(left), self.options.block):
            errors = torch.empty_like(left[first:stop])
            for k in range(first, stop):
                found[k] = _rounded(left[k] / divisor[k], self.fmt.elements, formats)
                error = torch.addcmul(left[k], found[k], steps[k], value=-1) / factor[k, k]
                left[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1)
                errors[k - first] = error
            left[stop:].addmm_(factor[first:stop, stop:].t(), errors, alpha=-1)
        values = torch.empty_like(found)
        values[order] = found
        return values.t().contiguous()


def _blocks(size: int, block: int) -> Iterator[tuple[int, int]]:
    for first in range(0, size, block):
        yield first, min(first + block, size)


def _factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """Upper Cholesky factor of the damped inverse, float32; formed in float64."""
    h = hessian.double()  # 1.6 GB for 14,336 inputs: each matrix goes as soon as it is used
    diagonal = h.diagonal()
    mean = diagonal.mean()
    # An input that is always zero: its weights do not matter and nothing may lean on them.
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean.clamp(min=1e-12)))
    diagonal.add_(damping * mean + 1e-12)
    lower, failed = torch.linalg.cholesky_ex(h)
    del h, diagonal
    if not int(failed):
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(failed):
            factor: Tensor = upper.float()
            return factor
    raise QuantizeError(
        f"{name}: its Hessian is not positive with {damping:.1%} damping; use more calibration "
        "text, or more damping"
    )


def _spread(scales: Tensor, group_size: int, size: int) -> Tensor:
    """[n, G] -> [n, K], or [n, 1] with one scale a row."""
    if group_size == 0:
        return scales
    return scales.repeat_interleave(group_size, dim=1)[:, :size]


def _rounded(x: Tensor, elements: tuple[Element, ...], formats: Tensor | None) -> Tensor:
    first = round_to_grid(x, elements[0])
    if formats is None:
        return first
    return torch.where(formats == 0, first, round_to_grid(x, elements[1]))


def _encode(values: Tensor, fmt: WeightFormat, formats: Tensor | None) -> Tensor:
    codes = encode(values, fmt.elements[0])
    if formats is None:
        return codes
    return torch.where(formats[:, None] == 0, codes, encode(values, fmt.elements[1]))


def _refit(
    plain: Tensor, values: Tensor, scales: Tensor, hessian: Tensor, group_size: int
) -> Tensor:
    """Scales [n, G] of least squared output error for fixed codes, in their storage type."""
    size = plain.shape[1]
    fitted = scales.float()
    groups = list(_blocks(size, group_size or size))
    miss = plain - values * _spread(fitted, group_size, size)
    for _ in range(_REFIT_PASSES if len(groups) > 1 else 1):
        for g, (first, stop) in enumerate(groups):
            part = values[:, first:stop]
            pull = (miss @ hessian[:, first:stop] * part).sum(dim=1)
            weight = (part @ hessian[first:stop, first:stop] * part).sum(dim=1)
            wanted = fitted[:, g] + torch.where(weight > 0, pull / weight, 0.0)
            kept = wanted.to(scales.dtype).float()
            is_sound = torch.isfinite(kept) & (kept > 0)
            kept = torch.where(is_sound, kept, fitted[:, g])
            miss[:, first:stop] -= part * (kept - fitted[:, g])[:, None]
            fitted[:, g] = kept
    return fitted.to(scales.dtype)

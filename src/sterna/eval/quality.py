"""How far one model's next-token distributions are from another's, on the same tokens.

Texts are cut into windows; each is scored on its second half, where every position has at least
half a window of context (llama.cpp's protocol). For p of the first and q of the second model

    KL = sum over the vocabulary of p (ln p - ln q)       in nats, float32 log-probabilities
    top-1 = share of positions at which both have the same most likely token
    ln ratio = mean of nll_second - nll_first, the log of the ratio of perplexities

Standard errors treat windows as the independent draws, for positions of one window are not: the
deviation of the window means over the square root of their number. Median and 99th percentile
are over positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sterna.core.errors import ConfigError

# One window of tokens [window] -> float32 log-probabilities [window // 2, V] of its second half.
Scorer = Callable[[Tensor], Tensor]
OnWindow = Callable[[int, int], None]
_CHUNK_ROWS = 64  # 12 MB of log-probabilities at a vocabulary of 49,152: in the cache, nearly


@dataclass(frozen=True, slots=True)
class Positions:
    """Float32 [windows, scored positions] each."""

    nll_first: Tensor
    nll_second: Tensor
    kl: Tensor
    agrees: Tensor


@dataclass(frozen=True, slots=True)
class Quality:
    """One domain. ln_ratio: of perplexities; its error is far below that of either."""

    positions: int
    ppl_first: float
    ppl_second: float
    ln_ratio: float
    ln_ratio_se: float
    kl: float
    kl_se: float
    kl_median: float
    kl_p99: float
    top1: float
    top1_se: float


def cut_windows(tokens: Sequence[int], window: int, limit: int, label: str) -> Tensor:
    """int32 [n, window]: the first `limit` full windows (0 = all).

    Raises ConfigError, naming `label`, for a text of less than one window.
    """
    count = len(tokens) // window
    if count == 0:
        raise ConfigError(
            f"text {label}: {len(tokens)} tokens, one window of {window} is needed; give a longer "
            "text or a smaller --window"
        )
    count = min(count, limit) if limit else count
    return torch.tensor(tokens[: count * window], dtype=torch.int32).view(count, window)


def compare(
    first: Scorer,
    second: Scorer,
    domains: Mapping[str, Tensor],
    on_window: OnWindow | None = None,
) -> dict[str, Positions]:
    """Score every window [window] of every domain [n, window] with both models."""
    total = sum(len(windows) for windows in domains.values())
    done = 0
    found: dict[str, Positions] = {}
    for name, windows in domains.items():
        rows = []
        for window in windows:
            rows.append(_window(first(window), second(window), window))
            done += 1
            if on_window is not None:
                on_window(done, total)
        found[name] = Positions(*(torch.stack(column) for column in zip(*rows, strict=True)))
    return found


def summarise(found: Positions) -> Quality:
    """Means, errors and percentiles of one domain."""
    ratio = found.nll_second - found.nll_first
    return Quality(
        positions=found.kl.numel(),
        ppl_first=float(found.nll_first.mean().exp()),
        ppl_second=float(found.nll_second.mean().exp()),
        ln_ratio=float(ratio.mean()),
        ln_ratio_se=standard_error(ratio),
        kl=float(found.kl.mean()),
        kl_se=standard_error(found.kl),
        kl_median=float(found.kl.median()),
        kl_p99=float(found.kl.flatten().quantile(0.99)),
        top1=float(found.agrees.mean()),
        top1_se=standard_error(found.agrees),
    )


def together(parts: Sequence[Positions]) -> Positions:
    """Several domains as one, every window with the same weight."""
    columns = zip(*((p.nll_first, p.nll_second, p.kl, p.agrees) for p in parts), strict=True)
    return Positions(*(torch.cat(column) for column in columns))


def standard_error(values: Tensor) -> float:
    """Of the mean of [windows, positions]; NaN for a single window."""
    means = values.mean(dim=1)
    return float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")


def _window(first: Tensor, second: Tensor, window: Tensor) -> tuple[Tensor, ...]:
    """(nll_first, nll_second, kl, agrees) of the scored positions; the last predicts nothing."""
    targets = window[-len(first) + 1 :].long()[:, None]
    nll = [-p[:-1].gather(1, targets).squeeze(1) for p in (first, second)]
    pairs = zip(
        torch.split(first[:-1], _CHUNK_ROWS), torch.split(second[:-1], _CHUNK_ROWS), strict=True
    )
    kl = torch.cat([(p.exp() * (p - q)).sum(dim=1) for p, q in pairs])
    agrees = first[:-1].argmax(dim=1) == second[:-1].argmax(dim=1)
    return nll[0], nll[1], kl, agrees.float()

"""Runs a step so that what fails stays with the request that caused it.

A step that raises is repeated chunk by chunk; computing a chunk again writes the same values to
the same slots, so this is safe. Only the chunks that raise again have failed. They are repeated
without their drafts: a guess must not fail a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sterna.core.errors import StepError, SternaError
from sterna.core.log import get_logger
from sterna.engine.request import TokenLogprob
from sterna.engine.runner import Logits
from sterna.engine.sampler import Sampled
from sterna.engine.scheduler import Chunk
from sterna.engine.verify import Draw, choose, choose_next

log = get_logger(__name__)

Run = Callable[[Sequence[Chunk]], Logits]


@dataclass(frozen=True, slots=True)
class Forward:
    """What became of a step's chunks: those computed, their logits, and those that raised."""

    chunks: tuple[Chunk, ...]
    logits: Logits
    failed: tuple[tuple[Chunk, SternaError], ...] = ()


def run_isolated(run: Run, chunks: tuple[Chunk, ...]) -> Forward:
    """`run(chunks)`, or each chunk alone when that raises."""
    try:
        return Forward(chunks, run(chunks))
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the others go on
        log.warning("a step of %d chunks failed (%r); repeating one by one", len(chunks), error)
        return _run_singly(run, chunks)


def choose_isolated(values: NDArray[np.float32], draws: Sequence[Draw]) -> list[list[Sampled]]:
    """`choose`, or each draw alone and without its drafts when that raises."""
    try:
        return choose(values, draws)
    except Exception as error:  # noqa: BLE001 - find the row that raises, the others go on
        log.warning("sampling %d rows failed (%r); repeating one by one", len(draws), error)
        return [_choose_alone(values, draw) for draw in draws]


def as_request_error(error: BaseException) -> SternaError:
    """The error a client is told: its own if it has a type of ours, else a StepError."""
    if isinstance(error, SternaError):
        return error
    return StepError(f"computing this request failed: {type(error).__name__}: {error}")


def _run_singly(run: Run, chunks: tuple[Chunk, ...]) -> Forward:
    done: list[Chunk] = []
    failed: list[tuple[Chunk, SternaError]] = []
    values: list[NDArray[np.float32]] = []
    hidden: list[Tensor] = []
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}
    for given in chunks:
        chunk = given.without_drafts()
        try:
            part = run((chunk,))
        except Exception as error:  # noqa: BLE001 - becomes this request's error
            failed.append((chunk, as_request_error(error)))
            continue
        if part.prompt_logprobs:
            prompt_logprobs[len(done)] = part.prompt_logprobs[0]
        values.extend(part.values[row : row + 1].copy() for row in part.rows)
        if part.hidden is not None:
            hidden.extend(part.hidden[row : row + 1].clone() for row in part.rows)
        done.append(chunk)
    stacked = np.concatenate(values) if values else np.empty((0, 1), np.float32)
    logits = Logits(stacked, tuple(range(len(stacked))), prompt_logprobs)
    if hidden:
        logits = replace(logits, hidden=torch.cat(hidden))
    return Forward(tuple(done), logits, tuple(failed))


def _choose_alone(values: NDArray[np.float32], draw: Draw) -> list[Sampled]:
    try:
        return choose_next(values, (draw,))
    except Exception as error:  # noqa: BLE001 - becomes this request's error
        return [Sampled(-1, error=as_request_error(error))]

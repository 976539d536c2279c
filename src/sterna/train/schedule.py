"""The learning rate as a pure function of the step, so that a resumed run needs no state.

Steps count from 0. Warmup is linear: step i < w has peak * (i + 1) / w. Cosine and linear fall from
the peak after warmup to min_ratio * peak at the last step; wsd stays at the peak and falls linearly
over its last decay_steps (arXiv 2404.06395); constant stays.
"""

from __future__ import annotations

import math

from sterna.core.errors import ConfigError
from sterna.train.config import Recipe, ScheduleSection


def horizon(recipe: Recipe) -> int:
    """Steps of the whole schedule. ConfigError when its parts do not fit in them."""
    settings = recipe.schedule
    total = settings.total_steps or recipe.run.steps
    needed = settings.warmup_steps + (_decay_steps(settings, total) if _has_decay(settings) else 0)
    if needed > total:
        raise ConfigError(
            f"warmup ({settings.warmup_steps}) and decay take {needed} steps, the schedule has "
            f"{total}; lower schedule.warmup_steps or schedule.decay_steps, or raise run.steps",
            param="schedule",
        )
    return total


def lr_at(step: int, peak: float, settings: ScheduleSection, total: int) -> float:
    """The learning rate of step `step` (from 0); beyond `total` it stays at the last value."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    return peak * (settings.min_ratio + (1 - settings.min_ratio) * _height(step, settings, total))


def _height(step: int, settings: ScheduleSection, total: int) -> float:
    """1 at the peak, 0 at the floor."""
    if settings.kind == "constant":
        return 1.0
    length = total - settings.warmup_steps
    if settings.kind == "wsd":
        length = _decay_steps(settings, total)
    share = (step - (total - length)) / max(1, length - 1)
    share = min(1.0, max(0.0, share))
    return (1 + math.cos(math.pi * share)) / 2 if settings.kind == "cosine" else 1 - share


def _has_decay(settings: ScheduleSection) -> bool:
    return settings.kind == "wsd"


def _decay_steps(settings: ScheduleSection, total: int) -> int:
    return settings.decay_steps or max(1, total // 10)

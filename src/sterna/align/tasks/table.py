"""The built-in tasks by name: one row and one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sterna.align.tasks.arithmetic import Arithmetic
from sterna.align.tasks.base import Task
from sterna.align.tasks.format import Format
from sterna.align.tasks.gym import Gym
from sterna.align.tasks.length import Length
from sterna.align.tasks.positive import Positive
from sterna.align.tasks.walks import Walks
from sterna.core.errors import ConfigError
from sterna.core.lookup import unknown

TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": Arithmetic,
    "format": Format,
    "length": Length,
    "positive": Positive,
    "reasoning-gym": Gym,
    "walks": Walks,
}


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task with its options. ConfigError for an unknown name or option."""
    if name not in TASKS:
        raise ConfigError(unknown("task", name, TASKS), param="prompts.task")
    try:
        return TASKS[name](**options)
    except TypeError as error:
        raise ConfigError(f"prompts.options of {name}: {error}", param="prompts.options") from error

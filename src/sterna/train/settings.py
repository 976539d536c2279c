"""Every setting of a recipe as a row, for `sterna train --settings` and the docs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sterna.train.config import Recipe
from sterna.train.recipe import model_of


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a recipe. `default` is as TOML would have it, "required" or "unset"."""

    name: str
    default: str
    meaning: str


def all_settings(recipe: type[BaseModel] = Recipe) -> Iterator[Setting]:
    """The settings of all sections, in the order of definition; a source's under data.sources[]."""
    yield from _settings(recipe, "")


def _settings(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        inner = model_of(field.annotation)
        key = prefix + name
        if inner is None:
            yield Setting(key, _default(field), field.description or "")
        elif inner is model_of(Recipe.model_fields["data"].annotation) and prefix:
            yield Setting(key, "unset", field.description or "")  # the same keys as [data]
        else:
            is_list = getattr(field.annotation, "__origin__", None) is tuple
            yield from _settings(inner, f"{key}[]." if is_list else f"{key}.")


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value) if value != "" else '""'


def markdown_table() -> str:
    """The table of docs/training.md; the keys of [data] have a page of their own."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for setting in all_settings():
        if setting.name.startswith("data."):
            continue
        meaning = setting.meaning.replace("|", "\\|")
        lines.append(f"| `{setting.name}` | {setting.default} | {meaning} |")
    return "\n".join(lines) + "\n"

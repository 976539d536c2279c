"""Recipes as TOML: layered left to right, overridden by `--a.b=c`, compared with the defaults."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sterna.core.errors import ConfigError
from sterna.core.lookup import unknown
from sterna.train.config import Recipe

Layer = Mapping[str, Any]
R = TypeVar("R", bound=BaseModel)  # kinds with settings of their own have their class


def read_recipe(files: Sequence[Path], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of TOML files, later ones winning key by key, then of `--a.b=c` overrides.

    Raises ConfigError naming the file or flag: unreadable, no TOML, an unknown key (with the
    nearest name) or a value that is not allowed.
    """
    return make_recipe(read_layers(files, overrides))


def read_layers(files: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """As `read_recipe`, but the merged values, not checked yet."""
    flags = [parse_override(flag) for flag in overrides]
    merged: dict[str, Any] = {}
    for layer in (*map(_read_file, files), *flags):
        merge_into(merged, layer)
    return merged


def make_recipe(values: Layer, kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """A checked recipe of nested values; ConfigError in our words."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = (_describe(finding, kind) for finding in error.errors())
        raise ConfigError("; ".join(found)) from error


def parse_override(flag: str) -> dict[str, Any]:
    """`--optim.lr=1e-4` -> {"optim": {"lr": 1e-4}}. Values are TOML, else plain words."""
    name, is_set, text = flag.removeprefix("--").partition("=")
    if not is_set or not name or not flag.startswith("--"):
        raise ConfigError(f"{flag}: write an override as --section.key=value")
    value: Any = _parse_value(text)
    for part in reversed(name.split(".")):
        value = {part.replace("-", "_"): value}
    return dict(value)


def merge_into(target: dict[str, Any], layer: Layer) -> None:
    """Lay `layer` over `target`, table by table; lists and values are replaced."""
    for key, value in layer.items():
        below = target.get(key)
        if isinstance(value, Mapping) and isinstance(below, dict):
            merge_into(below, value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def flatten(model: Recipe) -> Iterator[tuple[str, Any]]:
    """(dotted key, JSON-able value) of every setting, in the order of definition.

    Sources are given by what differs from a source's defaults.
    """
    values = model.model_dump(mode="json")
    values["data"]["sources"] = [
        source.model_dump(mode="json", exclude_defaults=True) for source in model.data.sources
    ]
    yield from _flatten(values, "")


def changes(recipe: Recipe, base: Recipe | None = None) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in `base`, value here) where they differ; base None = the defaults."""
    old = dict(flatten(base or _defaults(recipe)))
    if base is None:
        del old["data.sources"]
    new = dict(flatten(recipe))
    return {
        key: (old.get(key), new.get(key))
        for key in dict.fromkeys((*new, *old))
        if old.get(key) != new.get(key)
    }


def _defaults(recipe: Recipe) -> Recipe:
    """A recipe of this kind without settings. Sources have no default: "-" stands for none."""
    kind = {} if type(recipe) is Recipe else {"kind": recipe.kind}
    return type(recipe).model_validate({**kind, "data": {"sources": [{"path": "-"}]}})


def to_toml(recipe: BaseModel) -> str:
    """The resolved recipe as TOML that `read_recipe` reads back; unset (None) keys are left out."""
    return "\n".join(_table(recipe.model_dump(mode="json"), "")).lstrip("\n") + "\n"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"cannot read recipe {path}: {error.strerror}; give an existing TOML file"
        raise ConfigError(reason) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is no TOML: {error}") from error


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _describe(finding: Any, kind: type[BaseModel]) -> str:
    path = [str(part) for part in finding["loc"]]
    name = ".".join(path)
    if finding["type"] == "extra_forbidden":
        return unknown("key", name, _siblings(path, kind))
    reason = str(finding["msg"]).removeprefix("Value error, ")
    return f"{name}: {reason} (given {finding['input']!r})" if name else reason


def _siblings(path: Sequence[str], kind: type[BaseModel]) -> list[str]:
    """The keys allowed beside the last part of a path, dotted like it."""
    model: Any = kind
    for part in path[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = model_of(field.annotation) if field is not None else model
    prefix = ".".join(path[:-1])
    return [f"{prefix}.{name}" if prefix else name for name in getattr(model, "model_fields", {})]


def model_of(annotation: Any) -> Any:
    """The settings model inside an annotation such as `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (model_of(inner) for inner in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _table(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """A TOML table: its plain keys first, then its sub-tables."""
    tables = {k: v for k, v in values.items() if isinstance(v, dict)}
    for key, value in values.items():
        if key not in tables and value is not None:
            yield f"{_key(key)} = {_toml(value)}"
    for key, value in tables.items():
        yield from ("", f"[{prefix}{_key(key)}]")
        yield from _table(value, f"{prefix}{_key(key)}.")


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inner} }}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else json.dumps(value)

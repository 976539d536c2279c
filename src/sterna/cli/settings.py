"""Settings of a command: TOML files layered left to right, then options of the command line.

A file has one section a settings model: `[server] port = 8001`, `[engine] token_budget = 256`.
On the command line a field is `--token-budget 256` or, with its section, `--engine.token-budget`.
The options themselves are the pydantic fields; nothing about a field is repeated here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts.config import Dict

from sterna.core.errors import ConfigError
from sterna.core.lookup import unknown

if TYPE_CHECKING:
    from cyclopts import App, ArgumentCollection

SECTIONS = ("engine", "server")


def without_sections(arguments: Sequence[str]) -> list[str]:
    """`--engine.token-budget=5` to `--token-budget=5`: flags carry no section in cyclopts."""
    return [_without_section(argument) for argument in arguments]


def _without_section(argument: str) -> str:
    for section in SECTIONS:
        prefix = f"--{section}."
        if argument.startswith(prefix):
            return "--" + argument[len(prefix) :].removeprefix("engine.")
    return argument


def layer_files(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """cyclopts hook: give the values of the --config files to the options left unset.

    Raises ConfigError for a file that cannot be read or has an unknown section; cyclopts itself
    refuses an unknown key with the nearest name.
    """
    option = next((arg for arg in arguments if "--config" in arg.names), None)
    if option is None or not option.tokens:
        return
    files = [Path(token.value) for token in option.tokens]
    merged = merge(read_sections(path) for path in files)
    wanted = {name for arg in arguments for name in arg.names}
    flat = {
        key: value
        for section, values in merged.items()
        for key, value in values.items()
        if _belongs(section, wanted)
    }
    source = ", ".join(str(path) for path in files)
    Dict(flat, use_commands_as_keys=False, source=source)(app, commands, arguments)


def _belongs(section: str, options: set[str]) -> bool:
    """Whether this verb has the section's settings: one file may serve several verbs."""
    return section != "server" or "--port" in options


def read_sections(path: Path) -> dict[str, dict[str, Any]]:
    """One TOML file as {section: {field: value}}; ConfigError names the file and the fault."""
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        reason = f"cannot read settings {path}: {error.strerror}; give an existing TOML file"
        raise ConfigError(reason) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings {path} are no TOML: {error}") from error
    for section, values in document.items():
        if section not in SECTIONS:
            raise ConfigError(f"{path}: {unknown('section', section, SECTIONS)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section!r} is no section; write [{section}] field = value")
    return document


def merge(layers: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Layers left to right, field by field; the last one that sets a field wins."""
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, values in layer.items():
            merged.setdefault(section, {}).update(values)
    return merged

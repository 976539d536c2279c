"""Where Sterna keeps files, and how it writes them: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sterna.core.errors import ConfigError, SternaError


def home() -> Path:
    """The folder for caches and settings: `STERNA_HOME`, else `~/.cache/sterna`."""
    override = os.environ.get("STERNA_HOME")
    return Path(override) if override else Path.home() / ".cache" / "sterna"


def refuse_existing(output: Path, error: type[SternaError] = ConfigError) -> None:
    """Raises `error` where a folder is to be written and something is there; an empty one is not.

    The message names the flag --output.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise error(f"{output}: is there already; remove it or choose another --output")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that readers see the old or the new content, never a part.

    Raises OSError (disk full, no permission) with the old file untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode() if isinstance(data, str) else data
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise

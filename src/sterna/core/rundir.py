"""Where Sterna keeps files, and how it writes them: whole or not at all."""

from __future__ import annotations

import fcntl
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


class FolderLock:
    """Keeps a folder to one process: `take` is False while another one holds it.

    An advisory lock on the folder itself: no file, and the system frees it however a process ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd: int | None = None

    def take(self) -> bool:
        """Hold the folder, which has to exist. Where the file system knows no locks: True."""
        fd = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:
            os.close(fd)
            return True
        self._fd = fd
        return True

    def release(self) -> None:
        """Let others have it; does nothing when it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

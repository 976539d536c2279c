"""Results worth keeping, as files under STERNA_HOME: whole and sound, or made again.

The name of a file is a hash of all that its content depends on, so that nothing is ever stale. Its
last 16 bytes are a checksum. A home that cannot be written costs time, never a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from sterna.core.log import get_logger
from sterna.core.rundir import home, write_atomic

_log = get_logger(__name__)
_SUM = 16


def kept(kind: str, key: str, make: Callable[[], bytes]) -> bytes:
    """The bytes that `make` gives for `key`, made once; damaged ones are made again."""
    path = _path(kind, key)
    found = _read(path)
    if found is not None:
        return found
    made = make()
    try:
        write_atomic(path, made + _sum(made))
    except OSError as error:
        _log.warning("%s cannot be kept (%s); it will be made again next time", path, error)
    return made


def _path(kind: str, key: str) -> Path:
    return home() / kind / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _read(path: Path) -> bytes | None:
    """A file's content without its checksum; None when it is missing or damaged."""
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s cannot be read (%s); making it again", path, error)
        return None
    if len(whole) < _SUM or _sum(whole[:-_SUM]) != whole[-_SUM:]:
        _log.warning("%s is damaged; making it again", path)
        return None
    return whole[:-_SUM]


def _sum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_SUM).digest()

"""OpenAI batch JSONL on disk: requests in, results out, safe against kill -9.

A result is one line, written by one write call and synced before it counts as done. A run that
died leaves at most one torn last line, which the next run cuts off; every id already in the
output is skipped. So after any number of crashes each request has exactly one result line.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sterna.core.errors import ConfigError, SternaError

# How each result line begins.
_HEAD = b'{"id": "batch_req_'
ROUTES = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input. `fault` says why it cannot be sent, and then is its result."""

    custom_id: str
    path: str
    body: dict[str, Any]
    fault: str = ""


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """The requests of an input file, in order, one line at a time; blank lines are skipped.

    Raises ConfigError when the file cannot be read. A broken line is yielded with its `fault`.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_request(line, number)
    except OSError as error:
        raise ConfigError(f"cannot read requests {path}: {error.strerror}") from error


def parse_request(line: bytes, number: int) -> BatchRequest:
    """One input line; `{"prompt": ...}` and `{"messages": ...}` alone are short forms."""
    fallback_id = f"line-{number}"
    try:
        entry = json.loads(line)
    except ValueError as error:  # also UnicodeDecodeError
        return BatchRequest(fallback_id, "", {}, f"line {number} is no JSON: {error}")
    if not isinstance(entry, dict):
        return BatchRequest(fallback_id, "", {}, f"line {number} is no JSON object")
    custom_id = str(entry.get("custom_id", fallback_id))
    if "body" not in entry:
        return _short_form(custom_id, entry, number)
    path = str(entry.get("url", ROUTES[0]))
    if path not in ROUTES:
        fault = f"line {number}: url {path!r} is not one of {', '.join(ROUTES)}"
        return BatchRequest(custom_id, path, {}, fault)
    if not isinstance(entry["body"], dict):
        return BatchRequest(custom_id, path, {}, f"line {number}: body is no JSON object")
    return BatchRequest(custom_id, path, entry["body"])


def _short_form(custom_id: str, entry: dict[str, Any], number: int) -> BatchRequest:
    body = {key: value for key, value in entry.items() if key != "custom_id"}
    if "messages" in body:
        return BatchRequest(custom_id, ROUTES[0], body)
    if "prompt" in body:
        return BatchRequest(custom_id, ROUTES[1], body)
    fault = f"line {number} has none of body, messages, prompt"
    return BatchRequest(custom_id, "", {}, fault)


def count_requests(requests: Iterable[BatchRequest]) -> int:
    """How many requests; ConfigError when two share a custom_id, since one would be lost."""
    seen: set[str] = set()
    for request in requests:
        if request.custom_id in seen:
            raise ConfigError(
                f"custom_id {request.custom_id!r} occurs twice in the input; make ids unique"
            )
        seen.add(request.custom_id)
    return len(seen)


class ResultFile:
    """The output file, open for appending and locked against a second run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self.finished: set[str] = set()

    def __enter__(self) -> ResultFile:
        """Lock, cut a torn last line, learn the finished ids. ConfigError when impossible."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write results {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise ConfigError(f"another run is writing {self._path}; wait for it") from error
        self._recover()
        return self

    def _recover(self) -> None:
        sound_bytes = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self._check_torn(line, sound_bytes)
                    break
                self.finished.add(self._finished_id(line, sound_bytes))
                sound_bytes += len(line)
        os.ftruncate(self._fd, sound_bytes)

    def _check_torn(self, line: bytes, offset: int) -> None:
        """Only half a result may be cut off; a last line of somebody else's is not ours to cut."""
        if not (line.startswith(_HEAD) or _HEAD.startswith(line)):
            raise self._foreign(offset)

    def _foreign(self, offset: int) -> ConfigError:
        message = f"{self._path} has no batch result at byte {offset}; give another --output"
        return ConfigError(message)

    def _finished_id(self, line: bytes, offset: int) -> str:
        try:
            entry = json.loads(line)
            _ = entry["response"], entry["error"]  # a request has neither
            return str(entry["custom_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign(offset) from error

    def append(self, line: bytes) -> None:
        """Write one line and sync it; SternaError (disk full) leaves no half line behind."""
        end = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError("disk full")
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, end)
            raise SternaError(
                f"cannot write {self._path}: {error}; free space, run again"
            ) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)


def result_line(
    custom_id: str, status: int, body: Any, fault: str = "", request_id: str = ""
) -> bytes:
    """One output line as OpenAI's batch API writes it."""
    response = None if fault else {"status_code": status, "request_id": request_id, "body": body}
    error = {"code": "invalid_line", "message": fault} if fault else None
    entry = {
        "id": f"batch_req_{custom_id}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"

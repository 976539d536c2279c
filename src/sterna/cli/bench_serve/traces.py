"""Arrival traces of real services: which lengths came when.

Azure LLM inference traces: CSV `TIMESTAMP,ContextTokens,GeneratedTokens`. Mooncake traces: JSONL
with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, one id for each 512-token
block of the prompt; requests with equal leading ids share that prefix.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

from sterna.core.errors import ConfigError

MOONCAKE_BLOCK = 512
_AZURE_FIELDS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace; `at_s` counts from the trace's first request."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()


def read_trace(path: Path, limit: int) -> list[Arrival]:
    """The first `limit` requests of a trace, its format told by its first line.

    Raises ConfigError for a file that is missing, of neither format, or broken (names the line).
    """
    try:
        with path.open() as file:
            first = file.readline()
            file.seek(0)
            if first.lstrip().startswith("{"):
                return list(islice(_mooncake(file, path), limit))
            if first.strip().split(",") == _AZURE_FIELDS:
                return list(islice(_azure(file, path), limit))
    except OSError as error:
        raise ConfigError(f"cannot read trace {path}: {error.strerror}") from error
    raise ConfigError(
        f"trace {path} starts with {first.strip()[:60]!r}; known are Azure CSV "
        f"({','.join(_AZURE_FIELDS)}) and Mooncake JSONL (timestamp, input_length, output_length)"
    )


def _mooncake(lines: Iterator[str], path: Path) -> Iterator[Arrival]:
    start: float | None = None
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            at_s = float(entry["timestamp"]) / 1000
            start = at_s if start is None else start
            lengths = int(entry["input_length"]), int(entry["output_length"])
            yield Arrival(at_s - start, *lengths, tuple(entry.get("hash_ids", ())))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"trace {path} line {number} is broken: {error!r}") from error


def _azure(lines: Iterator[str], path: Path) -> Iterator[Arrival]:
    start: datetime | None = None
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            # Seven decimals; datetime takes six.
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            start = at if start is None else start
            lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            yield Arrival((at - start).total_seconds(), *lengths)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"trace {path} line {number} is broken: {error!r}") from error

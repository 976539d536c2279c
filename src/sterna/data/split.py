"""Parts of the examples, such as 2:4:4 for three steps of alignment: no prompt is in two of them.

Every prompt has a number, a hash of its words and the seed. Rows in the order of these numbers are
cut where the shares say; rows of one prompt stay together, so that

- a part has its share of all rows to within one prompt's rows (one, where no prompt is repeated);
- the order of files and rows does not matter;
- rows that are added move the cuts by the little that chance moves a quantile, and with them few
  of the old rows.

All sources are cut together, or a prompt in two of them could be in two parts. The hashes of a
source's prompts (8 bytes a row) are kept by the content of its files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sterna.core.kept import kept
from sterna.data.order import mix

Keys = NDArray[np.uint64]
_VERSION = 1
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
_SHOWN = 50_000  # rows that take over 2 s or so
_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def prompt_key(text: str) -> bytes:
    """8 bytes that tell prompts apart."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def source_keys(source: Any) -> Keys:
    """The key of each row's prompt, [n]; read once for the content of the source's files."""
    config = source.config
    facts = (_VERSION, source.fingerprint(), source.format, sorted(config.fields.items()))
    found = kept(
        "prompts", repr((*facts, config.documents)), lambda: b"".join(source.prompt_keys())
    )
    return np.frombuffer(found, "<u8").astype(np.uint64)


def _read_keys(source: Any) -> bytes:
    from rich.console import Console
    from rich.progress import track

    keys, size = source.prompt_keys(), source.num_rows
    options: dict[str, Any] = {"console": Console(stderr=True), "transient": True}
    shown = track(keys, "reading prompts", size, disable=size < _SHOWN, **options)
    return b"".join(shown)


def rows_of_part(
    keys: Sequence[Keys], shares: Sequence[float], part: int, seed: int
) -> list[NDArray[np.int64]]:
    """The rows of each source (by its keys) that are in a part, ascending."""
    numbers = _mixed(np.concatenate(keys), mix(seed, 17))
    ordered = np.sort(numbers)
    places = np.searchsorted(ordered, numbers, "left")  # the same for all rows of a prompt
    cuts = _cuts(ordered, shares)
    is_in = (places >= cuts[part]) & (places < cuts[part + 1])
    ends = np.cumsum([len(one) for one in keys])[:-1]
    return [np.flatnonzero(mask) for mask in np.split(is_in, ends)]


def _cuts(ordered: Keys, shares: Sequence[float]) -> list[int]:
    """How many rows lie before each part, and before the end; `ordered` ascending."""
    wanted = np.cumsum(shares)[:-1] / np.sum(shares) * len(ordered)
    return [0, *(_cut(ordered, float(place)) for place in wanted), len(ordered)]


def _cut(ordered: Keys, wanted: float) -> int:
    """The place nearest to `wanted` that is not between rows of one prompt."""
    at = ordered[min(int(wanted), len(ordered) - 1)]
    low, high = (int(np.searchsorted(ordered, at, side)) for side in _SIDES)
    return high if high - wanted < wanted - low else low


def _mixed(values: Keys, key: int) -> Keys:
    """splitmix64 of each value and `key`; a bijection, so different prompts stay different."""
    state = (values ^ np.uint64(key)) + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_M1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_M2)
    found: Keys = state ^ (state >> np.uint64(31))
    return found

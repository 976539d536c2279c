"""Token ids in, text out, as early as it is certain.

Joining the pieces (every push, then flush) gives exactly `Tokenizer.decode` of all ids. Bytes of an
unfinished UTF-8 character wait for the rest of it, so a half character never shows as U+FFFD
before `flush`. A push costs about 1 us a token and nothing that grows with the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDecoder(Protocol):
    """Decodes the tokens of one sequence as they come."""

    def push(self, ids: Sequence[int]) -> str:
        """Take more tokens; returns the text that became certain (perhaps "")."""
        ...

    def flush(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character. Ends the sequence."""
        ...


class ByteDecoder:
    """For vocabularies whose tokens are bytes. `lead` spaces at the very start are dropped."""

    def __init__(self, piece: Callable[[int], bytes], lead: int = 0) -> None:
        self._piece = piece
        self._lead = lead
        self._decode = _new_utf8_decoder("replace").decode

    def push(self, ids: Iterable[int]) -> str:
        data = b"".join(map(self._piece, ids))
        if self._lead:
            data = self._drop_lead(data)
        return self._decode(data)

    def flush(self) -> str:
        return self._decode(b"", True)

    def _drop_lead(self, data: bytes) -> bytes:
        while self._lead and data:
            if not data.startswith(b" "):
                self._lead = 0
                break
            data = data[1:]
            self._lead -= 1
        return data


class WholeDecoder:
    """For vocabularies where a token's text depends on its neighbours: nothing before the end."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        self._ids.extend(ids)
        return ""

    def flush(self) -> str:
        return self._decode(self._ids)

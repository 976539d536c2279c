"""Which bytes a token stands for.

Text is decoded by joining token bytes and reading them as UTF-8, because that is the one rule that
stays exact when a character is spread over several tokens. Two families of vocabulary allow it:
byte-level BPE, whose tokens spell each byte as one printable character (GPT-2's table), and
SentencePiece, whose tokens are text with U+2581 for a space plus `<0xAB>` tokens for lone bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class PieceScheme:
    """How a vocabulary spells bytes. `lead` spaces at the start of a decoded text are dropped."""

    to_bytes: Callable[[str], bytes]
    lead: int = 0


@dataclass(slots=True)
class _Steps:
    byte_level: bool = False
    byte_fallback: bool = False
    replacements: list[tuple[str, str]] = field(default_factory=list)
    lead: int = 0


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest moves to U+0100.."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def scheme_from_decoder(decoder_json: str | bytes | None) -> PieceScheme | None:
    """The scheme that a `tokenizers` decoder (its JSON) describes.

    None for decoders that are not a map of each token to bytes (WordPiece, CTC and the like).
    """
    if decoder_json is None:
        return None
    decoder = json.loads(decoder_json)
    steps = _Steps()
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if not all(_apply_step(steps, part) for part in parts):
        return None
    if steps.byte_level:
        return PieceScheme(partial(_byte_level_bytes, byte_alphabet()), steps.lead)
    to_bytes = partial(_text_bytes, tuple(steps.replacements), steps.byte_fallback)
    return PieceScheme(to_bytes, steps.lead)


def _apply_step(steps: _Steps, part: dict[str, object]) -> bool:
    """Note one decoder step; False when it is of a kind that this module does not know."""
    match part:
        case {"type": "ByteLevel"}:
            steps.byte_level = True
        case {"type": "ByteFallback"}:
            steps.byte_fallback = True
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            steps.replacements.append((old, new))
        case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
            steps.lead = start
        case {"type": "Metaspace", "replacement": str(mark), **rest}:
            steps.replacements.append((mark, " "))
            steps.lead = 0 if rest.get("prepend_scheme") == "never" else 1
        case {"type": "Fuse"}:
            pass
        case _:
            return False
    return True


def _byte_level_bytes(alphabet: dict[str, int], token: str) -> bytes:
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:  # not spelled in the alphabet, so the token is plain text
        return token.encode()


def _text_bytes(
    replacements: tuple[tuple[str, str], ...], byte_fallback: bool, token: str
) -> bytes:
    if byte_fallback and (lone := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(lone.group(1), 16)])
    for old, new in replacements:
        token = token.replace(old, new)
    return token.encode()

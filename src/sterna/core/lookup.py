"""Nearest names, so that an unknown word is answered with the word that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to `word`, or None when nothing is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """One sentence for an unknown name: what was given, what is allowed, what was meant."""
    names = sorted(known)
    hint = nearest(word, names)
    meant = f"; did you mean {hint!r}?" if hint else ""
    return f"unknown {kind} {word!r}{meant} (known: {', '.join(names)})"

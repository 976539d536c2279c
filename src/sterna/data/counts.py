"""What became of the rows of the sources: read, left out and why, tokenised, packed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from sterna.data.pack import IGNORE, Document


@dataclass(slots=True)
class Counts:
    """What became of the rows so far. `of` counts by name: rows, bad_rows, too_long (documents
    over seq_len), untrained (without a target), unfitting (answers that alone exceed seq_len),
    identical (pairs of one answer, left out), undesirable (left out where text is trained),
    documents, tokens, targets, packed_rows, capacity (packed_rows times seq_len), documents_N and
    tokens_N of source N."""

    NAMED: ClassVar[int] = 20  # rows left out whose place is kept
    of: Counter[str] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Add another's counts; the first 20 bad rows stay named."""
        self.of.update(other.of)
        self.bad_rows.extend(other.bad_rows[: self.NAMED - len(self.bad_rows)])

    def lost(self) -> str:
        """`of 32 rows 5 malformed, 3 documents too long, 1 without a target`; empty if none is."""
        names = {
            "bad_rows": "malformed",
            "too_long": "documents too long",
            "untrained": "without a target",
            "unfitting": "with answers beyond seq_len",
            "identical": "pairs of one answer",
            "undesirable": "undesirable",
        }
        lost = [f"{self.of[key]:,} {name}" for key, name in names.items() if self.of[key]]
        return f"of {self.of['rows']:,} rows {', '.join(lost)}" if lost else ""

    @property
    def fill(self) -> float:
        """The share of the packed rows' capacity that holds tokens (1.0 before any row)."""
        return self.of["tokens"] / self.of["capacity"] if self.of["capacity"] else 1.0

    def add_document(self, document: Document) -> None:
        """Count one more document."""
        size = len(document.tokens)
        self.of["documents"] += 1
        self.of["tokens"] += size
        self.of["targets"] += int(np.count_nonzero(document.targets != IGNORE))
        self.of[f"documents_{document.source}"] += 1
        self.of[f"tokens_{document.source}"] += size

"""The table of settings in docs/training.md is the recipe's own.

Regenerate: `python tests/arch/test_training_docs.py`.
"""

from __future__ import annotations

from pathlib import Path

from sterna.train.settings import markdown_table

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
BEGIN, END = "<!-- settings -->\n", "<!-- end -->"


def parts() -> tuple[str, str, str]:
    head, rest = DOCS.read_text().split(BEGIN)
    table, tail = rest.split(END)
    return head, table, tail


def test_the_table_is_the_recipes():
    assert parts()[1] == markdown_table()


if __name__ == "__main__":
    head, _, tail = parts()
    DOCS.write_text(head + BEGIN + markdown_table() + END + tail)

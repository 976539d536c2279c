"""The table of settings in docs/alignment.md is the recipe's own.

Regenerate: `python tests/arch/test_alignment_docs.py`.
"""

from __future__ import annotations

from pathlib import Path

from sterna.align.offline.config import OfflineRecipe
from sterna.train.settings import all_settings

DOCS = Path(__file__).parents[2] / "docs" / "alignment.md"
BEGIN, END = "<!-- settings -->\n", "<!-- end -->"


def table() -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for setting in all_settings(OfflineRecipe):
        if setting.name.startswith(("preference.", "reward.")):
            lines.append(f"| `{setting.name}` | {setting.default} | {setting.meaning} |")
    return "\n".join(lines) + "\n"


def parts() -> tuple[str, str, str]:
    head, rest = DOCS.read_text().split(BEGIN)
    found, tail = rest.split(END)
    return head, found, tail


def test_the_table_is_the_recipes():
    assert parts()[1] == table()


if __name__ == "__main__":
    head, _, tail = parts()
    DOCS.write_text(head + BEGIN + table() + END + tail)

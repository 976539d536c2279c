"""The tables of settings in docs/alignment.md are the recipes' own.

Regenerate: `python tests/arch/test_alignment_docs.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from sterna.align.config import RlRecipe
from sterna.align.offline.config import OfflineRecipe
from sterna.align.pipeline.settings import pipeline_settings
from sterna.train.settings import Setting, all_settings

DOCS = Path(__file__).parents[2] / "docs" / "alignment.md"
END = "<!-- end -->"
# Sections that docs/training.md and docs/data-for-training.md list.
ELSEWHERE = ("model.", "optim.", "schedule.", "checkpoint.", "critic.optim.", "prompts.sources[].")


def offline() -> Iterator[Setting]:
    return (s for s in all_settings(OfflineRecipe) if s.name.startswith(("preference.", "reward.")))


def online() -> Iterator[Setting]:
    return (s for s in all_settings(RlRecipe) if not s.name.startswith(ELSEWHERE))


TABLES = {"settings": offline, "online settings": online, "pipeline settings": pipeline_settings}


def table(settings: Iterable[Setting]) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for setting in settings:
        meaning = setting.meaning.replace("|", "\\|")
        lines.append(f"| `{setting.name}` | {setting.default} | {meaning} |")
    return "\n".join(lines) + "\n"


def parts(name: str) -> tuple[str, str, str]:
    head, rest = DOCS.read_text().split(f"<!-- {name} -->\n")
    found, tail = rest.split(END, 1)
    return head, found, tail


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_the_recipes(name):
    assert parts(name)[1] == table(TABLES[name]())


if __name__ == "__main__":
    for name, settings in TABLES.items():
        head, _, tail = parts(name)
        DOCS.write_text(f"{head}<!-- {name} -->\n{table(settings())}{END}{tail}")

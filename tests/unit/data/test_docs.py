"""The tables of docs/data-for-training.md are those of the settings models."""

from __future__ import annotations

from pathlib import Path

from pydantic_core import PydanticUndefined

from sterna.data.config import DataConfig, SourceConfig

PAGE = Path(__file__).parents[3] / "docs" / "data-for-training.md"


def table(model, section):
    lines = [f"`{section}`", "", "| setting | default | what |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"`{default!r}`"
        lines.append(f"| `{name}` | {shown} | {field.description} |")
    return "\n".join(lines)


def tables():
    return "\n\n".join([table(DataConfig, "[data]"), table(SourceConfig, "[[data.sources]]")])


def test_the_page_has_the_settings():
    assert tables() in PAGE.read_text(), f"write this at the end of {PAGE.name}:\n{tables()}"

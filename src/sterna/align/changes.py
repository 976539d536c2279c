"""In what two recipes differ. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from sterna.align.config import PromptSection, RlRecipe


def changed(old: RlRecipe, new: RlRecipe) -> dict[str, tuple[object, object]]:
    """Dotted key -> (value in `old`, value in `new`) where they differ."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = dict.fromkeys((*before, *after))
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def from_defaults(recipe: RlRecipe) -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, value) of what a recipe sets."""
    prompts = PromptSection(task="-")  # has no default: "-" stands for none
    for key, (old, new) in changed(RlRecipe(prompts=prompts), recipe).items():
        yield key, "" if old in (None, "-") else str(old), "" if new is None else str(new)

"""Settings of training on recorded preferences: kinds reward, dpo and kto. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from sterna.data.config import DataConfig, Rows
from sterna.train.config import Recipe, Section

OfflineKind = Literal["reward", "dpo", "kto"]
# What a row of data becomes for each kind.
ROWS: dict[str, Rows] = {"reward": "pairs", "dpo": "pairs", "kto": "labelled"}


class PreferenceSection(Section):
    """Of kinds dpo and kto: the loss, and what the policy is compared with."""

    beta: float = Field(default=0.1, gt=0, description="how far the policy may leave its reference")
    loss: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid", description="dpo: arXiv 2305.18290, or 2310.12036"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="dpo: share of pairs that are the wrong way (cDPO)"
    )
    desirable_weight: float = Field(default=1.0, ge=0, description="kto: of desirable answers")
    undesirable_weight: float = Field(default=1.0, ge=0, description="kto: of the others")
    reference: Literal["auto", "copy", "adapter", "precomputed"] = Field(
        default="auto",
        description="a frozen copy; the base with the adapter off; or log-probs computed once and "
        "kept. auto = adapter where there is one, else copy",
    )
    reference_path: str = Field(
        default="", description="another reference than the model as it starts"
    )


class RewardModelSection(Section):
    """Of kind reward."""

    loss: Literal["last", "tokens"] = Field(
        default="last",
        description="score at the last token, EOS included; or at every token from where the two "
        "answers part, as in DeepSpeed-Chat",
    )
    out_of_domain: DataConfig | None = Field(
        default=None, description="pairs of another kind, evaluated beside the held-out ones"
    )


class OfflineRecipe(Recipe):
    """A training recipe on preferences."""

    kind: OfflineKind = Field(default="dpo", description="reward, dpo or kto")
    preference: PreferenceSection = PreferenceSection()
    reward: RewardModelSection = RewardModelSection()

    @model_validator(mode="before")
    @classmethod
    def _rows_of_the_kind(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        rows = ROWS.get(values.get("kind", "dpo"), "pairs")
        changed = dict(values)
        for path in (("data",), ("eval", "data"), ("reward", "out_of_domain")):
            _set_rows(changed, path, rows)
        return changed

    @model_validator(mode="after")
    def _reference_fits(self) -> OfflineRecipe:
        chosen = self.preference
        if chosen.reference == "adapter" and self.adapter is None:
            raise ValueError(
                'preference.reference = "adapter" is the base of an [adapter], and there is none'
            )
        if chosen.reference == "adapter" and chosen.reference_path:
            raise ValueError("preference.reference_path is another model than the adapter's base")
        return self


def _set_rows(values: dict[str, Any], path: tuple[str, ...], rows: Rows) -> None:
    """Set `rows` of the data section at a path, where there is one."""
    *outer, name = path
    for key in outer:
        inner = values.get(key)
        if not isinstance(inner, Mapping):
            if inner is not None:
                inner = inner.model_dump()
            else:
                return
        values[key] = dict(inner)
        values = values[key]
    found = values.get(name)
    if found is None:
        return
    section = found.model_dump() if isinstance(found, DataConfig) else dict(found)
    if section.get("rows", "text") not in ("text", rows):
        raise ValueError(f"data.rows is set by the kind, to {rows}; leave it out")
    values[name] = {**section, "rows": rows}

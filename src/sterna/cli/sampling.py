"""The sampling options of `chat` and `complete`, as fields of an OpenAI request body."""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field

from sterna.core.errors import ConfigError


class SamplingOptions(BaseModel):
    """What the user set; fields left unset are not sent, so the server's defaults hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int | None = Field(default=None, gt=0, description="longest completion")
    temperature: float | None = Field(default=None, ge=0, description="0 = greedy")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="nucleus: smallest set of this mass"
    )
    top_k: int | None = Field(default=None, ge=0, description="only the k most probable; 0 = off")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="cut below this share of the top"
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="for tokens seen")
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="for each time seen"
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="factor for tokens seen"
    )
    seed: int | None = Field(default=None, description="the same seed gives the same tokens")
    stop: tuple[str, ...] = Field(default=(), description="strings that end the completion")
    ignore_eos: bool = Field(default=False, description="go on past the end-of-text token")
    json_schema: str = Field(default="", description="JSON schema (text) the completion must obey")

    def body(self) -> dict[str, Any]:
        """The set fields as they stand in a request body; ConfigError for a broken schema."""
        fields = self.model_dump(exclude_defaults=True)
        if "stop" in fields:
            fields["stop"] = list(fields["stop"])
        if schema := fields.pop("json_schema", ""):
            fields["response_format"] = _response_format(schema)
        return fields


def _response_format(schema: str) -> dict[str, Any]:
    try:
        parsed = json.loads(schema)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--json-schema is no JSON: {error}", param="json_schema") from error
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": parsed}}


Sampling = Annotated[SamplingOptions, Parameter(name="*", group="Sampling")]
DEFAULT_SAMPLING = SamplingOptions()

"""Server settings. Field descriptions are the help text and the docs table. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sterna.core.errors import ConfigError
from sterna.engine.config import EngineConfig


class ServerConfig(BaseModel):
    """What is served, to whom, and within which limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("", description="folder, .gguf file or hub name; empty = the default model")
    served_model_name: tuple[str, ...] = Field(
        (), description="names clients may ask for; empty = the model's own name"
    )
    host: str = Field("127.0.0.1", description="address to listen on; loopback by default")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 = any free one")
    api_key: tuple[str, ...] = Field(
        (), repr=False, description="keys that open every route but /health; none = open"
    )
    api_key_file: Path | None = Field(
        None, description="file of keys, one a line (a command line is visible to other users)"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="web origins that may call from a browser; none = same origin only"
    )
    ssl_certfile: Path | None = Field(None, description="PEM certificate chain; serves HTTPS")
    ssl_keyfile: Path | None = Field(None, description="PEM private key of the certificate")
    max_body_bytes: int = Field(
        8 * 2**20, gt=0, description="largest HTTP body in bytes; larger ones get 413"
    )
    body_timeout_s: float = Field(30.0, gt=0, description="seconds a client may take to send it")
    default_deadline_s: float | None = Field(
        None, gt=0, description="deadline of requests that bring none; None = no deadline"
    )
    max_deadline_s: float = Field(
        3600.0, gt=0, description="longest deadline in seconds that a request may ask for"
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="seconds that running requests get after SIGTERM or SIGINT"
    )
    metrics_prefix: Literal["sterna", "vllm"] = Field(
        "sterna", description="prefix of the metric names; vllm = dashboards made for vLLM fit"
    )
    tool_style: Literal["auto", "hermes", "json"] = Field(
        "auto", description="how the model writes tool calls; auto = from its chat template"
    )
    log_requests: bool = Field(True, description="log one line for each finished request")
    engine: EngineConfig = Field(
        default_factory=lambda: EngineConfig.model_validate({}), description="engine settings"
    )

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        # An unset shell variable would open the server to `Bearer ` while it looks locked.
        if any(not key or key != key.strip() for key in self.api_key):
            raise ValueError("api_key is empty or has blanks around it; give a key or leave it out")
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile go together: give both or none")
        return self

    def keys(self) -> tuple[str, ...]:
        """All accepted API keys. Raises ConfigError when the key file cannot be read."""
        if self.api_key_file is None:
            return self.api_key
        try:
            lines = self.api_key_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read api_key_file {self.api_key_file}: {error}") from error
        found = tuple(line.strip() for line in lines if line.strip())
        if not found:
            raise ConfigError(f"api_key_file {self.api_key_file} holds no key; write one a line")
        return self.api_key + found

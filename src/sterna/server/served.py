"""The constant facts of one deployment: what is served, on what, with which settings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sterna.core.errors import UnknownModelError
from sterna.core.lookup import unknown
from sterna.core.machine import fingerprint
from sterna.server.config import ServerConfig

if TYPE_CHECKING:
    from sterna.engine.aio import AsyncEngine
    from sterna.engine.embed_aio import AsyncEmbedder


@dataclass(frozen=True, slots=True)
class ServedModel:
    """For /v1/models, /engine/state and the log."""

    names: tuple[str, ...]  # what clients may ask for; the first is the canonical one
    root: str  # where the model was loaded from
    created: int  # Unix seconds
    max_model_len: int  # tokens
    token_budget: int  # tokens in one step
    num_kv_blocks: int
    block_size: int  # tokens
    policy: str
    speculation: str  # the drafters in use, or off
    prompt_layers: str
    kernels: str
    machine: str

    def check(self, asked: str | None) -> str:
        """The name to answer with; UnknownModelError for a model that is not served."""
        if asked is None:
            return self.names[0]
        if asked not in self.names:
            raise UnknownModelError(unknown("model", asked[:200], self.names), param="model")
        return asked


def describe(engine: AsyncEngine, config: ServerConfig) -> ServedModel:
    """Read the facts once; none of them changes while the server runs."""
    from sterna.kernels.load import load_kernels
    from sterna.model.hub import resolve_model

    core = engine.engine
    root = str(resolve_model(config.model))
    return ServedModel(
        names=config.served_model_name or (_name(config.model, root),),
        root=config.model or Path(root).name,
        created=int(time.time()),
        max_model_len=core.limits.max_model_len,
        token_budget=core.scheduler.token_budget,
        num_kv_blocks=core.pool.num_usable,
        block_size=core.config.block_size,
        policy=core.config.policy,
        speculation=", ".join(core.drafter_names) or "off",
        prompt_layers=core.prompt_layers,
        # A CUDA device runs the reference ops, whatever was built for the CPU.
        kernels="reference" if core.config.device != "cpu" else load_kernels().level,
        machine=fingerprint().line(),
    )


def describe_embedder(engine: AsyncEmbedder, config: ServerConfig) -> ServedModel:
    """The same facts of an embedding model, which has no KV cache."""
    from sterna.kernels.load import load_kernels
    from sterna.model.hub import resolve_model

    root = str(resolve_model(config.model))
    return ServedModel(
        names=config.served_model_name or (_name(config.model, root),),
        root=config.model or Path(root).name,
        created=int(time.time()),
        max_model_len=engine.embedder.max_tokens,
        token_budget=engine.embedder.token_budget,
        num_kv_blocks=0,
        block_size=0,
        policy="embed",
        speculation="off",
        prompt_layers="all",
        kernels="reference" if engine.config.device != "cpu" else load_kernels().level,
        machine=fingerprint().line(),
    )


def _name(model: str, root: str) -> str:
    """A hub name as it is; a folder's name; a file's name without .gguf."""
    path = Path(root)
    if model and not Path(model).expanduser().exists():
        return model
    return path.stem if path.suffix == ".gguf" else path.resolve().name

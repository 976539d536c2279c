"""`sterna serve`: the OpenAI server in the foreground, until a signal drains it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from pydantic import ValidationError, create_model

from sterna.cli.failures import describe_validation
from sterna.cli.flags import DEFAULT_ENGINE, ConfigFiles, EngineOptions, changed
from sterna.core.errors import ConfigError
from sterna.core.log import get_logger, setup_logging
from sterna.server.config import ServerConfig

_log = get_logger(__name__)

# The model is the verb's argument and the engine has its own group of flags, so the server's flags
# are the remaining fields.
_OWN_FIELDS = {
    name: (field.annotation, field)
    for name, field in ServerConfig.model_fields.items()
    if name not in ("model", "engine")
}

if TYPE_CHECKING:
    ServerOptions = ServerConfig
else:
    ServerOptions = create_model(
        "ServerOptions", __config__=ServerConfig.model_config, **_OWN_FIELDS
    )
_DEFAULT_SERVER = ServerOptions.model_validate({})


def serve(
    model: str = "",
    /,
    *,
    config: ConfigFiles = (),
    server: Annotated[ServerOptions, Parameter(name="*", group="Server")] = _DEFAULT_SERVER,
    engine: EngineOptions = DEFAULT_ENGINE,
) -> int:
    """Serve a model over the OpenAI API, with a page.

    Parameters
    ----------
    model
        Folder, GGUF file or name; empty is the default model.
    """
    setup_logging()
    fields = {name: getattr(server, name) for name in _OWN_FIELDS}
    try:
        settings = ServerConfig.model_validate({**fields, "model": model, "engine": engine})
    except ValidationError as error:
        raise ConfigError(describe_validation(error)) from error
    if differing := {**changed(server), **changed(engine)}:
        _log.info("settings that differ from the defaults: %s", _masked(differing))

    from sterna.server.run import serve as run_server

    return run_server(settings)


def _masked(settings: dict[str, object]) -> str:
    shown = {name: "..." if name == "api_key" else value for name, value in settings.items()}
    return ", ".join(f"{name}={value}" for name, value in sorted(shown.items()))

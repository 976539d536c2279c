"""The tokenizer of a model folder in Hugging Face layout.

Files read, all small but the first: tokenizer.json (or vocab.json + merges.txt of older GPT-2 style
models), tokenizer_config.json, chat_template.jinja, generation_config.json, config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.text.spec import TokenizerSpec, turn_end_ids, unique

_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def read_folder(folder: Path) -> TokenizerSpec:
    """The tokenizer of a folder.

    Raises ModelFileError for a file that does not parse and UnsupportedModelError when the folder
    has no tokenizer that Sterna reads.
    """
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
    backend = _read_backend(folder, config, special_tokens)
    _add_declared(backend, config, special_tokens)
    template = _chat_template(folder, config)
    bos = special_tokens.get("bos_token")
    return TokenizerSpec(
        backend=backend,
        eos_token_ids=_end_ids(folder, backend, special_tokens, template),
        bos_token_id=backend.token_to_id(bos) if bos is not None else None,
        chat_template=template,
        special_tokens=special_tokens,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelFileError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: holds a JSON {type(value).__name__}, an object is needed")
    return value


def _read_backend(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> Backend:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ModelFileError(f"{path}: not a tokenizer ({error}); fetch it again") from error
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _gpt2_backend(folder, config, special_tokens)
    found = sorted(item.name for item in folder.iterdir() if "token" in item.name)
    raise UnsupportedModelError(
        f"{folder}: no tokenizer.json (found: {', '.join(found) or 'no tokenizer file'}); "
        "convert it once: transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def _gpt2_backend(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> Backend:
    """Byte-level BPE from the two files of GPT-2's days (OPT, GPT-2)."""
    try:
        model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ModelFileError(f"{folder}: vocab.json or merges.txt: {error}") from error
    backend = Backend(model)
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    bos = special_tokens.get("bos_token")
    if config.get("add_bos_token") and bos is not None:
        bos_id = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=None, special_tokens=[(bos, bos_id)]
        )
    return backend


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Token texts by role; a role is a string or an object with `content`."""
    found: dict[str, str] = {}
    for source in sources:
        for role in _ROLES:
            value = source.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found.setdefault(role, text)
    return found


def _add_declared(
    backend: Backend, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Special tokens that only tokenizer_config.json knows as such."""
    declared = config.get("added_tokens_decoder")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, item in sorted((declared or {}).items(), key=lambda pair: int(pair[0])):
        if item["content"] not in known:
            options = {key: bool(item.get(key)) for key in ("lstrip", "rstrip", "single_word")}
            token = AddedToken(
                item["content"],
                normalized=bool(item.get("normalized")),
                special=bool(item.get("special")),
                **options,
            )
            backend.add_tokens([token])
            known.add(item["content"])
    missing = [token for token in special_tokens.values() if token not in known]
    in_vocab = [token for token in missing if backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in in_vocab])


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else the config's; of several the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template")
    template = template or config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _end_ids(
    folder: Path, backend: Backend, special_tokens: Mapping[str, str], template: str | None
) -> tuple[int, ...]:
    ids: list[int] = []
    eos = special_tokens.get("eos_token")
    if eos is not None and (token_id := backend.token_to_id(eos)) is not None:
        ids.append(token_id)
    declared = _read_json(folder / "generation_config.json").get("eos_token_id")
    if declared is None:
        declared = _read_json(folder / "config.json").get("eos_token_id")
    ids.extend([declared] if isinstance(declared, int) else declared or [])
    return unique([*ids, *turn_end_ids(backend, template)])

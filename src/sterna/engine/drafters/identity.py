"""Whose outputs a file of past outputs holds: the weights and the tokenizer, by content.

Not the format that weights are rounded to at load: fp6 and bfloat16 of one model answer alike, and
a guess is verified anyway.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sterna.core.digest import file_digest
from sterna.text.tokenizer import Tokenizer

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def model_identity(path: Path, tokenizer: Tokenizer) -> str:
    """Two hashes. `path` is the model's folder or file, which was loaded; moving it changes none.

    A file over 256 MiB is hashed in pieces (core/digest.py).
    """
    files = [path] if path.is_file() else sorted(path.iterdir())
    sums = [file_digest(f) for f in files if f.is_file() and f.suffix in _WEIGHTS]
    weights = hashlib.blake2b("\n".join(sums).encode(), digest_size=16).hexdigest()
    return f"weights {weights}, tokenizer {tokenizer.fingerprint}"

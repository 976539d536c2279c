"""The file of past outputs: what the suffix drafter knows, kept over restarts.

    magic, version, header length     16 bytes
    header                            JSON: identity, tenants (hex), num_outputs, num_tokens
    per output: tenant, num_tokens    int32 [n, 2]
    all tokens                        int32
    sha256 of everything before       32 bytes

Little-endian. The tree is built again from the texts: smaller than the tree, and no file can make
a structure that was not grown. Answers of users are in it: it is readable by its owner alone, and
tenants are named by a hash.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import DraftCacheError
from sterna.core.rundir import write_atomic

MAGIC = b"STNDRAFT"
VERSION = 1
_HEAD = struct.Struct("<8sII")
_HASH_BYTES = 32


class Stored(NamedTuple):
    """One finished output and the hash of its tenant."""

    tenant: bytes
    tokens: Sequence[int] | NDArray[np.int32]


def save_outputs(path: Path, identity: str, outputs: Sequence[Stored]) -> None:
    """Write the file whole or not at all. OSError when it cannot be written."""
    tenants = sorted({output.tenant for output in outputs})
    place = {tenant: i for i, tenant in enumerate(tenants)}
    sizes = [(place[output.tenant], len(output.tokens)) for output in outputs]
    tokens = [np.asarray(output.tokens, "<i4") for output in outputs]
    header = {
        "identity": identity,
        "tenants": [tenant.hex() for tenant in tenants],
        "num_outputs": len(outputs),
        "num_tokens": sum(map(len, tokens)),
    }
    text = json.dumps(header).encode()
    parts = [_HEAD.pack(MAGIC, VERSION, len(text)), text, np.array(sizes, "<i4").tobytes()]
    data = b"".join(parts + [part.tobytes() for part in tokens])
    write_atomic(path, data + hashlib.sha256(data).digest())


def load_outputs(path: Path, identity: str) -> list[Stored]:
    """The outputs in the file, oldest first.

    DraftCacheError names the file that cannot be read, is damaged, or belongs to another model
    or version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DraftCacheError(f"{path} cannot be read: {error}") from error
    body = data[:-_HASH_BYTES]
    if len(body) < _HEAD.size or not data.startswith(MAGIC):
        raise DraftCacheError(f"{path} is not a file of past outputs")
    if hashlib.sha256(body).digest() != data[-_HASH_BYTES:]:
        raise DraftCacheError(f"{path} is damaged: its checksum does not fit")
    _, version, header_size = _HEAD.unpack_from(body)
    if version != VERSION:
        raise DraftCacheError(f"{path} has version {version}, this is {VERSION}")
    header = json.loads(body[_HEAD.size : _HEAD.size + header_size])
    if header["identity"] != identity:
        raise DraftCacheError(
            f"{path} holds outputs of another model ({header['identity']}; this is {identity})"
        )
    return _outputs(header, body[_HEAD.size + header_size :])


def put_aside(path: Path) -> str:
    """Rename a refused file to `*.refused`, over an earlier one, so that the next save does not
    end it; what was done, in words. Folders stay.
    """
    aside = path.with_name(path.name + ".refused")
    try:
        if path.is_file():
            path.replace(aside)
            return f"it is now {aside.name}"
    except OSError as error:
        return f"it cannot be renamed: {error}"
    return "name a file"


def _outputs(header: dict[str, Any], body: bytes) -> list[Stored]:
    tenants = [bytes.fromhex(name) for name in header["tenants"]]
    num_outputs = int(header["num_outputs"])
    numbers = np.frombuffer(body, "<i4").astype(np.int32)
    sizes = numbers[: 2 * num_outputs].reshape(num_outputs, 2)
    ends = np.cumsum(sizes[:, 1])
    tokens = np.split(numbers[2 * num_outputs :], ends[:-1]) if num_outputs else []
    return [Stored(tenants[i], part) for i, part in zip(sizes[:, 0], tokens, strict=True)]

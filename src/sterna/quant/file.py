"""The container of quantised weights: one safetensors file, version 1.

    8 bytes header length | JSON header, padded with spaces to 64 bytes | data

A quantised weight NAME is Sterna's own module name ("layers.3.attn.qkv": the fused weight, whose
tiles the kernels read where they lie) and has tensors `NAME.tiles`, `NAME.scales` and, for mixed
formats, `NAME.row_formats`. Everything else keeps its Hugging Face name and dtype. Tiles come
first: their sizes are multiples of 512 bytes, so every one of them is 64-byte aligned in a
mapping. Any safetensors reader opens the file; the header's `__metadata__` says the rest:

    sterna_version   "1"; another one is refused
    sterna_format    what the user asked for ("fp6")
    sterna_weights   {NAME: {elements, group_size, rows, in_features, is_gated}} as JSON
    sterna_elements  {element: sha256 of its float32 values} as JSON
    sterna_sha256    {tensor: sha256 of its bytes} as JSON
    sterna_seal      sha256 of the header with this value as 64 zeros

Reading maps the file and copies nothing. All checksums are compared (2 GB/s a core, which also
brings the file into memory); `verify=False` leaves the data's out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.core.machine import num_usable_cpus
from sterna.kernels.quant_weight import QuantWeight
from sterna.kernels.tiles import TILE_ROWS, tile_grid
from sterna.quant.formats import ELEMENTS, WeightFormat, value_table

FILE_NAME = "model.safetensors"
VERSION = "1"
ALIGNMENT = 64
MAX_HEADER_BYTES = 100_000_000  # as safetensors'
DTYPES: Mapping[str, torch.dtype] = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
BLANK = "0" * 64


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be stored."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A quantised weight, as `sterna_weights` describes it. rows: of one half when gated."""

    elements: tuple[str, ...]
    group_size: int
    rows: int
    in_features: int
    is_gated: bool

    @property
    def bits(self) -> int:
        """Bits a code."""
        return ELEMENTS[self.elements[0]].bits

    def tensors(self, name: str, scale_dtype: torch.dtype) -> list[TensorSpec]:
        """The tensors that hold it."""
        blocks, k_blocks = tile_grid(self.rows, self.in_features)
        blocks *= 2 if self.is_gated else 1
        groups = -(-self.in_features // self.group_size) if self.group_size else 1
        found = [
            TensorSpec(f"{name}.tiles", torch.uint8, (blocks, k_blocks, 128 * self.bits)),
            TensorSpec(f"{name}.scales", scale_dtype, (blocks, groups, TILE_ROWS)),
        ]
        if len(self.elements) > 1:
            found.append(TensorSpec(f"{name}.row_formats", torch.uint8, (blocks, TILE_ROWS)))
        return found


def weight_spec(fmt: WeightFormat, rows: int, in_features: int, is_gated: bool) -> WeightSpec:
    """The spec of a weight of `rows` rows in all ([gate; up] when gated) stored as `fmt`."""
    names = tuple(element.name for element in fmt.elements)
    return WeightSpec(names, fmt.group_size, rows // (1 + is_gated), in_features, is_gated)


def layout(specs: Iterable[TensorSpec]) -> dict[str, tuple[TensorSpec, int]]:
    """Offsets in the data section: tiles first, then by falling alignment of their sizes."""
    order = sorted(specs, key=lambda spec: (not spec.name.endswith(".tiles"), -_unit(spec)))
    places, offset = {}, 0
    for spec in order:
        places[spec.name] = (spec, offset)
        offset += spec.nbytes
    return places


def _unit(spec: TensorSpec) -> int:
    """The largest power of two up to 64 that divides the size, so that neighbours stay aligned."""
    return math.gcd(spec.nbytes, ALIGNMENT)


def header_bytes(
    places: Mapping[str, tuple[TensorSpec, int]],
    weights: Mapping[str, WeightSpec],
    format_name: str,
    sums: Mapping[str, str],
) -> bytes:
    """The length and the padded JSON. Its size does not depend on the values of `sums`."""
    entries = {
        name: {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        for name, (spec, offset) in places.items()
    }
    used = sorted({element for spec in weights.values() for element in spec.elements})
    metadata = {
        "format": "pt",
        "sterna_version": VERSION,
        "sterna_format": format_name,
        "sterna_weights": json.dumps({name: asdict(spec) for name, spec in weights.items()}),
        "sterna_elements": json.dumps({name: element_sum(name) for name in used}),
        "sterna_sha256": json.dumps({name: sums.get(name, BLANK) for name in places}),
        "sterna_seal": BLANK,
    }
    raw = json.dumps({"__metadata__": metadata, **entries}).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    raw = raw.replace(_seal_field(BLANK), _seal_field(hashlib.sha256(raw).hexdigest()))
    return len(raw).to_bytes(8, "little") + raw


def _seal_field(seal: str) -> bytes:
    return f'"sterna_seal": "{seal}"'.encode()


def element_sum(name: str) -> str:
    """sha256 of an element's values as little-endian float32."""
    values = value_table((name,))[0].numpy().astype("<f4")
    return hashlib.sha256(values.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Container:
    """An open container: quantised weights by module name, the rest by Hugging Face name."""

    path: Path
    format_name: str
    weights: dict[str, QuantWeight]
    rest: dict[str, Tensor]


def open_container(path: Path, verify: bool = True) -> Container:
    """Map a container. Tensors are views of the mapping (private: writes stay in memory).

    Raises ModelFileError naming the file and the fault for a truncated, altered or inconsistent
    file, UnsupportedModelError for another version or an element that is not ours.
    """
    mapped = _map(path)
    header, start = _read_header(path, mapped)
    try:
        return _assemble(path, header, mapped[start:], verify)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"{path}: inconsistent header ({error!r}); quantise again") from error


def _assemble(
    path: Path, header: dict[str, Any], data: np.ndarray[Any, Any], verify: bool
) -> Container:
    metadata = header.pop("__metadata__")
    tensors = {name: _tensor(path, name, entry, data) for name, entry in header.items()}
    _check_size(path, tensors, len(data))
    if verify:
        _check_sums(path, tensors, json.loads(metadata["sterna_sha256"]))
    _check_elements(path, json.loads(metadata["sterna_elements"]))
    specs = json.loads(metadata["sterna_weights"])
    weights = {name: _weight(path, name, spec, tensors) for name, spec in specs.items()}
    return Container(path, metadata["sterna_format"], weights, tensors)


def _map(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        return np.memmap(path, dtype=np.uint8, mode="c")
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: missing; quantise the model again") from error
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ModelFileError(f"{path}: cannot be read ({error}); quantise again") from error


def _read_header(path: Path, mapped: np.ndarray[Any, Any]) -> tuple[dict[str, Any], int]:
    """The checked header and where the data starts."""
    size = int.from_bytes(mapped[:8].tobytes(), "little")
    if len(mapped) < 8 or size > min(MAX_HEADER_BYTES, len(mapped) - 8):
        raise ModelFileError(
            f"{path}: truncated or no safetensors file ({len(mapped):,} bytes); quantise again"
        )
    raw = mapped[8 : 8 + size].tobytes()
    try:
        header: dict[str, Any] = json.loads(raw)
        version = header["__metadata__"].get("sterna_version")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFileError(f"{path}: damaged header ({error}); quantise again") from error
    if version != VERSION:
        raise UnsupportedModelError(
            f"{path}: container version {version!r}, this Sterna reads {VERSION!r}; "
            "update Sterna, or quantise the model again"
        )
    seal = str(header["__metadata__"].get("sterna_seal"))
    blank = raw.replace(_seal_field(seal), _seal_field(BLANK))
    if hashlib.sha256(blank).hexdigest() != seal:
        raise ModelFileError(f"{path}: the header has been altered; quantise the model again")
    return header, 8 + size


def _tensor(path: Path, name: str, entry: dict[str, Any], data: np.ndarray[Any, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    if end > len(data):
        raise ModelFileError(
            f"{path}: truncated: tensor {name!r} ends at byte {end:,} of the data, the file has "
            f"{len(data):,}; copy it again or quantise again"
        )
    flat = torch.from_numpy(data[begin:end])
    return flat.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _check_size(path: Path, tensors: Mapping[str, Tensor], num_bytes: int) -> None:
    wanted = sum(tensor.nbytes for tensor in tensors.values())
    if wanted != num_bytes:
        raise ModelFileError(
            f"{path}: {num_bytes:,} bytes of data, its header lists {wanted:,}; copy it again"
        )


def _check_sums(path: Path, tensors: Mapping[str, Tensor], sums: Mapping[str, str]) -> None:
    with ThreadPoolExecutor(num_usable_cpus()) as pool:  # hashlib releases the GIL
        found = dict(zip(tensors, pool.map(tensor_sum, tensors.values()), strict=True))
    bad = [name for name in tensors if sums.get(name) != found[name]]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ModelFileError(
            f"{path}: tensor {bad[0]!r}{more} has been altered (its checksum differs); "
            "copy the file again or quantise again"
        )


def tensor_sum(tensor: Tensor) -> str:
    """sha256 of a contiguous tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    view: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(view)


def _check_elements(path: Path, sums: Mapping[str, str]) -> None:
    for name, digest in sums.items():
        if name not in ELEMENTS or element_sum(name) != digest:
            raise UnsupportedModelError(
                f"{path}: element {name!r} is unknown here or has other values than here; "
                "update Sterna, or quantise the model again"
            )


def _weight(path: Path, name: str, spec: dict[str, Any], tensors: dict[str, Tensor]) -> QuantWeight:
    """Takes the weight's tensors out of `tensors`."""
    known = WeightSpec(**{**spec, "elements": tuple(spec["elements"])})
    scales = tensors.get(f"{name}.scales")
    for want in known.tensors(name, torch.float32 if scales is None else scales.dtype):
        got = tensors.get(want.name)
        if got is None or tuple(got.shape) != want.shape or got.dtype != want.dtype:
            found = "missing" if got is None else f"{tuple(got.shape)} {got.dtype}"
            raise ModelFileError(
                f"{path}: tensor {want.name!r} is {found}, {want.shape} {want.dtype} is needed; "
                "quantise the model again"
            )
    row_formats = tensors.pop(f"{name}.row_formats", None)
    if row_formats is not None and int(row_formats.max()) >= len(known.elements):
        raise ModelFileError(
            f"{path}: tensor '{name}.row_formats' names element {int(row_formats.max())} of "
            f"{len(known.elements)}; quantise the model again"
        )
    return QuantWeight(
        tensors.pop(f"{name}.tiles"),
        tensors.pop(f"{name}.scales"),
        value_table(known.elements),
        row_formats,
        known.bits,
        known.group_size,
        known.in_features,
        known.rows,
        known.is_gated,
    )

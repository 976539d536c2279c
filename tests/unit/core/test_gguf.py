"""The GGUF reader against the `gguf` package, and its answers to damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from sterna.core.errors import ModelFileError
from sterna.core.gguf import read_gguf
from sterna.core.gguf_types import GGMLType, block_layout

TOKENS = ["a", "", "caf\u00e9", "\U0001f426" * 3, "x" * 300]


def write_sample(path: Path, alignment: int | None = None) -> Path:
    """A file with every kind of metadata value and tensors of several types."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("v.u8", 200)
    writer.add_int8("v.i8", -5)
    writer.add_uint16("v.u16", 60_000)
    writer.add_int16("v.i16", -30_000)
    writer.add_uint32("v.u32", 4_000_000_000)
    writer.add_int32("v.i32", -7)
    writer.add_uint64("v.u64", 1 << 63)
    writer.add_int64("v.i64", -(1 << 62))
    writer.add_float32("v.f32", 1.5)
    writer.add_float64("v.f64", 0.1)
    writer.add_bool("v.bool", True)
    writer.add_string("v.string", "stern\u00e9")
    writer.add_array("v.tokens", TOKENS)
    writer.add_array("v.ints", [1, -2, 3])
    writer.add_array("v.floats", [0.5, 2.0])
    writer.add_array("v.bools", [True, False])
    writer.add_tensor("w.f32", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("w.f16", np.ones((2, 3, 4), np.float16))
    q8 = gguf.quantize(
        np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("w.q8", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_values(tmp_path):
    meta = read_gguf(write_sample(tmp_path / "m.gguf")).metadata
    assert meta["general.architecture"] == "llama"
    assert [meta[f"v.{k}"] for k in ("u8", "i8", "u16", "i16")] == [200, -5, 60_000, -30_000]
    assert [meta[f"v.{k}"] for k in ("u32", "i32", "u64", "i64")] == [
        4_000_000_000, -7, 1 << 63, -(1 << 62),
    ]  # fmt: skip
    assert meta["v.f32"] == 1.5
    assert meta["v.f64"] == 0.1
    assert meta["v.bool"] is True
    assert meta["v.string"] == "stern\u00e9"
    assert meta["v.tokens"] == TOKENS
    assert meta["v.ints"] == [1, -2, 3]
    assert meta["v.floats"] == [0.5, 2.0]
    assert meta["v.bools"] == [True, False]
    assert meta.get("absent") is None
    assert len(meta) == len(list(meta))


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_tensors_match_the_gguf_package(tmp_path, alignment):
    path = write_sample(tmp_path / "m.gguf", alignment)
    ours, oracle = read_gguf(path), gguf.GGUFReader(path)
    assert set(ours.tensors) == {t.name for t in oracle.tensors}
    for theirs in oracle.tensors:
        mine = ours.tensors[theirs.name]
        assert mine.shape == tuple(int(n) for n in theirs.shape)[::-1]
        assert (mine.offset, mine.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert mine.type.name == theirs.tensor_type.name
        assert ours.tensor_bytes(theirs.name).tobytes() == theirs.data.tobytes()


def test_type_table_matches_the_gguf_package():
    for theirs, sizes in gguf.constants.GGML_QUANT_SIZES.items():
        assert GGMLType(int(theirs)).name == theirs.name
        assert block_layout(GGMLType(int(theirs))) == sizes
    assert all(block_layout(kind) for kind in GGMLType)


def test_nested_arrays(tmp_path):
    inner = struct.pack("<IQ2i", 5, 2, 1, 2)
    value = struct.pack("<IQ", 9, 2) + inner + inner
    entry = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + value
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    assert read_gguf(path).metadata["k"] == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty"),
        (b"GG", "starts with b'GG'"),
        (b"\x7fELF" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 5), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "value type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 62), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 62), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "9 dims"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 32, 777, 0), "ggml type 777"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 8, 0), "multiple of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 32, 0, 1 << 62), "truncated"),
    ],
)
def test_damaged_files_say_what_was_found(tmp_path, content, found):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_gguf(path)
    assert str(path) in caught.value.message
    assert found in caught.value.message


def test_missing_file(tmp_path):
    with pytest.raises(ModelFileError, match=r"absent\.gguf"):
        read_gguf(tmp_path / "absent.gguf")


def test_every_truncation_is_noticed(tmp_path):
    whole = write_sample(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    end_of_data = max(t.offset + t.nbytes for t in read_gguf(tmp_path / "m.gguf").tensors.values())
    for size in (*range(0, end_of_data, 7), end_of_data - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            read_gguf(path)

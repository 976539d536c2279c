"""The container: what is stored comes back, and whatever is not as it was written is refused."""

from __future__ import annotations

import json

import pytest
import torch

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.quant import file as container
from sterna.quant.convert import QuantizeOptions, quantize_folder
from sterna.quant.file import FILE_NAME, header_bytes, open_container
from sterna.quant.formats import parse_format


@pytest.fixture
def path(plain_folder, tmp_path):
    quantize_folder(plain_folder, tmp_path / "out", QuantizeOptions(parse_format("fp6-mixed")))
    return tmp_path / "out" / FILE_NAME


def split(raw: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + size], raw[8 + size :]


def test_the_data_starts_on_64_bytes_and_leaves_no_gaps(path):
    header, data = split(path.read_bytes())
    assert (8 + len(header)) % 64 == 0
    entries = json.loads(header)
    entries.pop("__metadata__")
    spans = sorted(tuple(e["data_offsets"]) for e in entries.values())
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
    assert spans[-1][1] == len(data)


def test_the_headers_size_does_not_depend_on_the_checksums(path):
    spec = container.TensorSpec("a.tiles", torch.uint8, (1, 1, 768))
    places = container.layout([spec])
    sizes = {len(header_bytes(places, {}, "fp6", sums)) for sums in ({}, {"a.tiles": "f" * 64})}
    assert len(sizes) == 1


def reseal(raw: bytes, change) -> bytes:
    """A header changed by someone who can also write the seal anew."""
    import hashlib

    header, data = split(raw)
    document = json.loads(header)
    change(document)
    document["__metadata__"]["sterna_seal"] = "0" * 64
    text = json.dumps(document).encode()
    text += b" " * (-(8 + len(text)) % 64)
    seal = hashlib.sha256(text).hexdigest().encode()
    text = text.replace(b'"sterna_seal": "' + b"0" * 64, b'"sterna_seal": "' + seal)
    return len(text).to_bytes(8, "little") + text + data


def flip(raw: bytes, index: int) -> bytes:
    return raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :]


def in_metadata(key, value):
    return lambda document: document["__metadata__"].update({key: value})


def edit_weights(document, **changes):
    weights = json.loads(document["__metadata__"]["sterna_weights"])
    weights["layers.0.mlp.down"].update(changes)
    document["__metadata__"]["sterna_weights"] = json.dumps(weights)


def edit_json(key, name, value):
    def change(document):
        inner = json.loads(document["__metadata__"][key])
        inner[name] = value
        document["__metadata__"][key] = json.dumps(inner)

    return change


NORM = "model.norm.weight"
# fault -> (what becomes of the bytes, the error's words). Every field of the header, both ends of
# the file, and headers whose seal was made to fit.
FAULTS = {
    "empty": (lambda raw: b"", "cannot be read"),
    "seven bytes": (lambda raw: raw[:7], "truncated or no safetensors"),
    "cut in the header": (lambda raw: raw[:500], "truncated or no safetensors"),
    "cut in the data": (lambda raw: raw[:-1], "truncated: tensor"),
    "bytes at the end": (lambda raw: raw + b"x", "bytes of data, its header lists"),
    "huge header": (lambda raw: b"\xff" * 8 + raw[8:], "truncated or no safetensors"),
    "no JSON": (lambda raw: raw[:8] + b"x" + raw[9:], "damaged header"),
    "JSON without metadata": (lambda raw: (2).to_bytes(8, "little") + b"{}", "damaged header"),
    "one letter of the header": (lambda raw: raw.replace(b'"rows', b'"rowz', 1).replace(
        b'\\"rows', b'\\"rowz', 1), "header has been altered"),
    "first byte of the data": (lambda raw: flip(raw, len(raw) - len(split(raw)[1])), "altered"),
    "last byte of the data": (lambda raw: flip(raw, len(raw) - 1), "has been altered"),
    "resealed: a shape": (lambda raw: reseal(raw, lambda d: d[NORM].update(shape=[41])),
                          "inconsistent header"),
    "resealed: a dtype": (lambda raw: reseal(raw, lambda d: d[NORM].update(dtype="I64")),
                          "inconsistent header"),
    "resealed: offsets": (lambda raw: reseal(raw, lambda d: d[NORM].update(
        data_offsets=[0, 1 << 60])), "truncated: tensor"),
    "resealed: a tensor less": (lambda raw: reseal(raw, lambda d: d.pop(NORM)), "bytes of data"),
    "resealed: a checksum": (lambda raw: reseal(raw, edit_json("sterna_sha256", NORM, "00")),
                             "'model.norm.weight' has been altered"),
    "resealed: rows": (lambda raw: reseal(raw, lambda d: edit_weights(d, rows=80)),
                       r"'layers.0.mlp.down.tiles' is \(3, 1, 768\)"),
    "resealed: group": (lambda raw: reseal(raw, lambda d: edit_weights(d, group_size=32)),
                        "'layers.0.mlp.down.scales' is"),
    "resealed: elements": (lambda raw: reseal(raw, lambda d: edit_weights(d, elements=["int8"])),
                           "'layers.0.mlp.down.tiles' is"),
    "resealed: a key": (lambda raw: reseal(raw, lambda d: edit_weights(d, colour=1)),
                        "inconsistent header"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_and_the_file_named(path, fault):
    damage, said = FAULTS[fault]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelFileError, match=said) as found:
        open_container(path)
    assert str(path) in str(found.value)


UNSUPPORTED = {
    "version": (in_metadata("sterna_version", "2"), "container version '2', this Sterna reads '1'"),
    "no version": (lambda d: d["__metadata__"].pop("sterna_version"), "container version None"),
    "element": (edit_json("sterna_elements", "e2m3", "00"), "element 'e2m3' is unknown here"),
    "new element": (edit_json("sterna_elements", "e5m0", "00"), "element 'e5m0' is unknown here"),
}


@pytest.mark.parametrize("change", UNSUPPORTED)
def test_what_another_sterna_wrote_is_refused(path, change):
    edit, said = UNSUPPORTED[change]
    path.write_bytes(reseal(path.read_bytes(), edit))
    with pytest.raises(UnsupportedModelError, match=said):
        open_container(path)


def test_every_single_byte_of_the_header_is_covered(path):
    raw = path.read_bytes()
    header, _ = split(raw)
    for index in range(8, 8 + len(header), 97):
        path.write_bytes(flip(raw, index))
        with pytest.raises((ModelFileError, UnsupportedModelError)):
            open_container(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"nothing\.safetensors: missing"):
        open_container(tmp_path / "nothing.safetensors")


def test_tensors_are_views_of_the_mapping(path):
    opened = open_container(path)
    weight = opened.weights["layers.0.attn.qkv"]
    kept = path.read_bytes()
    weight.tiles.zero_()  # a private mapping: the file does not change
    assert path.read_bytes() == kept
    assert weight.row_formats is not None
    assert weight.row_formats.shape == (5, 16)

"""Folders in, containers out: parity with dequantised weights, resuming, and every refusal."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sterna.core.errors import ConfigError, ModelFileError, QuantizeError, UnsupportedModelError
from sterna.model.batch import Batch
from sterna.model.load import load_model
from sterna.quant.calibrate import random_mean_squares
from sterna.quant.convert import QuantizeOptions, parse_overrides, quantize_folder
from sterna.quant.file import FILE_NAME, open_container
from sterna.quant.formats import parse_format
from sterna.quant.linear import quant_modules
from sterna.quant.load import load_quantized
from sterna.text.tokenizer import load_tokenizer

FP6 = QuantizeOptions(parse_format("fp6"))


def batch(*tokens: int) -> Batch:
    n = len(tokens)
    starts, lens = torch.tensor([0, n]).int(), torch.tensor([n]).int()
    return Batch(torch.tensor(tokens).int(), torch.arange(n).int(), starts, lens)


@torch.no_grad()
def logits(path: Path, **options: str) -> torch.Tensor:
    return load_quantized(path, "float32", **options).decoder(batch(5, 6, 7, 69))


@pytest.mark.parametrize("name", ["fp6", "fp6-mixed", "int4-g32", "mxfp6", "int8-g64"])
@pytest.mark.parametrize("targets", ["all", "blocks"])
def test_a_quantised_folder_computes_what_its_dequantised_weights_do(
    plain_folder, tmp_path, name, targets
):
    report = quantize_folder(
        plain_folder, tmp_path / "out", QuantizeOptions(parse_format(name), targets)
    )
    assert len(report.weights) == 2 * 4 + 2 * (targets == "all")
    names = {n for n, _ in quant_modules(load_quantized(tmp_path / "out").decoder)}
    assert ("embed_tokens" in names) == (targets == "all")
    ours, plain = logits(tmp_path / "out"), logits(tmp_path / "out", weights="bf16")
    assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max()  # order of float32 sums
    original = logits(plain_folder)
    assert 0 < (ours - original).abs().max() < 0.5 * original.abs().max()


def test_in_memory_quantising_gives_the_same_weights(plain_folder, tmp_path):
    importance = random_mean_squares(load_model(plain_folder, "float32").decoder)
    options = QuantizeOptions(parse_format("fp6"), search="fast", importance=importance)
    quantize_folder(plain_folder, tmp_path / "out", options)
    assert torch.equal(logits(plain_folder, weights="fp6"), logits(tmp_path / "out"))


def test_the_report_counts_everything(plain_folder, tmp_path):
    report = quantize_folder(plain_folder, tmp_path / "out", FP6)
    size = (tmp_path / "out" / FILE_NAME).stat().st_size
    assert report.num_bytes == size
    parameters = sum(p.numel() for p in load_model(plain_folder).decoder.parameters())
    assert report.num_parameters == parameters
    assert report.bits_per_weight == 8 * size / parameters
    loaded = load_quantized(tmp_path / "out").decoder
    for weight, (name, module) in zip(
        sorted(report.weights, key=lambda w: w.name), sorted(quant_modules(loaded)), strict=True
    ):
        assert (weight.name, weight.nbytes) == (name, module.quant_weight.nbytes)
        plain = load_model(plain_folder, "float32").decoder.get_parameter(f"{name}.weight")
        error = (plain - module.quant_weight.dequantize()).norm() / plain.norm()
        assert weight.weight_error == pytest.approx(error.item(), rel=1e-4)
        assert weight.output_error is None


def test_output_error_weighs_inputs(plain_folder, tmp_path):
    importance = {"layers.0.mlp.down": torch.linspace(0.1, 3, 56)}
    options = QuantizeOptions(parse_format("fp6"), importance=importance)
    report = quantize_folder(plain_folder, tmp_path / "out", options)
    found = {w.name: w.output_error for w in report.weights}
    assert found.pop("layers.0.mlp.down") > 0
    assert set(found.values()) == {None}


def test_the_folder_is_whole(plain_folder, tmp_path):
    """Tokenizer beside the weights, any safetensors reader opens it, tiles lie on 64 bytes."""
    out = tmp_path / "out"
    quantize_folder(plain_folder, out, FP6)
    assert load_tokenizer(out).encode("!#") == load_tokenizer(plain_folder).encode("!#")
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["format"], section["version"]) == (
        "sterna", "fp6", "1")  # fmt: skip
    with safe_open(out / FILE_NAME, "pt") as file:
        assert file.metadata()["sterna_format"] == "fp6"
        assert file.get_tensor("layers.0.mlp.down.tiles").shape == (3, 1, 768)
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    for weight in open_container(out / FILE_NAME).weights.values():
        assert weight.tiles.data_ptr() % 64 == 0
    assert {p.name for p in tmp_path.iterdir()} == {"plain", "out"}, "something was left behind"


def test_overrides_choose_per_weight(plain_folder, tmp_path):
    overrides = parse_overrides(("layers.*.mlp.down=int8-g32", "lm_head=bf16"), parse_format)
    options = QuantizeOptions(parse_format("fp6"), overrides=overrides)
    report = quantize_folder(plain_folder, tmp_path / "out", options)
    formats = {w.name: w.format for w in report.weights}
    assert "lm_head" not in formats
    assert formats["layers.1.mlp.down"] == "int8-g32"
    assert formats["layers.1.mlp.gate_up"] == "fp6"
    with pytest.raises(ConfigError, match=r"override 'x'; write GLOB=FORMAT"):
        parse_overrides(("x",), parse_format)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [0, 3, 9])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(plain_folder, tmp_path, stop_at):
    quantize_folder(plain_folder, tmp_path / "whole", FP6)

    def stop(index, count, report):
        if index == stop_at:
            raise Stop

    with pytest.raises(Stop):
        quantize_folder(plain_folder, tmp_path / "out", FP6, stop)
    assert not (tmp_path / "out").exists()
    report = quantize_folder(plain_folder, tmp_path / "out", FP6)
    assert len(report.weights) == 10 - 1 - stop_at
    whole, resumed = (tmp_path / n / FILE_NAME for n in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_bytes_spoilt_between_two_runs_are_written_again(plain_folder, tmp_path):
    quantize_folder(plain_folder, tmp_path / "whole", FP6)

    def stop(index, count, report):
        if index == 5:
            raise Stop

    with pytest.raises(Stop):
        quantize_folder(plain_folder, tmp_path / "out", FP6, stop)
    partial = tmp_path / ".out.partial" / FILE_NAME
    raw = bytearray(partial.read_bytes())
    raw[-1:] = b""
    partial.write_bytes(raw[: len(raw) // 3])
    with (tmp_path / ".out.partial" / ".journal").open("a") as journal:
        journal.write('{"tensor": "layers.1.')  # a line torn by a crash
    quantize_folder(plain_folder, tmp_path / "out", FP6)
    whole, resumed = (tmp_path / n / FILE_NAME for n in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_another_job_does_not_go_on_with_what_was_left(plain_folder, tmp_path):
    def stop(index, count, report):
        raise Stop

    with pytest.raises(Stop):
        quantize_folder(plain_folder, tmp_path / "out", FP6, stop)
    other = QuantizeOptions(parse_format("int4-g32"))
    report = quantize_folder(plain_folder, tmp_path / "out", other)
    assert len(report.weights) == 10


def test_quantising_twice(plain_folder, tmp_path):
    out = tmp_path / "out"
    assert quantize_folder(plain_folder, out, FP6) is not None
    before = (out / FILE_NAME).stat().st_mtime_ns
    assert quantize_folder(plain_folder, out, FP6) is None, "the same command has nothing to do"
    assert (out / FILE_NAME).stat().st_mtime_ns == before
    with pytest.raises(QuantizeError, match="exists and is not the result of this command"):
        quantize_folder(plain_folder, out, QuantizeOptions(parse_format("int4")))
    with pytest.raises(QuantizeError, match="quantised already; a second rounding"):
        quantize_folder(out, tmp_path / "again", FP6)
    with pytest.raises(ConfigError, match="would round them twice"):
        load_quantized(out, weights="int4")
    with pytest.raises(UnsupportedModelError, match=r"quantised \(sterna\), plain ones"):
        load_model(out)


def test_a_disk_that_is_too_small_is_refused_before_work(plain_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(QuantizeError, match="bytes are needed, 1,000 are free"):
        quantize_folder(plain_folder, tmp_path / "out", FP6)


def test_a_disk_that_fills_up_is_said_and_survived(plain_folder, tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def full(file, data, offset):
        calls.append(offset)
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(QuantizeError, match=r"disk is full.*goes on where it stopped"):
        quantize_folder(plain_folder, tmp_path / "out", FP6)
    assert not (tmp_path / "out").exists()
    report = quantize_folder(plain_folder, tmp_path / "out", FP6)
    assert 0 < len(report.weights) < 10
    load_quantized(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.layers.1.mlp.up_proj.weight", "layers.1.mlp.gate_up: 1 NaN"),
     ("model.norm.weight", "norm.weight: holds NaN")],
)  # fmt: skip
def test_weights_that_are_not_finite_are_refused_by_name(
    make_folder, tensors, tmp_path, name, said
):
    tensors[name].view(-1)[3] = float("nan")
    with pytest.raises(QuantizeError, match=said):
        quantize_folder(make_folder(tmp_path / "bad", tensors), tmp_path / "out", FP6)


def test_a_container_of_another_model_is_refused(plain_folder, tmp_path):
    out = tmp_path / "out"
    quantize_folder(plain_folder, out, FP6)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelFileError, match="are of different models"):
        load_quantized(out)

"""`sterna convert swiftkv` and `sterna merge` on a tiny model, as the command line has them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sterna.cli.main import run
from sterna.model.load import load_config, load_model
from sterna.train.adapter import add_adapter
from sterna.train.adapter_config import AdapterConfig
from sterna.train.adapter_file import save_adapter


def _tiny():
    path = Path(__file__).parents[1] / "train" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _tiny()


@pytest.fixture
def folder(tmp_path):
    tiny.write_model(tmp_path / "model", num_hidden_layers=4)
    tiny.write_chats(tmp_path / "chats.jsonl")
    return tmp_path


def convert(folder, *flags, steps=4):
    return run(
        [
            "convert", "swiftkv", str(folder / "model"), "--data", str(folder / "chats.jsonl"),
            "-o", str(folder / "out"), "--steps", str(steps), "--rows-per-step", "2",
            "--seq-len", "96", "--held-out", "0.1", "--eval-rows", "4", "--dtype", "float32",
            "--threads", "1", *flags,
        ]
    )  # fmt: skip


def test_a_conversion_within_the_limit_is_written(folder, capsys):
    assert convert(folder, "--max-drop", "100") == 0
    assert "points lost" in capsys.readouterr().out
    report = json.loads((folder / "out" / "swiftkv.json").read_text())
    assert report["max_drop"] == 100
    assert report["student_loss"] > 0
    assert load_config(folder / "out").swiftkv.num_key_value_layers == 2
    assert convert(folder) == 2  # is there already


def test_a_refused_conversion_goes_on_with_more_steps(folder, capsys):
    """Also where a twentieth of them is another warm-up than the run began with."""
    assert convert(folder, "--max-drop", "-100") != 0
    assert "Train longer" in capsys.readouterr().err
    assert convert(folder, "--max-drop", "100", steps=22) == 0
    report = (folder / "out.run" / "distill.jsonl").read_text().splitlines()
    assert json.loads(report[-1])["step"] == 22


def test_a_student_is_served_as_any_model(folder, capsys):
    """Completion, quantised weights of a quantised teacher's student, and quality in the second."""
    fp6, out = str(folder / "fp6"), str(folder / "out")
    assert run(["quantize", str(folder / "model"), "-o", fp6, "--calibrate", "none"]) == 0
    (folder / "model").rename(folder / "original")
    (folder / "fp6").rename(folder / "model")
    assert convert(folder, "--max-drop", "100", "--group-size", "2") == 0
    assert (folder / "out" / "swiftkv.png").read_bytes().startswith(b"\x89PNG")
    small = ["--num-kv-blocks", "32", "--threads", "1", "--token-budget", "32"]
    capsys.readouterr()
    assert run(["complete", "Hello", "--model", out, "--max-tokens", "4", *small]) == 0
    assert run(["quantize", out, "-o", fp6]) == 0
    assert run(["complete", "Hello", "--model", fp6, "--max-tokens", "4", *small]) == 0
    text = folder / "text.txt"
    text.write_text("some words to compare the two on, again and again. " * 20)
    capsys.readouterr()
    assert run(["quality", out, fp6, "--text", str(text), "--window", "64", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["domains"].values()
    assert 0 < row["kl"] < 0.5
    for method in ("gptq", "awq"):
        flags = ["--method", method, "--calibrate", str(text), "--format", "int4-g32"]
        assert run(["quantize", out, "-o", str(folder / method), *flags]) == 8
        assert "SwiftKV" in capsys.readouterr().err


def test_only_the_original_is_trained_or_converted(folder, capsys):
    assert convert(folder, "--max-drop", "100") == 0
    (folder / "model").rename(folder / "original")
    (folder / "out").rename(folder / "model")
    (folder / "out.run").rename(folder / "first.run")
    assert convert(folder) == 2
    assert "train the model that it was made of" in " ".join(capsys.readouterr().err.split())


def test_a_conversion_beyond_the_limit_is_refused_and_goes_on_later(folder, capsys):
    assert convert(folder, "--max-drop", "-100") == 10
    error = capsys.readouterr().err
    assert "--max-drop allows -100 points" in error
    assert "Train longer" in error
    assert not (folder / "out").exists()
    assert convert(folder, "--max-drop", "100") == 0  # nothing is trained again


def test_merge_writes_the_merged_model(folder, capsys):
    decoder = load_model(folder / "model", "float32").decoder
    plain = decoder.layers[0].attn.qkv.weight.clone()
    add_adapter(decoder, AdapterConfig(rank=2, targets=("q_proj",)))
    part = decoder.layers[0].attn.qkv.parts["q_proj"]
    part.B.data.normal_()
    save_adapter(decoder, folder / "adapter")
    flags = [str(folder / "model"), str(folder / "adapter"), "-o", str(folder / "merged")]
    assert run(["merge", *flags, "--dtype", "float32"]) == 0
    merged = load_model(folder / "merged", "float32").decoder.layers[0].attn.qkv.weight
    expected = plain[:64] + part.scaling * part.B @ part.A
    assert (merged[:64] - expected).abs().max() <= 1e-6
    assert (merged[64:] == plain[64:]).all()
    assert (folder / "merged" / "tokenizer.json").exists()
    assert run(["merge", *flags]) == 2

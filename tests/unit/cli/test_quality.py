"""`sterna quality` end to end on tiny models: itself, its quantised form, what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sterna.cli.main import run

_CONFTEST = Path(__file__).parents[1] / "quant" / "conftest.py"


@pytest.fixture
def checkpoints():
    spec = importlib.util.spec_from_file_location("quant_checkpoints", _CONFTEST)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(checkpoints, tmp_path):
    return str(checkpoints.write_folder(tmp_path / "plain", checkpoints.random_tensors()))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("#%&'(*+,-.3579;=?ACEGI" * 20)
    return str(path)


def test_a_model_equals_itself(model, text, capsys):
    assert run(["quality", model, model, "--text", text, "--window", "32", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    row = report["domains"]["text"]
    assert (row["kl"], row["top1"], row["ln_ratio"]) == (0, 1, 0)
    assert row["positions"] == 13 * 15  # 440 tokens; the last of a window's 16 predicts nothing


def test_fewer_bits_are_further_away(model, text, tmp_path, capsys):
    found = {}
    for name in ("int4", "int8"):
        out = str(tmp_path / name)
        assert run(["quantize", model, "-o", out, "--format", name, "--json"]) == 0
        capsys.readouterr()
        arguments = ["quality", model, out, "--domain", f"a={text}", "--domain", f"b={text}",
                     "--window", "32", "--max-windows", "4", "--json"]  # fmt: skip
        assert run(arguments) == 0
        found[name] = json.loads(capsys.readouterr().out)["domains"]
        assert set(found[name]) == {"a", "b", "all"}
        assert found[name]["a"] == found[name]["b"]
    assert found["int4"]["all"]["kl"] > 10 * found["int8"]["all"]["kl"] > 0
    assert found["int4"]["a"]["kl_se"] > 0


def test_int8_activations_of_the_second_model(model, text, tmp_path, capsys):
    out = str(tmp_path / "fp6")
    assert run(["quantize", model, "-o", out, "--json"]) == 0
    found = {}
    for mode in ("auto", "int8"):
        capsys.readouterr()
        arguments = ["quality", model, out, "--text", text, "--window", "32", "--json"]
        assert run([*arguments, "--activations", mode]) == 0
        found[mode] = json.loads(capsys.readouterr().out)["domains"]["text"]["kl"]
    assert found["int8"] != found["auto"]
    assert (
        run(["quality", model, model, "--text", text, "--window", "32", "--activations", "int8"])
        == 2
    )
    assert "the weights are plain" in capsys.readouterr().err


def test_a_table_and_a_plot(model, text, tmp_path, capsys):
    plot = tmp_path / "deep" / "quality.png"
    assert (
        run(["quality", model, model, "--text", text, "--window", "32", "--plot", str(plot)]) == 0
    )
    assert "mean KL" in " ".join(capsys.readouterr().out.split())
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "no text to compare on"),
        (["--domain", "x"], 2, "write NAME=FILE"),
        (["--text", "TEXT", "--domain", "text=TEXT"], 2, "is taken"),
        (["--text", "missing.txt"], 2, "missing.txt"),
        (["--text", "TEXT"], 2, "440 tokens, one window of 512 is needed"),
        (["--text", "TEXT", "--window", "100"], 2, "the model has 64 positions"),
        (["--text", "TEXT", "--window", "2"], 2, "at least 4"),
    ],
)
def test_bad_arguments_end_in_one_line(model, text, capsys, arguments, code, said):
    arguments = [a.replace("TEXT", text) for a in arguments]
    assert run(["quality", model, model, *arguments]) == code
    err = capsys.readouterr().err
    assert said in " ".join(err.split())


def test_other_vocabularies_are_refused(model, text, checkpoints, tmp_path, capsys):
    tensors = checkpoints.random_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].repeat(2, 1)
    other = str(checkpoints.write_folder(tmp_path / "other", tensors, vocab_size=140))
    assert run(["quality", model, other, "--text", text, "--window", "32"]) == 3
    assert "70 tokens" in capsys.readouterr().err

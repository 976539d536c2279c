"""`sterna quantize` end to end on a tiny model: table, JSON, plot, calibration, refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sterna.cli.main import run

_CONFTEST = Path(__file__).parents[1] / "quant" / "conftest.py"


@pytest.fixture
def model(tmp_path):
    spec = importlib.util.spec_from_file_location("quant_checkpoints", _CONFTEST)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.write_folder(tmp_path / "plain", module.random_tensors()))


def test_a_table_with_totals_and_a_plot(model, tmp_path, capsys):
    plot = tmp_path / "deep" / "errors.png"
    assert run(["quantize", model, "-o", str(tmp_path / "out"), "--plot", str(plot)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "weight error" in out
    assert "fp6" in out
    assert "bits a weight all included" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(["quantize", model, "-o", str(tmp_path / "out")]) == 0
    assert "result of this command already" in " ".join(capsys.readouterr().out.split())


def test_json_has_every_weight(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("#%&'(" * 200)
    arguments = ["quantize", model, "-o", str(tmp_path / "out"), "--format", "int4-g32",
                 "--targets", "blocks", "--override", "layers.*.mlp.down=int8",
                 "--calibrate", str(text), "--json"]  # fmt: skip
    assert run(arguments) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert (report["status"], report["format"]) == ("written", "int4-g32")
    formats = {w["name"]: w["format"] for w in report["weights"]}
    assert len(formats) == 8
    assert formats["layers.0.mlp.down"] == "int8"
    assert all(w["output_error"] > 0 for w in report["weights"])
    assert report["bits_per_weight"] == 8 * report["num_bytes"] / report["num_parameters"]


def test_gptq_and_awq_from_a_text(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("#%&'(*+,-.3579;=?ACEGI" * 120)
    reports = {}
    for method in ("rtn", "gptq", "awq"):
        arguments = ["quantize", model, "-o", str(tmp_path / method), "--format", "int4-g32",
                     "--method", method, "--calibrate", str(text), "--json"]  # fmt: skip
        assert run(arguments) == 0
        reports[method] = json.loads(capsys.readouterr().out)
        assert run([*arguments]) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "unchanged"
    errors = {m: sum(w["output_error"] or 0 for w in r["weights"]) for m, r in reports.items()}
    assert errors["gptq"] < errors["rtn"]
    assert errors["awq"] < errors["rtn"]


def test_bits_choose_formats(model, tmp_path, capsys):
    found = {}
    for bits in ("11", "13"):  # these weights fill no tile
        out = tmp_path / bits
        arguments = ["quantize", model, "-o", str(out), "--bits", bits, "--json"]
        assert run(arguments) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["format"] == f"bits={bits}"
        assert report["bits_per_weight"] <= float(bits)
        found[bits] = sum(w["output_error"] ** 2 for w in report["weights"] if w["output_error"])
    assert len({w["format"] for w in report["weights"]}) > 1
    assert found["13"] < found["11"]


def test_there_and_back(model, tmp_path, capsys):
    assert run(["quantize", model, "-o", str(tmp_path / "q")]) == 0
    assert run(["dequantize", str(tmp_path / "q"), "-o", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert run(["dequantize", model, "-o", str(tmp_path / "x")]) == 8


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--format", "fp7"], 2, "did you mean 'fp"),
        (["--override", "x"], 2, "GLOB=FORMAT"),
        (["--format", "keep", "--scale-type", "float16"], 2, "no effect"),
        (["--calibrate", "missing.txt"], 8, "missing.txt"),
        (["--targets", "none"], 2, "blocks"),
        (["--method", "gptq"], 2, "needs a text"),
        (["--bits", "5", "--format", "int4"], 2, "leave out --format"),
        (["--bits", "-1"], 2, "positive"),
        (["--bits", "3"], 8, "3 bits a weight; at least"),
        (["--bits", "9", "--calibrate", "none"], 8, "--bits needs calibration"),
        (["--method", "gptq", "--format", "keep", "--calibrate", "a.txt"], 2, "choose one"),
        (["--method", "gptq", "--calibrate", "missing.txt"], 8, "missing.txt"),
        (["--method", "awq", "--calibrate", "none"], 8, "needs a format and calibration"),
    ],
)
def test_bad_arguments_end_in_one_line(model, tmp_path, capsys, arguments, code, said):
    assert run(["quantize", model, "-o", str(tmp_path / "out"), *arguments]) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.strip().count("\n") == 0


def test_a_short_calibration_text_is_refused(model, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("##")
    arguments = ["quantize", model, "-o", str(tmp_path / "out"), "--calibrate"]
    assert run([*arguments, str(tmp_path / "short.txt")]) == 8
    assert "2 tokens, at least 512 are needed" in capsys.readouterr().err
    assert run([*arguments, str(tmp_path / "short.txt"), "--method", "gptq"]) == 8
    assert "2 tokens, GPTQ needs at least 2048" in capsys.readouterr().err

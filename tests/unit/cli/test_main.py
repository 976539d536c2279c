"""The command line: light, one-line errors, nearest names, layered settings."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from sterna.cli import main as cli
from sterna.cli.flags import changed
from sterna.cli.settings import merge, read_sections, without_sections
from sterna.core.errors import ConfigError, PortInUseError
from sterna.engine.config import EngineConfig


def test_help_loads_no_torch_and_is_fast():
    code = (
        "import sys; from sterna.cli.main import run; run(['--help']);"
        "heavy = {'torch', 'fastapi', 'numpy', 'httpx', 'pydantic'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    times = []
    for _ in range(5):
        started = _children_cpu_s()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(_children_cpu_s() - started)
    # CPU time of one thread, the best of five: waiting for a busy machine is not our doing.
    assert min(times) < 0.4


def _children_cpu_s():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_bare_says_what_to_do_next(capsys):
    assert cli.run([]) == 0
    out = capsys.readouterr().out
    for verb in ("serve", "chat", "complete", "bench", "doctor"):
        assert f"sterna {verb}" in out


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["serv"], "serve"),
        (["serve", "--tokn-budget", "5"], "--token-budget"),
        (["serve", "--engine.polcy", "splitfuse"], "--policy"),
        (["bench", "serve", "--num-promts", "5"], "--num-prompts"),
        (["complete", "x", "--temprature", "1"], "--temperature"),
    ],
)
def test_unknown_words_are_answered_with_the_nearest(arguments, meant, capsys):
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert meant in captured.err
    assert captured.err.startswith("sterna: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs: input should be greater than 0"),
        (["serve", "--policy", "x"], "'splitfuse' or 'whole-prompt'"),
        (["serve", "--port", "abc"], "valid integer"),
        (["serve", "--ssl-keyfile", "k.pem"], "ssl_certfile"),
        (["complete", "--input", "a.jsonl"], "--output"),
        (["complete", "x", "--json-schema", "{"], "no JSON"),
        (["bench", "serve", "--dataset-name", "custom"], "dataset_path"),
        (["bench", "serve", "--goodput", "ttf:5"], "KEY must be"),
        (["bench", "serve", "--plot", "x.png"], "--sweep"),
        (["bench", "serve", "--goodput", "ttft:fast"], "write numbers"),
        (["bench", "serve", "--goodput", "ttft:1,2"], "KEY:MILLISECONDS"),
        (["bench", "serve", "--sweep", "speed=1"], "concurrency=1,2,4"),
        (["bench", "serve", "--sweep", "rate="], "has no values"),
        (["bench", "serve", "--sweep", "concurrency=0"], "above 0"),
        (["bench", "serve", "--sla", "0"], "above 0"),
        (["bench", "serve", "--metric-percentiles", "101"], "0 to 100"),
        (["bench", "serve", "--metadata", "note"], "NAME=VALUE"),
        (["bench", "serve", "--header", "note"], "NAME=VALUE"),
        (["bench", "serve", "--result-filename", "r.json"], "--save-result"),
        (["bench", "latency", "--num-iters", "0"], "--num-iters"),
        (["bench", "latency", "--batch-size", "0"], "--batch-size"),
        (["bench", "throughput", "--num-prompts", "0"], "--num-prompts"),
        (["complete", "--input", "a", "--output", "b", "--concurrency", "0"], "--concurrency"),
        (["complete", "x", "--device", "tpu"], "--device"),
    ],
)
def test_bad_values_end_with_2_and_one_line(arguments, fragment, capsys):
    assert cli.run(arguments) == 2
    err = capsys.readouterr().err
    assert fragment in err
    assert err.count("\n") == 1


def test_a_refused_setting_tells_no_key(capsys):
    arguments = ["serve", "--api-key", "sesame", "--ssl-keyfile", "k.pem"]
    assert cli.run(arguments) == 2
    assert cli.run(["serve", "--api-key", "sesame", "--api-key", ""]) == 2
    assert "sesame" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(PortInUseError("port 1\nis taken"), 7), (ConfigError("no"), 2)]
)
def test_typed_errors_give_their_exit_code(monkeypatch, capsys, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("cyclopts.App.__call__", fail)
    assert cli.run(["doctor"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_is_130(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cyclopts.App.__call__", interrupt)
    assert cli.run(["doctor"]) == 130


def _parsed(monkeypatch, arguments):
    """What the verb `serve` would hand to the server."""
    seen = []
    monkeypatch.setattr("sterna.server.run.serve", lambda config: seen.append(config) or 0)
    assert cli.run(["serve", *arguments]) == 0
    return seen[0]


def test_files_are_layered_and_options_win(tmp_path, monkeypatch):
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text(
        '[engine]\ntoken_budget = 64\npolicy = "whole-prompt"\n[server]\nport = 8001\n'
    )
    second.write_text("[engine]\ntoken_budget = 128\nmax_num_seqs = 4\n")
    config = _parsed(
        monkeypatch,
        ["m.gguf", "--config", str(first), "--config", str(second), "--engine.max-num-seqs=8"],
    )
    assert config.model == "m.gguf"
    assert config.port == 8001
    assert config.engine.policy == "whole-prompt"
    assert config.engine.token_budget == 128
    assert config.engine.max_num_seqs == 8


def test_every_engine_and_server_field_is_an_option(monkeypatch, capsys):
    assert cli.run(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in EngineConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
    assert "--drain-timeout-s" in shown


def test_a_config_file_may_hold_sections_of_other_verbs(tmp_path, capsys):
    file = tmp_path / "all.toml"
    file.write_text("[server]\nport = 1\n[engine]\nmax_num_seqs = 4\n")
    # Fails on the missing URL's server, not on the [server] section it does not use.
    code = cli.run(["complete", "x", "--config", str(file), "--url", "http://127.0.0.1:9"])
    assert code == 1
    assert "no server at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[engin]\na = 1", "did you mean 'engine'"),
        ("engine = 3", "no section"),
        ("[engine", "no TOML"),
        ("[engine]\ntoken_budgt = 1", "--token-budget"),
    ],
)
def test_bad_config_files(tmp_path, capsys, text, fragment):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    assert cli.run(["serve", "--config", str(file)]) == 2
    assert fragment in capsys.readouterr().err


def test_missing_config_file(capsys):
    assert cli.run(["serve", "--config", "nowhere.toml"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err


def test_section_prefixes_and_layers(tmp_path):
    assert without_sections(["--engine.seed=1", "--server.port", "2", "-x"]) == [
        "--seed=1",
        "--port",
        "2",
        "-x",
    ]
    assert without_sections(["--server.engine.seed", "1"]) == ["--seed", "1"]
    assert merge([{"engine": {"a": 1, "b": 1}}, {"engine": {"b": 2}}]) == {
        "engine": {"a": 1, "b": 2}
    }
    with pytest.raises(ConfigError, match="cannot read"):
        read_sections(tmp_path / "none.toml")
    assert changed(EngineConfig(seed=3)) == {"seed": 3}

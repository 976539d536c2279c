"""`chat` and `complete` with an adapter: its folder as the model, or --lora beside the base."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
import torch
from rich.console import Console
from tests.unit.align.runs import tiny

from sterna.cli import main as cli
from sterna.cli.adapted import with_adapter
from sterna.cli.chat import Conversation
from sterna.cli.endpoint import in_process
from sterna.cli.sampling import SamplingOptions
from sterna.core.errors import ModelFileError
from sterna.engine.config import EngineConfig
from sterna.model.load import load_model
from sterna.train.adapter import adapted_modules, add_adapter
from sterna.train.adapter_config import AdapterConfig
from sterna.train.adapter_file import adapter_files

ENGINE = EngineConfig.model_validate({"dtype": "float32", "kv_cache_bytes": 1 << 20, "threads": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and, in run/model, an adapter of it that says something else."""
    folder = tmp_path_factory.mktemp("adapted")
    tiny.write_model(folder / "base")
    decoder = load_model(folder / "base", "float32").decoder
    add_adapter(decoder, AdapterConfig(rank=8))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, module in adapted_modules(decoder):
            for part in module.adapters():
                part.B.copy_(torch.randn(part.B.shape, generator=generator))
    where = folder / "run" / "model"
    where.mkdir(parents=True)
    for name, data in adapter_files(decoder, str(folder / "base")).items():
        (where / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def said(capsys, *words: str) -> tuple[str, str]:
    """(who answered, the text) of a greedy completion."""
    flags = ["--dtype", "float32", "--kv-cache-bytes", str(1 << 20), "--threads", "1",
             "--temperature", "0", "--max-tokens", "12", "--json"]  # fmt: skip
    assert cli.run(["complete", "hello", *words, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    return found["model"], found["choices"][0]["text"]


def test_an_adapters_folder_is_its_base_with_it(folder, capsys):
    base, adapter = str(folder / "base"), str(folder / "run" / "model")
    plain = said(capsys, "--model", base)
    whole = said(capsys, "--model", adapter)
    named = said(capsys, "--model", base, "--lora", f"mine={adapter}")
    assert whole[0] == "run" and named[0] == "mine"
    assert whole[1] == named[1] != plain[1]


def test_a_conversation_changes_who_answers(folder):
    out = io.StringIO()
    with asyncio.Runner() as runner:
        opened = in_process(str(folder / "run" / "model"), ENGINE)
        endpoint = runner.run(opened.__aenter__())
        options = SamplingOptions(max_tokens=24, temperature=3.0, seed=3, ignore_eos=True)
        talk = Conversation(Console(file=out, width=100), endpoint, runner, options)
        answers = []
        for line in ("/model", "hi", "/clear", "/model base", "hi", "/model bose"):
            talk.take(line)
            if not line.startswith("/"):
                answers.append(talk.messages[-1]["content"])
        runner.run(opened.__aexit__(None, None, None))
    assert "* run" in out.getvalue() and "did you mean 'base'" in out.getvalue()
    assert answers[0] != answers[1]


def test_an_adapter_without_a_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="names no base model"):
        with_adapter(str(tmp_path), ENGINE)
    assert with_adapter("", ENGINE) == ("", ENGINE, "")

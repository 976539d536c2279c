"""`sterna data inspect | pack` end to end, and what they refuse."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from sterna.cli.main import run

TEMPLATE = "{% for m in messages %}{{ m.content }};{% endfor %}"
FIELDS = ["--fields.prompt", "q", "--fields.completion", "a"]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    vocab = {letter: i for i, letter in enumerate("abcdefgh;|")}
    backend = Backend(BPE(vocab, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["|"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "|", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")
    return str(folder)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"q": "ab", "a": "cd"}\n{"q": "a"}\n{"q": "ef", "a": "gh"}\n')
    return str(path)


def test_inspect_shows_what_is_trained_and_names_bad_rows(model, pairs, capsys):
    assert run(["data", "inspect", pairs, "--model", model, *FIELDS]) == 0
    out, err = capsys.readouterr()
    assert "ab;«cd;|»" in out or "ef;«gh;|»" in out
    assert "3 rows: 2 documents, 14 tokens, 8 of them trained; 1 rows malformed" in out
    assert f"{pairs}:2: completion is missing" in err
    assert run(["data", "inspect", pairs, "--model", model, *FIELDS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 2


def test_pack_then_inspect_by_recipe(model, pairs, tmp_path, capsys):
    shards = tmp_path / "shards"
    arguments = ["--model", model, "--out", str(shards), "--on-bad-row", "skip"]
    assert run(["data", "pack", pairs, *FIELDS, *arguments]) == 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[data]\nseq_len = 8\n[[data.sources]]\npath = "{shards}"\n')
    capsys.readouterr()
    assert run(["data", "inspect", "--recipe", str(recipe), "--model", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["targets"], found["packed_rows"]) == (2, 8, 2)
    assert run(["data", "pack", pairs, *FIELDS, *arguments]) == 9
    assert "holds shards already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ([], 2, "either paths or --recipe"),
        (["nowhere.jsonl"], 9, "no data at nowhere.jsonl"),
        (["x", "--format", "chats"], 2, "format"),
        (["x", "--recipe", "y.toml"], 2, "either paths or --recipe"),
        (["--recipe", "nowhere.toml"], 2, "no recipe"),
    ],
)
def test_refusals(model, capsys, arguments, code, reason):
    assert run(["data", "inspect", *arguments, "--model", model]) == code
    assert reason in capsys.readouterr().err

"""Prompts of an online run from files: what is asked, what rewards get, parts, order."""

from __future__ import annotations

import json

import pytest
from tests.unit.align.runs import tiny

from sterna.align.config import PromptSection
from sterna.align.prompts import PromptStream
from sterna.core.errors import ConfigError, DataError, RowError
from sterna.text.tokenizer import load_tokenizer
from sterna.train.recipe import make_recipe

ROWS = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": "no", "tag": i} for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def own_kept(own_home):
    """Hashes of prompts are kept apart from the user's."""


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return {"path": str(path)}


def stream(tokenizer, *sources, part="train", **settings):
    made = PromptSection.model_validate({"sources": sources, **settings})
    return PromptStream(made, tokenizer, None, part)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_every_kind_of_file_gives_each_prompt_once_an_epoch(tokenizer, tmp_path, name):
    prompts = stream(tokenizer, write(tmp_path / name, ROWS), held_out=0)
    found = prompts.take(120)
    assert sorted(p.row["tag"] for p in found[:60]) == list(range(60))
    assert sorted(p.row["tag"] for p in found[60:]) == list(range(60))
    one = found[0]
    tag = one.row["tag"]
    assert one.text == f"<|user|>q{tag}<|end|><|assistant|>"
    assert one.row == {"chosen": f"a{tag}", "rejected": "no", "tag": tag}
    assert one.tokens.tolist() == tokenizer.encode(one.text, False)


def test_any_place_is_found_again(tokenizer, tmp_path):
    first = {**write(tmp_path / "a.jsonl", ROWS), "weight": 3}
    second = {**write(tmp_path / "b.jsonl", [{"prompt": f"z{i}"} for i in range(9)]), "weight": 1}
    whole = [p.text for p in stream(tokenizer, first, second).take(400)]
    assert 70 < sum("z" in text for text in whole) < 130  # blended by weight, not by size
    again = stream(tokenizer, first, second)
    for place in (399, 0, 63, 64, 200):
        again.position = place
        assert again.take(1)[0].text == whole[place]


def test_parts_and_held_out_prompts_are_apart(tokenizer, tmp_path):
    rows = [{"prompt": f"q{i % 50}", "chosen": "a", "rejected": f"r{i}"} for i in range(200)]
    source = write(tmp_path / "rows.jsonl", rows)
    found = []
    for part in range(3):
        for kind in ("train", "eval"):
            settings = {"split": [2, 4, 4], "split_part": part, "held_out": 0.2}
            prompts = stream(tokenizer, source, part=kind, **settings)
            found.append({p.text for p in prompts.take(400)})
    assert sum(map(len, found)) == len(set().union(*found)) == 50
    assert all(found)


CHAT = [
    {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"},
    {"role": "assistant", "content": "b"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "text", "columns"),
    [
        ({"prompt": "q", "extra": 1}, "<|user|>q<|end|><|assistant|>", {"extra": 1}),
        ({"prompt": "q", "completion": "c", "label": True}, "<|user|>q<|end|><|assistant|>",
         {"completion": "c", "label": True}),
        ({"prompt": CHAT[:2]}, "<|system|>s<|end|><|user|>u<|end|><|assistant|>", {}),
        ({"messages": CHAT}, "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|><|user|>v"
         "<|end|><|assistant|>", {"messages": CHAT}),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
         "<|user|>q<|end|><|assistant|>",
         {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
    ],
)  # fmt: skip
def test_what_is_asked_of_a_row(tokenizer, tmp_path, row, text, columns):
    (found,) = stream(tokenizer, write(tmp_path / "rows.jsonl", [row]), held_out=0).take(1)
    assert (found.text, found.row) == (text, columns)


def test_plain_text_goes_in_as_it_is(tokenizer, tmp_path):
    source = {**write(tmp_path / "rows.jsonl", ROWS[:1]), "render": "plain"}
    assert stream(tokenizer, source, held_out=0).take(1)[0].text == "q0"
    source = {**source, "render": "auto"}
    assert stream(tokenizer, source, held_out=0, render="plain").take(1)[0].text == "q0"


def test_malformed_rows_stop_or_are_counted(tokenizer, tmp_path):
    rows = [{"prompt": ""}, *ROWS[:5]]
    source = {**write(tmp_path / "rows.jsonl", rows), "format": "preference"}
    with pytest.raises(RowError, match=r"rows\.jsonl:1: chosen is missing"):
        stream(tokenizer, source, held_out=0).take(6)
    lenient = stream(tokenizer, source, held_out=0, on_bad_row="skip")
    assert len({p.text for p in lenient.take(10)}) == 5
    assert lenient.num_bad == lenient.position - 10 >= 1
    with pytest.raises(DataError, match="1000 prompts in a row are malformed"):
        stream(
            tokenizer, {**write(tmp_path / "bad.jsonl", rows[:1]), "format": "prompts"},
            held_out=0, on_bad_row="skip",
        ).take(1)  # fmt: skip


def test_texts_have_no_prompt(tokenizer, tmp_path):
    with pytest.raises(RowError, match=r"rows\.jsonl:1: is a text without a prompt"):
        stream(tokenizer, write(tmp_path / "rows.jsonl", [{"text": "t"}]), held_out=0).take(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of prompts.path"),
        ({"path": "a", "sources": [{"path": "b"}]}, "give one of prompts.path"),
        ({"path": "a", "split": [1, 1]}, "there are none"),
        ({"sources": [{"path": "b"}], "split": [1, 1], "split_part": 2}, "split has 2 parts"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_recipe(settings, PromptSection)

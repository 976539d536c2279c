"""Targets: the rule at a span's border, ends of documents, lengths, bad rows."""

from __future__ import annotations

import pytest

from sterna.core.errors import DataError, RowError
from sterna.data.loader import Loader

PAIR = {"prompt": "ab", "completion": "cd"}


def rows_of(tokenizer, data):
    with Loader(data, tokenizer) as loader:
        return list(loader), loader.counts


def test_the_answer_and_its_end_are_trained(tmp_path, kit, tokenizer):
    path = kit.write_jsonl(tmp_path / "a.jsonl", [PAIR])
    (row,), _ = rows_of(tokenizer, kit.settings(path))
    assert kit.texts_of([row], tokenizer) == [
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"
    ]
    assert kit.trained_of(row, tokenizer) == "cd<|im_end|>"
    (row,), _ = rows_of(tokenizer, kit.settings(path, train_on="all"))
    assert row.num_targets == len(row.tokens) - 1


def test_plain_pairs_and_texts_end_in_eos(tmp_path, kit, tokenizer):
    pair = kit.write_jsonl(tmp_path / "a.jsonl", [PAIR])
    data = kit.settings({"path": str(pair), "render": "plain"})
    (row,), _ = rows_of(tokenizer, data)
    assert kit.texts_of([row], tokenizer) == ["abcd<|eos|>"]
    assert kit.trained_of(row, tokenizer) == "cd<|eos|>"
    text = tmp_path / "a.txt"
    text.write_text("gr\u00fc\u00df")
    (row,), _ = rows_of(tokenizer, kit.settings(text, document_end="<|im_end|>"))
    assert kit.texts_of([row], tokenizer) == ["gr\u00fc\u00df<|im_end|>"]
    (row,), _ = rows_of(tokenizer, kit.settings(text, document_end=""))
    assert kit.texts_of([row], tokenizer) == ["gr\u00fc\u00df"]
    with pytest.raises(DataError, match="'<nope>' is no token"):
        rows_of(tokenizer, kit.settings(text, document_end="<nope>"))


@pytest.mark.parametrize(
    ("merges", "prompt", "completion", "trained"),
    [
        ((), "a\u00e9", "\u00e9b", "\u00e9b<|eos|>"),
        # "bc" reaches from the prompt into the answer: not trained, the model is not asked for it.
        ((("b", "c"),), "ab", "cd", "d<|eos|>"),
        ((("b", "c"),), "a", "bcd", "bcd<|eos|>"),
    ],
)
def test_a_token_across_the_border(tmp_path, kit, merges, prompt, completion, trained):
    tokenizer = kit.byte_tokenizer(None, merges)
    path = kit.write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion}])
    (row,), _ = rows_of(tokenizer, kit.settings(path))
    assert kit.trained_of(row, tokenizer) == trained


def test_a_token_that_leaves_the_answer_is_trained(tmp_path, kit):
    # "!" and the line break behind the turn are one token, and the turn has no end-of-turn token.
    template = "{% for m in messages %}{{ m.role + ':' + m.content }}\n{% endfor %}" \
               "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"  # fmt: skip
    tokenizer = kit.byte_tokenizer(template, (("!", "\u010a"),))
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b!"},
                          {"role": "user", "content": "c"}]}]  # fmt: skip
    (row,), _ = rows_of(tokenizer, kit.settings(kit.write_jsonl(tmp_path / "a.jsonl", rows)))
    assert kit.trained_of(row, tokenizer) == "b!\n"


def test_a_template_without_an_end_gets_one(tmp_path, kit):
    tokenizer = kit.byte_tokenizer(None)
    path = kit.write_jsonl(tmp_path / "a.jsonl", [PAIR])
    (row,), _ = rows_of(tokenizer, kit.settings({"path": str(path), "render": "chat"}))
    assert kit.texts_of([row], tokenizer)[0].endswith("assistant: cd\n\n<|eos|>")
    assert kit.trained_of(row, tokenizer) == " cd\n\n<|eos|>"


def test_too_long(tmp_path, kit, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("0123456789")  # 11 tokens with the EOS

    def made(how):
        return rows_of(tokenizer, kit.settings(path, seq_len=4, too_long=how, shuffle="none",
                                               packing="none"))  # fmt: skip

    rows, counts = made("truncate")
    assert kit.texts_of(rows, tokenizer) == ["0123"] and counts.of["too_long"] == 1
    rows, counts = made("split")
    assert kit.texts_of(rows, tokenizer) == ["0123", "4567", "89<|eos|>"]
    # The last token of a piece is trained on the first of the next, so no target is lost.
    assert [kit.trained_of(row, tokenizer) for row in rows] == ["1234", "5678", "9<|eos|>"]
    with pytest.raises(DataError, match=r"a.txt: row 1: has 11 tokens, seq_len is 4"):
        made("fail")
    with pytest.raises(DataError, match=r"none of 1 rows gives a document .* 1 too long"):
        made("drop")


def test_bad_rows_stop_or_are_counted_and_named(tmp_path, kit, tokenizer):
    path = kit.write_jsonl(tmp_path / "a.jsonl", [*kit.chat_rows(3), {"messages": []}])
    with path.open("a") as file:
        file.write('{\n{"messages": [{"role": "assistant", "content": "\\ud83d"}]}\n')
    with pytest.raises(RowError, match=r'a.jsonl:[456]: .*on_bad_row = "skip"'):
        rows_of(tokenizer, kit.settings(path))
    _, counts = rows_of(tokenizer, kit.settings(path, on_bad_row="skip", shuffle="none"))
    assert counts.of["rows"] == 6 and counts.of["bad_rows"] == 3 and counts.of["documents"] == 3
    assert counts.bad_rows[0] == f"{path}:4: messages is empty"
    assert counts.bad_rows[1].startswith(f"{path}:5: is not valid JSON")
    assert "half of a UTF-16 pair" in counts.bad_rows[2]


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_source_without_any_good_row_ends(tmp_path, kit, tokenizer, epochs):
    path = kit.write_jsonl(tmp_path / "a.jsonl", [{"text": " "}] * 3)
    data = kit.settings({"path": str(path), "epochs": epochs}, on_bad_row="skip")
    with pytest.raises(DataError, match=r"rows gives a document .* malformed.*a.jsonl:\d: text"):
        rows_of(tokenizer, data)


def test_a_truncated_answer_leaves_nothing_to_train(tmp_path, kit, tokenizer):
    path = kit.write_jsonl(tmp_path / "a.jsonl", [PAIR, {**PAIR, "prompt": "x" * 100}])
    rows, counts = rows_of(tokenizer, kit.settings(path))
    assert len(rows) == 1 and counts.of["untrained"] == 1 and counts.of["too_long"] == 1

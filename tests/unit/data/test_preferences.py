"""Preference rows: what is prompt and what answer, exact tokens, pairs that stay together."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sterna.core.errors import DataError, RowError
from sterna.data.config import SourceConfig
from sterna.data.fields import Labelled, Pair, Plain, Prompt
from sterna.data.formats import detect_format, read_row
from sterna.data.loader import Loader
from sterna.data.pack import IGNORE, documents_of, join, sequences_of
from sterna.data.preferences import prompt_text

SOURCE = SourceConfig(path="x")
USER = {"role": "user", "content": "hi"}


def said(text):
    return {"role": "assistant", "content": text}


def read(row, format="preference", as_chat=True):
    return read_row(row, format, SOURCE, as_chat)


def rows_of(kit, tokenizer, path, given, **options):
    kit.write_jsonl(path, given)
    with Loader(kit.settings(path, **options), tokenizer) as loader:
        return list(loader), loader.counts


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": [], "rejected": []}, "preference"),
        ({"prompt": "a", "completion": "b", "label": True}, "kto"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "answer": 4}, "prompts"),
    ],
)
def test_formats_are_detected(row, format):
    assert detect_format([row], {}) == format


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [said("yes")], "rejected": [said("no")]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "chosen": [said("yes")], "rejected": [said("no")]},
        {"prompt": "hi", "chosen": [USER, said("yes")], "rejected": [USER, said("no")]},
        {"chosen": [USER, said("yes")], "rejected": [USER, said("no")]},
        {"chosen": json.dumps([USER, said("yes")]), "rejected": json.dumps([USER, said("no")])},
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    ],
)
def test_every_shape_of_a_pair_means_the_same(row):
    pair = read(row)
    assert isinstance(pair, Pair) and prompt_text(pair) == "hi"
    for half, answer in ((pair.chosen, "yes"), (pair.rejected, "no")):
        assert [(m["role"], m["content"]) for m in half.messages] == [
            ("user", "hi"), ("assistant", answer)
        ]  # fmt: skip


def test_turns_that_both_share_are_prompt():
    begun = [USER, said("1"), {"role": "user", "content": "go on"}]
    pair = read({"chosen": [*begun, said("2")], "rejected": [*begun, said("3")]})
    assert [m.get("train", True) for m in pair.chosen.messages] == [False, False, False, True]
    same = read({"chosen": [*begun, said("2")], "rejected": [*begun, said("2")]})
    assert [m.get("train", True) for m in same.rejected.messages] == [False, False, False, True]


def test_anthropics_text_stays_text_without_a_template():
    begun = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = read({"chosen": begun + " d", "rejected": begun + " e"}, as_chat=False)
    assert pair == Pair(Plain(begun, " d"), Plain(begun, " e"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "a", "rejected": "b"}, "without a prompt"),
        ({"prompt": "p", "chosen": "a"}, "rejected is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, "margin is a str"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "prompt is missing"),
        ({"chosen": [USER, said("a")], "rejected": [{**USER, "content": "?"}, said("b")]},
         "do not begin with one prompt"),
    ],
)  # fmt: skip
def test_malformed_pairs_are_named(row, words):
    with pytest.raises(RowError, match=words):
        read(row)


def test_labels_and_prompts():
    one = read({"prompt": "p", "completion": "c", "label": 1}, "kto")
    assert isinstance(one, Labelled) and one.is_desirable is True
    with pytest.raises(RowError, match="label is 'good'"):
        read({"prompt": "p", "completion": "c", "label": "good"}, "kto")
    asked = read({"prompt": "p", "answer": 4}, "prompts", as_chat=False)
    assert asked == Prompt(Plain("p", ""), {"answer": 4})
    assert read({"prompt": [USER], "x": 1}, "prompts").row == {"x": 1}


def test_a_pair_is_two_sequences_with_exact_answers(tmp_path, kit, tokenizer):
    rows = [{"prompt": f"q{i}", "chosen": "good" * i, "rejected": "bad", "margin": i / 2}
            for i in range(1, 5)]  # fmt: skip
    packed, counts = rows_of(
        kit, tokenizer, tmp_path / "p.jsonl", rows, seq_len=400, rows="pairs", shuffle="none"
    )
    assert counts.of["documents"] == 4 and sum(map(len, (r.sources for r in packed))) == 4
    documents = [d for row in packed for d in documents_of(row)]
    found = sorted((d.note, *map(trained(tokenizer), sequences_of(d))) for d in documents)
    assert found == [
        (i / 2, "good" * i + "<|im_end|>", "bad<|im_end|>") for i in range(1, 5)
    ]  # the end of turn is trained: there is no padding it could be taken for
    again = join(documents)
    assert again.starts.tolist()[-1] == sum(len(d.tokens) for d in documents)
    for a, b in zip(again.starts[:-1], again.starts[1:], strict=True):
        assert again.positions[a:b].tolist() == list(range(b - a))
        assert again.targets[b - 1] == IGNORE


def trained(tokenizer):
    def text(document):
        ids = [int(t) for t in document.targets if t != IGNORE]
        return tokenizer.decode(ids, skip_special_tokens=False)

    return text


def test_plain_pairs_end_with_eos(tmp_path, kit):
    plain = kit.byte_tokenizer(template=None)
    rows = [{"prompt": "p: ", "chosen": "yes", "rejected": "no"}]
    packed, _ = rows_of(kit, plain, tmp_path / "p.jsonl", rows, rows="pairs")
    halves = sequences_of(documents_of(packed[0])[0])
    assert [trained(plain)(half) for half in halves] == ["yes<|eos|>", "no<|eos|>"]


def test_long_prompts_lose_their_left_and_answers_nothing(tmp_path, kit, tokenizer):
    rows = [
        {"prompt": "x" * 200 + "end", "chosen": "yes", "rejected": "no"},
        {"prompt": "short", "chosen": "y" * 200, "rejected": "no"},
        {"prompt": "same", "chosen": "no", "rejected": "no"},
    ]
    packed, counts = rows_of(kit, tokenizer, tmp_path / "p.jsonl", rows, seq_len=100, rows="pairs")
    halves = sequences_of(documents_of(packed[0])[0])
    text = tokenizer.decode(halves[0].tokens.tolist(), skip_special_tokens=False)
    assert text.startswith("x") and "end<|im_end|>" in text and len(packed[0].tokens) <= 100
    assert len(halves[0].tokens) - len(halves[1].tokens) == 1
    assert [trained(tokenizer)(half) for half in halves] == ["yes<|im_end|>", "no<|im_end|>"]
    assert (counts.of["too_long"], counts.of["unfitting"], counts.of["identical"]) == (2, 1, 1)
    assert "p.jsonl:2" in counts.bad_rows[0]
    settings = kit.settings(tmp_path / "p.jsonl", seq_len=100, rows="pairs", too_long="drop")
    with pytest.raises(DataError, match="none of 3 rows"), Loader(settings, tokenizer) as loader:
        list(loader)


def test_a_labelled_answer_has_one_of_another_prompt_beside_it(tmp_path, kit, tokenizer):
    rows = [{"prompt": f"q{i // 2}", "completion": f"a{i}", "label": i % 3 == 0} for i in range(6)]
    packed, _ = rows_of(
        kit, tokenizer, tmp_path / "k.jsonl", rows, seq_len=400, rows="labelled", shuffle="none"
    )
    documents = [d for row in packed for d in documents_of(row)]
    own = {trained(tokenizer)(sequences_of(d)[0])[:2]: d for d in documents}
    assert {name: d.note for name, d in own.items()} == {
        f"a{i}": float(i % 3 == 0) for i in range(6)
    }
    for i in range(6):
        main, other = sequences_of(own[f"a{i}"])
        prompt = tokenizer.decode(other.tokens.tolist(), skip_special_tokens=False)
        assert f"q{i // 2}" in prompt
        assert int(trained(tokenizer)(other)[1]) // 2 != i // 2
        assert np.array_equal(main.tokens[:20], other.tokens[:20])


def test_the_same_rows_serve_every_step(tmp_path, kit, tokenizer):
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    text, _ = rows_of(kit, tokenizer, tmp_path / "p.jsonl", pairs, seq_len=400)
    assert kit.trained_of(text[0], tokenizer) == "yes<|im_end|>" * 4
    labelled, _ = rows_of(
        kit, tokenizer, tmp_path / "p.jsonl", pairs, seq_len=2000, rows="labelled"
    )
    notes = sorted(d.note for row in labelled for d in documents_of(row))
    assert notes == [0.0] * 4 + [1.0] * 4
    labels = [{"prompt": f"q{i}", "completion": "c", "label": i < 3} for i in range(4)]
    _, counts = rows_of(kit, tokenizer, tmp_path / "k.jsonl", labels, seq_len=400)
    assert (counts.of["documents"], counts.of["undesirable"]) == (3, 1)
    with pytest.raises(RowError, match="no chosen and rejected"):
        rows_of(kit, tokenizer, tmp_path / "k.jsonl", labels, rows="pairs")
    with pytest.raises(RowError, match="prompt without an answer"):
        rows_of(kit, tokenizer, tmp_path / "q.jsonl", [{"prompt": "p", "x": 1}])


def test_a_folder_of_json_lists_is_read_by_split(tmp_path, kit, tokenizer):
    for name, answer in (("train", "yes"), ("eval", "yep")):
        rows = [{"prompt": " Human: a Assistant:", "chosen": answer, "rejected": "no"}]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "info.json").write_text('{"license": "x"}')
    for split, answer in (("train", "yes"), ("eval", "yep")):
        data = kit.settings({"path": str(tmp_path), "split": split}, rows="pairs", seq_len=200)
        with Loader(data, tokenizer) as loader:
            document = documents_of(next(iter(loader)))[0]
        assert trained(tokenizer)(sequences_of(document)[0]) == f"{answer}<|im_end|>"
    (tmp_path / "train.json").write_text("[{")
    with pytest.raises(DataError, match=r"train\.json: is not valid JSON"):
        Loader(kit.settings(tmp_path), tokenizer)


def test_what_makes_no_sense_for_answers_is_refused(kit):
    with pytest.raises(ValueError, match="without their prompts"):
        kit.settings("x", rows="pairs", train_on="all")
    with pytest.raises(ValueError, match="in pieces"):
        kit.settings("x", rows="pairs", too_long="split")

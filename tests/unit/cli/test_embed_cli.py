"""`sterna embed`: files in and out, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sterna.cli import embed_run
from sterna.cli.main import run
from sterna.engine.llm import LLM

TEXTS = ["the tern flies", "tax law", "a sea of ice"] * 5


@pytest.fixture(scope="module")
def folder(encoder_folder):
    return str(encoder_folder())


@pytest.fixture(scope="module")
def want(folder):
    with LLM(folder, threads=1) as llm:
        return llm.embed(TEXTS)


def write(path, kind):
    if kind == "txt":
        path.write_text("\n".join(TEXTS) + "\n")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"body": TEXTS}), path)


def embed(source, folder, output, *more):
    return run(["embed", str(source), "--model", folder, "-o", str(output), "--threads", "1",
                "--field", "body", *more])  # fmt: skip


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("out", ["npy", "parquet"])
def test_every_file_gives_the_same_vectors(kind, out, folder, want, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embed_run, "PART_ROWS", 4)
    source, output = tmp_path / f"in.{kind}", tmp_path / f"out.{out}"
    write(source, kind)
    assert embed(source, folder, output, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["texts"], summary["resumed"]) == (15, 0)
    if out == "npy":
        found = np.load(output)
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        table = pq.read_table(output)
        assert table["index"].to_pylist() == list(range(15))
        found = np.array(table["embedding"].to_pylist(), np.float32)
    assert np.array_equal(found, want)
    assert [p.name for p in tmp_path.iterdir() if "parts" in p.name] == []
    assert embed(source, folder, output) == 2  # it exists


def test_a_killed_run_goes_on_where_it_stopped(folder, want, tmp_path):
    """The process is killed after its second part; the next run embeds only the rest."""
    source, output = tmp_path / "in.txt", tmp_path / "out.npy"
    write(source, "txt")
    code = (
        "import sys, time\n"
        "from sterna.cli import embed_run\n"
        "embed_run.PART_ROWS = 4\n"
        "if sys.argv.pop() == 'slow':\n"
        "    fast = embed_run._embedded\n"
        "    def slow(embed, chunk, first, source):\n"
        "        time.sleep(0 if first < 8 else 600)\n"
        "        return fast(embed, chunk, first, source)\n"
        "    embed_run._embedded = slow\n"
        "from sterna.cli.main import main\n"
        "main()\n"
    )
    arguments = [sys.executable, "-c", code, "embed", str(source), "--model", folder, "-o",
                 str(output), "--threads", "1", "--json"]  # fmt: skip
    process = subprocess.Popen([*arguments, "slow"])
    second = tmp_path / "out.npy.parts" / "part-000001.npy"
    end = time.monotonic() + 120
    while not second.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    again = subprocess.run([*arguments, "fast"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["resumed"] == 8
    assert np.array_equal(np.load(output), want)


def test_parts_of_another_job_are_not_continued(folder, tmp_path, capsys, monkeypatch):
    source, output = tmp_path / "in.txt", tmp_path / "out.npy"
    write(source, "txt")
    parts = tmp_path / "out.npy.parts"
    parts.mkdir()
    (parts / "manifest.json").write_text("{}")
    assert embed(source, folder, output) == 2
    assert "another input, model or settings" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("in.csv", "a", 2, "kind of file"),
        ("in.jsonl", '{"txt": "a"}', 9, "in.jsonl:1: no text under 'body'"),
        ("in.jsonl", "{", 9, "in.jsonl:1: not valid JSON"),
        ("in.txt", "", 2, "holds no text"),
        ("in.txt", "the " * 60, 1, "texts from 0 on"),
    ],
)
def test_faults_name_the_file_and_the_line(name, content, code, says, folder, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert embed(tmp_path / name, folder, tmp_path / "out.npy") == code
    assert says in " ".join(capsys.readouterr().err.split())


def test_truncate_cuts_what_is_refused_without(folder, tmp_path):
    (tmp_path / "in.txt").write_text("the " * 60)
    assert embed(tmp_path / "in.txt", folder, tmp_path / "out.npy", "--truncate") == 0
    assert np.load(tmp_path / "out.npy").shape == (1, 64)

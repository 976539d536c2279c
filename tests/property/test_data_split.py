"""Parts of the examples: disjoint by prompt, exact, the same in any order, stable as rows come."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.core.errors import DataError
from sterna.data.config import DataConfig
from sterna.data.source import open_sources
from sterna.data.split import prompt_key, rows_of_part

shares = st.lists(st.floats(0.5, 9), min_size=1, max_size=4)
prompts = st.lists(st.integers(0, 60), min_size=1, max_size=200)


def keys_of(numbers):
    raw = b"".join(prompt_key(str(n)) for n in numbers)
    return np.frombuffer(raw, "<u8").astype(np.uint64)


def parts_of(numbers, shares, seed):
    keys = [keys_of(numbers)]
    return [rows_of_part(keys, shares, part, seed)[0] for part in range(len(shares))]


@given(prompts, shares, st.integers(0, 99))
def test_every_row_is_in_one_part_and_a_prompt_too(numbers, shares, seed):
    parts = parts_of(numbers, shares, seed)
    assert sorted(i for part in parts for i in part) == list(range(len(numbers)))
    told = [{numbers[i] for i in part} for part in parts]
    assert sum(map(len, told)) == len(set(numbers))


@given(st.integers(1, 300), shares, st.integers(0, 99))
def test_shares_are_exact_within_one_example(count, shares, seed):
    parts = parts_of(range(count), shares, seed)
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share / sum(shares) * count) <= 1


@given(prompts, shares, st.integers(0, 99))
def test_repeated_prompts_cost_at_most_their_own_number(numbers, shares, seed):
    most = max(map(numbers.count, numbers))
    for part, share in zip(parts_of(numbers, shares, seed), shares, strict=True):
        assert abs(len(part) - share / sum(shares) * len(numbers)) <= most


@given(prompts, shares, st.integers(0, 99), st.randoms())
def test_the_order_does_not_matter(numbers, shares, seed, chance):
    mixed = list(numbers)
    chance.shuffle(mixed)
    for a, b in zip(parts_of(numbers, shares, seed), parts_of(mixed, shares, seed), strict=True):
        assert sorted(numbers[i] for i in a) == sorted(mixed[i] for i in b)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99))
def test_few_rows_move_when_rows_are_added(seed):
    before = parts_of(range(2000), (2, 4, 4), seed)
    after = parts_of(range(2200), (2, 4, 4), seed)
    moved = sum(len(set(a.tolist()) - set(b.tolist())) for a, b in zip(before, after, strict=True))
    # A cut at share p moves by about sqrt(p (1 - p) * 200) rows of 200 new ones: some 7 a cut.
    assert moved < 80


def test_seeds_differ():
    assert (
        parts_of(range(100), (1, 1), 0)[0].tolist() != parts_of(range(100), (1, 1), 1)[0].tolist()
    )


def write(path, numbers):
    rows = ({"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def prompts_of(sources, part, **options):
    data = DataConfig.model_validate(
        {"sources": sources, "split": [2, 4, 4], "split_part": part, **options}
    )
    found = []
    for source in open_sources(data, options.get("of", "train")):
        for i in range(source.num_rows):
            row = source.fetch(i)
            found.append(row.table.decode(row.raw)["prompt"])
    return sorted(found)


def test_sources_are_cut_together_and_keys_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("STERNA_HOME", str(tmp_path / "home"))
    one, two = write(tmp_path / "a.jsonl", range(50)), write(tmp_path / "b.jsonl", range(25, 75))
    parts = [prompts_of([one, two], part) for part in range(3)]
    assert sum(map(len, parts)) == 100
    assert not (set(parts[0]) & set(parts[1]) or set(parts[0]) & set(parts[2]))
    assert [prompts_of([two, one], part) for part in range(3)] == parts
    kept = sorted((tmp_path / "home" / "prompts").iterdir())
    assert len(kept) == 2
    for path in kept:  # a damaged file is made again, to the same parts
        sound = path.read_bytes()
        path.write_bytes(sound[:-30] + os.urandom(1) + sound[-29:])
        assert [prompts_of([one, two], part) for part in range(3)] == parts
        assert path.read_bytes() == sound


def test_held_out_prompts_are_not_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("STERNA_HOME", str(tmp_path / "home"))
    source = write(tmp_path / "a.jsonl", [n % 40 for n in range(200)])
    data = DataConfig.model_validate({"sources": [source], "split": [1, 1], "held_out": 0.3})
    seen = []
    for part in ("train", "held_out"):
        opened = open_sources(data, part)[0]
        rows = (opened.fetch(i) for i in range(opened.num_rows))
        seen.append({row.table.decode(row.raw)["prompt"] for row in rows})
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_a_home_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("STERNA_HOME", str(tmp_path / "home"))
    assert prompts_of([write(tmp_path / "a.jsonl", range(10))], 0)


def test_a_part_without_rows_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("STERNA_HOME", str(tmp_path / "home"))
    with pytest.raises(DataError, match="no row of the part"):
        prompts_of([write(Path(tmp_path / "a.jsonl"), [1])], 1)
        prompts_of([write(Path(tmp_path / "a.jsonl"), [1])], 0)

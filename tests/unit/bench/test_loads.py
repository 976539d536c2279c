"""The benchmarks of SwiftKV and of everything together: loads, pieces and tables."""

from __future__ import annotations

import json
import random

import pytest

import combined
import swiftkv
import swiftkv_tasks


class Letters:
    """Five characters a token."""

    def encode(self, text, add_special=True):
        return list(range(len(text) // 5))

    def decode(self, ids):
        return f"{ids[0]}..{ids[-1]}"


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for second, prompt, new in ((0, 100, 10), (1, 9000, 5), (4, 1990, 700)):
        rows.append(f"2023-11-16 18:17:0{second}.0000000,{prompt},{new}")
    path.write_text("\n".join(rows) + "\n")
    return path


def test_the_trace_is_clipped_to_the_context_and_has_distinct_texts(trace):
    samples = combined.samples_of(trace, 3, Letters())[combined.WARM_UP :]
    assert [(s.prompt_len, s.output_len) for s in samples] == [(100, 10), (2011, 5), (1760, 256)]
    assert all(s.prompt_len + s.output_len <= combined.CONTEXT for s in samples)
    assert len({s.prompt for s in samples}) == 3


def test_gaps_keep_their_proportion_at_the_offered_rate(trace):
    samples = combined.samples_of(trace, 3, Letters())[combined.WARM_UP :]
    assert combined.due_times(samples, 0.5) == pytest.approx([0.0, 1.5, 6.0])
    assert combined.due_times(samples, 0.0) == [0.0, 0.0, 0.0]


def test_the_table_compares_within_a_load():
    keys = ("requests_per_s", "tokens_per_s", "mean_s", "p50_s", "p95_s", "mean_ttft_s")
    windows = [
        {"name": name, "rate": rate, **dict.fromkeys(keys, value)}
        for name, rate, value in (
            ("sterna", 0.5, 1.0),
            ("sterna", 0.5, 3.0),
            ("llamacpp", 0.5, 8.0),
            ("llamacpp", 0.0, 9.0),
        )
    ]
    lines = combined.table(windows).splitlines()
    assert lines[2].startswith("| 0.5 | sterna | 2 |") and lines[2].endswith("1.00x |")
    assert lines[3].endswith("| 4.00x |")
    assert lines[4].endswith("| - |"), "nothing of ours at that load"


def test_pieces_are_added_under_the_same_settings_only(tmp_path):
    out = tmp_path / "swiftkv.json"
    assert swiftkv.earlier(out, {"threads": 2}) == {}
    rounds = {"plain": [1.0], "swiftkv": [2.0]}
    rows = swiftkv.table({"2000/250 tokens/s": rounds})
    assert rows[0]["ratio"] == 2.0 and rows[0]["is_met"]
    out.write_text(json.dumps({"threads": 2, "rows": rows}))
    assert swiftkv.earlier(out, {"threads": 2}) == {"2000/250 tokens/s": rounds}
    with pytest.raises(ValueError, match="threads 2, not 1"):
        swiftkv.earlier(out, {"threads": 1})


def test_tasks_are_answerable_from_their_prompts():
    for prompt, answer in swiftkv_tasks.copies(5):
        line, again, begun = prompt.split("\n")
        assert line == again == begun + answer
    for prompt, answer in swiftkv_tasks.recalls(5):
        assert f"{prompt.splitlines()[-1]}{answer}." in prompt


def test_a_loss_has_the_error_of_paired_items():
    draw = random.Random(0)
    base = [float(draw.random() < 0.9) for _ in range(100)]
    rows = swiftkv_tasks.compare({"teacher": base, "same": base, "none": [0.0] * 100})
    assert rows["same"] == {**rows["teacher"], "lost": 0.0, "error": 0.0}
    assert rows["none"]["lost"] == rows["teacher"]["score"] and rows["none"]["error"] > 0

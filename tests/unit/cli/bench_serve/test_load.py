"""What is sent and when: data sets, traces and arrivals."""

from __future__ import annotations

import json
import math
from statistics import mean, pstdev

import pytest

from sterna.cli.bench_serve.arrivals import rate_at, send_times
from sterna.cli.bench_serve.datasets import Sample, make_samples
from sterna.cli.bench_serve.options import LoadOptions
from sterna.cli.bench_serve.traces import read_trace
from sterna.cli.bench_serve.words import TextSource, common_words, one_token_words
from sterna.core.errors import ConfigError

SOURCE = TextSource(common_words(), seed=0)


def _count(text):
    return len(text.split())


def _azure(path):
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:16:51.2224670,8790,5500\n"
    )
    return path


def _mooncake(path):
    rows = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 3500, "input_length": 1400, "output_length": 6, "hash_ids": [0, 1, 3]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_azure_lines_become_arrivals(tmp_path):
    arrivals = read_trace(_azure(tmp_path / "t.csv"), limit=2)
    assert [a.num_prompt_tokens for a in arrivals] == [374, 396]
    assert arrivals[0].at_s == 0
    assert arrivals[1].at_s == pytest.approx(4.314579)


def test_mooncake_prefixes_are_shared_and_scaled(tmp_path):
    trace = _mooncake(tmp_path / "t.jsonl")
    options = LoadOptions(trace=trace, scale_len=0.25, scale_rate=2.0)
    first, second = make_samples(options, SOURCE)
    assert [first.prompt_len, second.prompt_len] == [275, 350]
    assert [_count(first.prompt), _count(second.prompt)] == [275, 350]
    shared = 2 * 128  # two whole blocks of 512 tokens at a quarter of the length
    assert first.prompt.split()[:shared] == second.prompt.split()[:shared]
    assert first.prompt.split()[shared:] != second.prompt.split()[shared : first.prompt_len]
    assert second.at_s == pytest.approx(1.25)  # 2.5 s at twice the rate
    assert first.output_len == 1


def test_a_cut_block_is_the_beginning_of_the_whole_one():
    assert SOURCE.text(40, "block", 7).startswith(SOURCE.text(13, "block", 7))
    assert SOURCE.text(40, "block", 7) != SOURCE.text(40, "block", 8)


def test_max_len_bounds_prompt_and_output(tmp_path):
    options = LoadOptions(trace=_azure(tmp_path / "t.csv"), max_len=512)
    for sample in make_samples(options, SOURCE):
        assert sample.prompt_len + sample.output_len <= 512
        assert _count(sample.prompt) == sample.prompt_len


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a,b\n1,2\n", "known are Azure CSV"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,4\n", "line 2"),
        ('{"timestamp": 1}\n', "line 1"),
        ("", "known are"),
    ],
)
def test_broken_traces_name_the_fault(tmp_path, text, fragment):
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(ConfigError, match=fragment):
        read_trace(path, 10)


def test_missing_trace(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "none", 1)


def test_random_lengths_vary_within_the_ratio_and_repeat_with_the_seed():
    options = LoadOptions(num_prompts=50, input_len=100, output_len=10, random_range_ratio=0.2)
    samples = make_samples(options, SOURCE)
    assert samples == make_samples(options, SOURCE)
    lengths = {sample.prompt_len for sample in samples}
    assert min(lengths) >= 80
    assert max(lengths) <= 120
    assert len(lengths) > 10
    assert all(_count(sample.prompt) == sample.prompt_len for sample in samples)


def test_repeated_prefixes_are_used_in_turn():
    options = LoadOptions(
        dataset_name="prefix_repetition",
        num_prompts=4,
        prefix_repetition_num_prefixes=2,
        prefix_repetition_prefix_len=30,
        prefix_repetition_suffix_len=12,
    )
    samples = make_samples(options, SOURCE)
    words = [sample.prompt.split() for sample in samples]
    assert [sample.prompt_len for sample in samples] == list(map(len, words)) == [42] * 4
    assert words[0][:30] == words[2][:30] != words[1][:30] == words[3][:30]
    assert len({tuple(one[30:]) for one in words}) == 4


def test_sonnet_takes_lines_of_a_text(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one line\n\nanother line\n")
    options = LoadOptions(dataset_name="sonnet", dataset_path=path, num_prompts=3, input_len=40)
    samples = make_samples(options, SOURCE)
    assert samples == make_samples(options, SOURCE)
    for sample in samples:
        assert set(sample.prompt.split("\n")) <= {"one line", "another line"}
        assert 160 <= len(sample.prompt) < 175  # four characters a token
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no line"):
        make_samples(options, SOURCE)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        make_samples(options, SOURCE)


def test_timed_trace_is_a_trace_by_its_other_name(tmp_path):
    path = _mooncake(tmp_path / "t.jsonl")
    named = LoadOptions(dataset_name="timed_trace", dataset_path=path, scale_len=0.1)
    assert make_samples(named, SOURCE) == make_samples(
        LoadOptions(trace=path, scale_len=0.1), SOURCE
    )


def test_a_rate_or_a_ramp_replaces_a_traces_own_times(tmp_path):
    samples = make_samples(LoadOptions(trace=_mooncake(tmp_path / "t.jsonl")), SOURCE)
    own = [0.0, 2.5]
    ramp = {"ramp_up_strategy": "linear", "ramp_up_start_rps": 50.0, "ramp_up_end_rps": 99.0}
    assert send_times(samples, LoadOptions()) == own
    for paced in ({"request_rate": 50.0}, ramp):
        assert send_times(samples, LoadOptions(**paced)) != own
    assert send_times(samples, LoadOptions(self_timed=False)) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, []),
        ({"input_len": 5, "random_range_ratio": 0.1, "request_rate": 2.0, "burstiness": 2.0}, []),
        ({"burstiness": 2.0}, ["burstiness"]),
        ({"scale_len": 0.5, "max_len": 99}, ["max_len", "scale_len"]),
        ({"dataset_path": "x"}, ["dataset_path"]),
        ({"trace": "x", "scale_rate": 0.5, "self_timed": False}, []),
        ({"trace": "x", "input_len": 5}, ["input_len"]),
        ({"trace": "x", "dataset_name": "custom", "dataset_path": "y"}, ["dataset_name"]),
        ({"dataset_name": "timed_trace", "dataset_path": "y", "scale_len": 0.5}, []),
        ({"dataset_name": "sonnet", "dataset_path": "y", "input_len": 5}, []),
        ({"dataset_name": "mt_bench", "dataset_path": "y", "input_len": 5}, ["input_len"]),
        ({"prefix_repetition_prefix_len": 5}, ["prefix_repetition_prefix_len"]),
    ],
)
def test_options_that_change_nothing_are_named(fields, said):
    found = list(LoadOptions(**fields).without_effect())
    assert [reason.split()[0] for reason in found] == said


def test_a_common_prefix_is_common():
    options = LoadOptions(num_prompts=3, input_len=10, random_prefix_len=20)
    prompts = [sample.prompt.split() for sample in make_samples(options, SOURCE)]
    assert all(prompt[:20] == prompts[0][:20] for prompt in prompts)
    assert prompts[0][20:] != prompts[1][20:]


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("custom", '{"prompt": "a"}\n{"question": "b", "output_tokens": 9}\n', {"a", "b"}),
        ("mt_bench", '{"turns": ["first", "second"]}\n', {"first"}),
        (
            "sharegpt",
            '[{"conversations": [{"value": "a long enough question"}, {"value": "answer"}]},'
            ' {"conversations": [{"value": "short"}, {"value": "x"}]}]',
            {"a long enough question"},
        ),
    ],
)
def test_prompt_files(tmp_path, name, text, prompts):
    path = tmp_path / "d"
    path.write_text(text)
    options = LoadOptions(dataset_name=name, dataset_path=path, num_prompts=4)
    samples = make_samples(options, SOURCE)
    assert len(samples) == 4  # shorter files are repeated
    assert {sample.prompt for sample in samples} == prompts


def test_an_empty_prompt_file_is_refused(tmp_path):
    path = tmp_path / "d"
    path.write_text("{}\n")
    options = LoadOptions(dataset_name="custom", dataset_path=path)
    with pytest.raises(ConfigError, match="no prompt"):
        make_samples(options, SOURCE)


def _gaps(options, count=4000):
    times = send_times([Sample("x", 1, 1)] * count, options)
    return [after - before for before, after in zip([0.0, *times], times, strict=False)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_rate_and_the_spread(burstiness):
    gaps = _gaps(LoadOptions(request_rate=5.0, burstiness=burstiness))
    # The mean of 4000 gamma gaps of variation 1/sqrt(shape) is off by 1.6 %/sqrt(shape) (1 sigma).
    assert mean(gaps) == pytest.approx(0.2, rel=4 * 0.016 / math.sqrt(burstiness))
    assert pstdev(gaps) / mean(gaps) == pytest.approx(1 / math.sqrt(burstiness), rel=0.15)


def test_inf_sends_all_at_once():
    assert set(send_times([Sample("x", 1, 1)] * 5, LoadOptions())) == {0.0}


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 5.5), ("exponential", 10**0.5)])
def test_ramp_up(strategy, middle):
    options = LoadOptions(ramp_up_strategy=strategy, ramp_up_start_rps=1, ramp_up_end_rps=10)
    assert rate_at(0, 11, options) == 1
    assert rate_at(5, 11, options) == pytest.approx(middle)
    assert rate_at(10, 11, options) == pytest.approx(10)
    gaps = _gaps(options, 2000)
    assert mean(gaps[:500]) > 2 * mean(gaps[-500:])


def test_a_traces_times_hold_unless_a_rate_is_set(tmp_path):
    trace = _azure(tmp_path / "t.csv")
    options = LoadOptions(trace=trace)
    samples = make_samples(options, SOURCE)
    assert send_times(samples, options)[1] == pytest.approx(4.314579)
    ruled = LoadOptions(trace=trace, request_rate=1000.0)
    assert send_times(samples, ruled)[-1] < 1


class PieceTokenizer:
    """Words of its table are one token after a word; `split` ones are not."""

    vocab_size = 5
    pieces = (b"<s>", b" good", b" bad", b"no", b" Up")

    def token_bytes(self, token_id):
        return self.pieces[token_id]

    def encode(self, text, add_special_tokens=True):
        return [1 if word == "good" else 0 for word in text.split()]


def test_only_words_that_stay_one_token_are_used():
    assert one_token_words(PieceTokenizer()) == (" good",)

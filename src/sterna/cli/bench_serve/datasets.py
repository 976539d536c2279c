"""From a data set or a trace to the samples that will be sent."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from sterna.cli.bench_serve.options import LoadOptions
from sterna.cli.bench_serve.traces import MOONCAKE_BLOCK, Arrival, read_trace
from sterna.cli.bench_serve.words import TextSource
from sterna.core.errors import ConfigError

DEFAULT_OUTPUT_LEN = 64
# Of ShareGPT conversations: too short to be a question, as in the usual benchmark filter.
_MIN_CHARS = 16
_CHARS_PER_TOKEN = 4  # about, in English


@dataclass(frozen=True, slots=True)
class Sample:
    """One request to send. `prompt_len` 0 = only the server knows; `at_s` None = by the rate."""

    prompt: str
    prompt_len: int
    output_len: int
    at_s: float | None = None


def make_samples(options: LoadOptions, source: TextSource) -> list[Sample]:
    """`options.num_prompts` samples (fewer when a trace is shorter), the same for the same seed."""
    if options.trace_path is not None:
        arrivals = read_trace(options.trace_path, options.num_prompts)
        return [_replayed(a, i, options, source) for i, a in enumerate(arrivals)]
    if options.dataset_name == "prefix_repetition":
        return [_repeated(i, options, source) for i in range(options.num_prompts)]
    if options.dataset_name == "random" or options.dataset_path is None:
        return [_random(i, options, source) for i in range(options.num_prompts)]
    if options.dataset_name == "sonnet":
        return _of_lines(options.dataset_path, options)
    reader = {"custom": _custom, "sharegpt": _sharegpt, "mt_bench": _mt_bench}
    found = list(reader[options.dataset_name](options.dataset_path))
    if not found:
        raise ConfigError(f"{options.dataset_path} holds no prompt of kind {options.dataset_name}")
    random.Random(options.seed).shuffle(found)
    chosen = islice(cycle(found), options.num_prompts)
    return [_of_text(prompt, asked, options) for prompt, asked in chosen]


def _of_text(prompt: str, asked: int | None, options: LoadOptions) -> Sample:
    return Sample(prompt, 0, options.output_len or asked or DEFAULT_OUTPUT_LEN)


def _random(index: int, options: LoadOptions, source: TextSource) -> Sample:
    draw = random.Random(f"{options.seed}/lengths/{index}")
    prompt_len = _vary(options.input_len, options.random_range_ratio, draw)
    output_len = _vary(options.output_len or DEFAULT_OUTPUT_LEN, options.random_range_ratio, draw)
    prefix = source.text(options.random_prefix_len, "prefix")
    text = prefix + source.text(prompt_len, "random", index)
    return Sample(text, options.random_prefix_len + prompt_len, output_len)


def _repeated(index: int, options: LoadOptions, source: TextSource) -> Sample:
    """One of a few prefixes and a suffix of its own: what a prefix cache is good for."""
    prefix_idx = index % options.prefix_repetition_num_prefixes
    prefix = source.text(options.prefix_repetition_prefix_len, "prefix", prefix_idx)
    text = prefix + source.text(options.prefix_repetition_suffix_len, "suffix", index)
    prompt_len = options.prefix_repetition_prefix_len + options.prefix_repetition_suffix_len
    return Sample(text, prompt_len, options.output_len or DEFAULT_OUTPUT_LEN)


def _of_lines(path: Path, options: LoadOptions) -> list[Sample]:
    """Random lines of a text file, until about `input_len` tokens; the server counts them."""
    lines = [line for line in _read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"{path} holds no line of text")
    samples = []
    for index in range(options.num_prompts):
        draw = random.Random(f"{options.seed}/lines/{index}")
        text = draw.choice(lines)
        while len(text) < options.input_len * _CHARS_PER_TOKEN:
            text = f"{text}\n{draw.choice(lines)}"
        samples.append(Sample(text, 0, options.output_len or DEFAULT_OUTPUT_LEN))
    return samples


def _vary(mean: int, ratio: float, draw: random.Random) -> int:
    return max(1, draw.randint(round(mean * (1 - ratio)), round(mean * (1 + ratio))))


def _replayed(arrival: Arrival, index: int, options: LoadOptions, source: TextSource) -> Sample:
    output_len = max(1, round(arrival.num_output_tokens * options.scale_len))
    output_len = min(options.output_len or output_len, max(1, options.max_len // 2))
    prompt_len = max(1, round(arrival.num_prompt_tokens * options.scale_len))
    prompt_len = min(prompt_len, options.max_len - output_len)
    text = _prefixed_text(arrival, index, prompt_len, options.scale_len, source)
    return Sample(text, prompt_len, output_len, arrival.at_s / options.scale_rate)


def _prefixed_text(
    arrival: Arrival, index: int, prompt_len: int, scale: float, source: TextSource
) -> str:
    """Each block id is one fixed text, so equal leading ids become equal prefixes."""
    block_len = max(1, round(MOONCAKE_BLOCK * scale))
    parts: list[str] = []
    left = prompt_len
    for block_id in arrival.block_ids:
        if left <= 0:
            break
        # A shorter last block must be a beginning of the whole one, so it is cut, not redrawn.
        parts.append(source.text(min(block_len, left), "block", block_id))
        left -= block_len
    if left > 0:
        parts.append(source.text(left, "rest", index))
    return "".join(parts)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read data set {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"data set {path} is no UTF-8 text: {error}") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path} line {number} is no JSON: {error}") from error


def _custom(path: Path) -> Iterator[tuple[str, int | None]]:
    """JSONL with `prompt` (or `question`, `instruction`) and perhaps `output_tokens`."""
    for entry in _lines(path):
        text = entry.get("prompt") or entry.get("question") or entry.get("instruction")
        if text:
            yield str(text), entry.get("output_tokens")


def _mt_bench(path: Path) -> Iterator[tuple[str, int | None]]:
    """JSONL with `turns`; the first turn is asked."""
    return ((str(entry["turns"][0]), None) for entry in _lines(path) if entry.get("turns"))


def _sharegpt(path: Path) -> Iterator[tuple[str, int | None]]:
    """One JSON list of {"conversations": [{"from", "value"}, ...]}: first question, its answer."""
    try:
        entries = json.loads(_read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no ShareGPT file: {error}") from error
    for entry in entries:
        turns = entry.get("conversations") or []
        if len(turns) >= 2 and len(turns[0]["value"]) >= _MIN_CHARS:
            yield turns[0]["value"], max(4, len(turns[1]["value"]) // _CHARS_PER_TOKEN)
